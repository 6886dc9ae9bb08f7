"""History: the course of a training run, as the logs in its folder tell it, also while it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskhooks.errors import CorruptFileError
from maskhooks.viz.chart import Mark, chart, running_mean
from maskhooks.viz.sections import ChartRow, Charts, Section

if TYPE_CHECKING:
    import pandas as pd

LOG = "log.csv"
_VALIDATION = "validation.csv"
_FILLED = ", filled where the divergence is within the margin, which is the dashed line"
_COLUMNS = ["step", "site", "depth", "divergence", "expected_l0", "agreement"]


@dataclass(frozen=True)
class Course:
    """The course of one masking.

    Attributes:
        site: the masked site.
        depth: the depth that was read.
        log: a row for each of its steps: step, multiplier, divergence (nats), expected_l0 (fraction), agreement.
        validation: a row for each validation, without the multiplier.
    """

    site: str
    depth: int
    log: pd.DataFrame
    validation: pd.DataFrame


def courses(folder: Path) -> list[Course]:
    """The course of each masking that was trained or validated, in order of depth.

    Raises:
        CorruptFileError: a log is broken.
    """
    log = _read(folder / LOG, [*_COLUMNS, "multiplier"])
    validation = _read(folder / _VALIDATION, _COLUMNS)
    logs, validations = _by_masking(log), _by_masking(validation)
    return [
        Course(site, depth, logs.get((depth, site), log[:0]), validations.get((depth, site), validation[:0]))
        for depth, site in sorted({*logs, *validations})
    ]


def _by_masking(table: pd.DataFrame) -> dict[tuple[int, str], pd.DataFrame]:
    groups = table.groupby(["depth", "site"])
    return {(int(rows["depth"].iloc[0]), str(rows["site"].iloc[0])): rows for _, rows in groups}


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """The table of a log; empty where there is none."""
    import pandas as pd

    if not path.exists():
        return pd.DataFrame(columns=columns)
    try:
        table = pd.read_csv(path, usecols=columns).dropna()  # a run that goes on may be amid its last row
        numbers = [name for name in columns if name != "site"]
        return table.astype(dict.fromkeys(numbers, float))
    except (OSError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is no log of a training run ({error}). Give the folder that fit wrote.", path=path
        ) from error


def section(found: Sequence[Course], margin: float | None, chosen: Mapping[str, int]) -> Section:
    """Charts of divergence, fraction kept and multiplier over steps, a row for each masking.

    Args:
        margin: in nats; None where it is not known.
        chosen: by masking the step whose state was kept, as `Fitted` has it.
    """
    last = int(max(table["step"].max() for one in found for table in (one.log, one.validation) if len(table)))
    tops = _tops(found, margin)
    rows = [_row(one, margin, _chosen(one, chosen), last, tops) for one in found]
    within, filled = ("near", "") if margin is None else (f"within {margin:g} nats of", _FILLED)
    return Section(
        "How the masks were trained",
        f"Each mask learned to keep as few positions as it can (fraction kept, the expected L0) while the prediction "
        f"stays {within} the original one (divergence). The multiplier is the price of divergence: it rises while the "
        f"prediction moves too far away, and falls where there is room. Faint lines are single steps, strong ones "
        f"their running mean. Circles are validation data{filled}. The upright line is the state that was chosen and "
        f"saved. All rows have the same axes; what lies above them is drawn at the top.",
        [Charts(("divergence in nats", "fraction kept", "multiplier"), rows)],
    )


def _tops(found: Sequence[Course], margin: float | None) -> tuple[float, float]:
    """Where the axes of divergence and multiplier end; a few margins at most, so that the margin can be seen."""
    means = [running_mean(one.log["divergence"].to_numpy()).max() for one in found if len(one.log)]
    means += [one.validation["divergence"].max() for one in found if len(one.validation)]
    most = max(filter(math.isfinite, means), default=0.0)
    if margin is not None:
        most = min(max(most, 2 * margin), 5 * margin)
    multiplier = max((one.log["multiplier"].max() for one in found if len(one.log)), default=0.0)
    return 1.05 * most or 1.0, 1.05 * multiplier or 1.0


def _row(one: Course, margin: float | None, at: int | None, last: int, tops: tuple[float, float]) -> ChartRow:
    values = {"divergence": tops[0], "expected_l0": 1.0, "multiplier": tops[1]}
    charts = [
        chart(
            f"{name.replace('expected_l0', 'fraction kept')} of {one.site} at depth {one.depth} over {last} steps",
            one.log["step"],
            one.log[name],
            last=last,
            top=top,
            marks=[] if name == "multiplier" else _marks(one, name, margin),
            rule=margin if name == "divergence" else None,
            upright=None if at is None else float(at),
            percent=name == "expected_l0",
        )
        for name, top in values.items()
    ]
    note, good = _verdict(one, margin, at)
    return ChartRow(f"depth {one.depth} · {one.site}", note, good, charts)


def _marks(one: Course, name: str, margin: float | None) -> list[Mark]:
    return [
        Mark(row["step"], row[name], _words(row), margin is None or row["divergence"] <= margin)
        for row in one.validation.to_dict("records")
    ]


def _verdict(one: Course, margin: float | None, at: int | None) -> tuple[str, bool | None]:
    """What the chosen state does on validation data, or the last one where none is chosen yet."""
    rows = one.validation.to_dict("records")
    if not rows:
        return "no validation data", None
    row = next((row for row in rows if row["step"] == at), rows[-1])
    kind = "chosen" if row["step"] == at else "last validation"
    return f"{kind}: {_words(row)}", None if margin is None else bool(row["divergence"] <= margin)


def _words(row: Mapping[Any, Any]) -> str:
    return (
        f"step {row['step']:,.0f}, {row['divergence']:.3f} nats, {row['expected_l0']:.1%} kept, "
        f"{row['agreement']:.1%} of the predictions stay"
    )


def _chosen(one: Course, chosen: Mapping[str, int]) -> int | None:
    """Masks of one site are chosen together, since they share a baseline."""
    return next((at for name, at in chosen.items() if name == one.site or name.startswith(f"{one.site} given ")), None)
