"""History: read the course of a training run from its logs, even while it is running."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskhooks.errors import CorruptFileError
from maskhooks.viz.chart import Point, chart, running_mean
from maskhooks.viz.sections import ChartRow, Charts, Section

if TYPE_CHECKING:
    import pandas as pd

LOG = "log.csv"
_VALIDATION = "validation.csv"
_FILLED = ", filled if the divergence is within the margin (dashed line)"
_COLUMNS = ["step", "site", "depth", "divergence", "expected_l0", "agreement"]


@dataclass(frozen=True)
class MaskHistory:
    """The course of one masking.

    Attributes:
        site: the masked site.
        depth: the depth that was read.
        log: one row per step: step, multiplier, divergence (nats), expected_l0 (fraction), agreement.
        validation: one row per validation, without the multiplier.
    """

    site: str
    depth: int
    log: pd.DataFrame
    validation: pd.DataFrame


def read_history(folder: Path) -> list[MaskHistory]:
    """Return the course of each masking that was trained or validated, in order of depth.

    Raises:
        CorruptFileError: a log is broken.
    """
    log = _read(folder / LOG, [*_COLUMNS, "multiplier"])
    validation = _read(folder / _VALIDATION, _COLUMNS)
    logs, validations = _by_masking(log), _by_masking(validation)
    return [
        MaskHistory(site, depth, logs.get((depth, site), log[:0]), validations.get((depth, site), validation[:0]))
        for depth, site in sorted({*logs, *validations})
    ]


def _by_masking(table: pd.DataFrame) -> dict[tuple[int, str], pd.DataFrame]:
    groups = table.groupby(["depth", "site"])
    return {(int(rows["depth"].iloc[0]), str(rows["site"].iloc[0])): rows for _, rows in groups}


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read the table of a log; it is empty if there is no file."""
    import pandas as pd

    if not path.exists():
        return pd.DataFrame(columns=columns)
    try:
        table = pd.read_csv(path, usecols=columns).dropna()  # a running job may be writing its last row
        numbers = [name for name in columns if name != "site"]
        return table.astype(dict.fromkeys(numbers, float))
    except (OSError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is not a training log ({error}). Give the folder that fit wrote.", path=path
        ) from error


def section(found: Sequence[MaskHistory], margin: float | None, chosen: Mapping[str, int]) -> Section:
    """Return charts of divergence, fraction kept and multiplier over steps, one row per masking.

    Args:
        margin: in nats; None if unknown.
        chosen: for each masking, the step whose state was kept, as in `FitResult`.
    """
    last = int(max(table["step"].max() for one in found for table in (one.log, one.validation) if len(table)))
    tops = _tops(found, margin)
    rows = [_row(one, margin, _chosen(one, chosen), last, tops) for one in found]
    within, filled = ("near", "") if margin is None else (f"within {margin:g} nats of", _FILLED)
    return Section(
        "How the masks were trained",
        f"Each mask learned to keep as few positions as possible (fraction kept, the expected L0) while the prediction "
        f"stays {within} the original one (divergence). The multiplier weights the divergence: it rises while the "
        f"divergence is too large and falls otherwise. Faint lines show single steps, strong lines their running "
        f"mean. Circles show validation data{filled}. The vertical line marks the state that was chosen and saved. All "
        f"rows share the same axes; values above an axis are drawn at its top.",
        [Charts(("divergence in nats", "fraction kept", "multiplier"), rows)],
    )


def _tops(found: Sequence[MaskHistory], margin: float | None) -> tuple[float, float]:
    """Return the tops of the divergence and multiplier axes; the first is at most a few margins, to show the margin."""
    means = [running_mean(one.log["divergence"].to_numpy()).max() for one in found if len(one.log)]
    means += [one.validation["divergence"].max() for one in found if len(one.validation)]
    most = max(filter(math.isfinite, means), default=0.0)
    if margin is not None:
        most = min(max(most, 2 * margin), 5 * margin)
    multiplier = max((one.log["multiplier"].max() for one in found if len(one.log)), default=0.0)
    return 1.05 * most or 1.0, 1.05 * multiplier or 1.0


def _row(one: MaskHistory, margin: float | None, at: int | None, last: int, tops: tuple[float, float]) -> ChartRow:
    values = {"divergence": tops[0], "expected_l0": 1.0, "multiplier": tops[1]}
    charts = [
        chart(
            f"{name.replace('expected_l0', 'fraction kept')} of {one.site} at depth {one.depth} over {last} steps",
            one.log["step"],
            one.log[name],
            last=last,
            top=top,
            marks=[] if name == "multiplier" else _marks(one, name, margin),
            hline=margin if name == "divergence" else None,
            vline=None if at is None else float(at),
            percent=name == "expected_l0",
        )
        for name, top in values.items()
    ]
    note, good = _verdict(one, margin, at)
    return ChartRow(f"depth {one.depth} · {one.site}", note, good, charts)


def _marks(one: MaskHistory, name: str, margin: float | None) -> list[Point]:
    return [
        Point(row["step"], row[name], _words(row), margin is None or row["divergence"] <= margin)
        for row in one.validation.to_dict("records")
    ]


def _verdict(one: MaskHistory, margin: float | None, at: int | None) -> tuple[str, bool | None]:
    """Summarise the chosen state on validation data, or the last validation if none is chosen yet."""
    rows = one.validation.to_dict("records")
    if not rows:
        return "no validation data", None
    row = next((row for row in rows if row["step"] == at), rows[-1])
    kind = "chosen" if row["step"] == at else "last validation"
    return f"{kind}: {_words(row)}", None if margin is None else bool(row["divergence"] <= margin)


def _words(row: Mapping[Any, Any]) -> str:
    return (
        f"step {row['step']:,.0f}, {row['divergence']:.3f} nats, {row['expected_l0']:.1%} kept, "
        f"{row['agreement']:.1%} of the predictions unchanged"
    )


def _chosen(one: MaskHistory, chosen: Mapping[str, int]) -> int | None:
    """Return the step chosen for a site; its masks share a baseline, so they are chosen together."""
    return next((at for name, at in chosen.items() if name == one.site or name.startswith(f"{one.site} given ")), None)
