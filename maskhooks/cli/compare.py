"""`maskhooks compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from maskhooks.cli.console import say, say_table, tell
from maskhooks.cli.folder import make_folder
from maskhooks.cli.material import Material
from maskhooks.cli.options import (
    BatchSize,
    Data,
    Device,
    LabelColumn,
    MaxLength,
    Model,
    SecondColumn,
    Seed,
    TextColumn,
    Units,
    parsed,
)
from maskhooks.comparison.compare import compare as compare_methods
from maskhooks.comparison.comparison import Comparison
from maskhooks.comparison.judging import Depths
from maskhooks.comparison.results import Cell
from maskhooks.data.records import Columns
from maskhooks.errors import SettingError
from maskhooks.explainers.base import EXPLAINERS
from maskhooks.explainers.saving import settings_of
from maskhooks.metrics.metric import METRICS
from maskhooks.plugins.registry import registry

_DRAWN = 100
_INTERRUPTED = 130  # the shells' exit code for Ctrl-C
_Names = list[str] | None


def compare(
    model: Model,
    data: Data = None,
    methods: Annotated[
        _Names,
        typer.Option(
            help="Names of explainers that need no training, and folders that fit wrote, with commas between them. "
            "Default: integrated-gradients and input-x-gradient (where Captum is installed), leave-one-out, random.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        _Names,
        typer.Option(
            help="Names of metrics, with commas between them. Default: comprehensiveness, sufficiency, area-between "
            "and divergence where the model predicts classes, else divergence.",
            show_default=False,
        ),
    ] = None,
    sites: Annotated[
        _Names,
        typer.Option(
            "--sites",
            "--site",
            help="What the named explainers explain: input, hidden, message, an address or a glob. May be repeated. "
            "Default: what a folder of --methods masks, else input, message or hidden, which the model has first.",
            show_default=False,
        ),
    ] = None,
    depths: Annotated[
        Depths,
        typer.Option(help="Which depths are judged where masks of one site are read from several: the last, or all."),
    ] = "last",
    out: Annotated[Path, typer.Option(help="Folder for the results; the same command resumes there.")] = Path(
        "comparison"
    ),
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Draw at most this many examples from --data, by the seed. Default: {_DRAWN}.",
            rich_help_panel="Data",
            show_default=False,
        ),
    ] = None,
    text_column: TextColumn = "text",
    second_column: SecondColumn = None,
    label_column: LabelColumn = None,
    batch_size: BatchSize = 16,
    max_length: MaxLength = 128,
    units: Units = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the table as CSV.", show_default=False)] = None,
    latex: Annotated[
        Path | None, typer.Option(help="Also write the table for LaTeX, with booktabs.", show_default=False)
    ] = None,
    confidence: Annotated[float, typer.Option(help="The nominal coverage of intervals.")] = 0.95,
    seed: Seed = 0,
    device: Device = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME.SETTING=VALUE",
            help="A setting of a method or a metric, such as integrated-gradients.n_steps=20 or morf.baseline=mean. "
            "May be repeated; `maskhooks settings NAME` lists them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare explainers: which explanations of this model are to be believed, and what do they cost?

    Each method explains the same examples, and metrics judge each. Prints a table with intervals, says which
    differences are real and when a trained method pays off, and writes a page with curves and examples side by side.
    If the command is stopped, the same command resumes.

    Examples:

    - `maskhooks compare bert-base-uncased-sst5 --data dev.txt`
    - `maskhooks compare my_package.networks:make --methods leave-one-out,random --metrics comprehensiveness`
    - `maskhooks compare my_folder/my_model --data reviews.csv --methods run,integrated-gradients --out compared`
    - `maskhooks compare my_folder/my_model --data reviews.csv --limit 500 --csv table.csv --latex table.tex`
    """
    make_folder(out)
    asked, own = _split(methods), parsed(settings)
    runs = [name for name in asked or () if Path(name).is_dir()]
    columns = Columns(text_column, second_column, label_column)
    material = Material.of(
        model,
        device,
        max_length,
        units=units or next((found for found in map(_units, runs) if found), None),
        columns=columns,
        batch_size=batch_size,
        seed=seed,
    )
    given = _with_settings(asked, _split(metrics), own)
    batches = material.for_comparing(data, _DRAWN if limit is None and data is not None else limit)
    try:
        found = compare_methods(
            material.hooked,
            given[0],
            batches,
            metrics=given[1],
            sites=sites or None,
            depths=depths,
            folder=out / "results",
            confidence=confidence,
            seed=seed,
        )
    except KeyboardInterrupt:
        tell("stopped", f"{out} holds what was done. Run the same command again to resume.", "yellow")
        raise typer.Exit(_INTERRUPTED) from None
    _show(found)
    _write(found, out, csv, latex)


def _show(found: Comparison) -> None:
    """Print the table, the differences that are real, and when a trained method pays off."""
    cells = [found.cells(metric) for metric in found.metrics]
    lines = []
    for number, row in enumerate(found.table_rows):
        site = {"site": row.site} if len(found.sites) > 1 else {}
        numbers = {
            f"{metric} {'↑' if about.better == 'higher' else '↓'}": _number(column[number])
            for (metric, about), column in zip(found.metrics.items(), cells, strict=True)
        }
        seconds = found.timings[row.method].seconds
        lines.append({**site, "method": found.name(row), **numbers, "s/example": f"{seconds:.2g}"})
    where = f" at {found.sites[0]}" if len(found.sites) == 1 else ""
    say_table(
        lines,
        f"{len(found.examples)} examples{where}: means with {100 * found.confidence:g} % intervals; * is the best, "
        "~ not shown to differ from it",
    )
    say("Differences by paired permutation tests, adjusted by Holm's rule for all tests of a metric, at the 5 % level:")
    for metric in found.metrics:
        say(f"  {_differences(found, metric)}")
    for one in found.break_evens():
        say(str(one))


def _number(cell: Cell) -> str:
    mark = "*" if cell.best else "" if cell.worse or cell.p_best != cell.p_best else "~"
    ends = f" [{cell.interval.low:.3f}, {cell.interval.high:.3f}]" if cell.interval.low == cell.interval.low else ""
    return f"{cell.interval.mean:.3f}{mark}{ends}"


def _differences(found: Comparison, metric: str) -> str:
    """Say which differences by a metric are real."""
    tests = found.tests(metric)
    sign = 1 if found.metrics[metric].better == "higher" else -1
    pairs = []
    for one in tests:
        if one.adjusted < 0.05:
            first, second = (one.first, one.second) if sign * one.found.difference.mean > 0 else (one.second, one.first)
            pairs.append(f"{found.name(first)} over {found.name(second)}")
    if not tests:
        return f"{metric}: no test, because fewer than two examples have values."
    told = ", ".join(pairs[:8]) + (f", and {len(pairs) - 8} more" if len(pairs) > 8 else "")
    return f"{metric}: {len(pairs)} of {len(tests)} differences are real{': ' + told if told else ''}."


def _write(found: Comparison, out: Path, csv: Path | None, latex: Path | None) -> None:
    page, values = out / "comparison.html", out / "values.parquet"
    found.page(page)
    found.to_parquet(values)
    also = [values, out / "results"]
    if csv is not None:
        make_folder(csv.parent)
        found.csv(csv)
        also.append(csv)
    if latex is not None:
        make_folder(latex.parent)
        found.latex(latex)
        also.append(latex)
    say(f"Open {page} in a browser. Also written: {', '.join(map(str, also))}.")


def _split(given: Sequence[str] | None) -> list[str] | None:
    names = [name.strip() for text in given or () for name in text.split(",") if name.strip()]
    return names or None


def _with_settings(
    methods: list[str] | None, metrics: list[str] | None, settings: dict[str, Any]
) -> tuple[list[Any] | None, list[Any] | None]:
    """Return methods and metrics with the settings that are theirs."""
    own: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        owner, dot, setting = name.rpartition(".")
        if not dot:
            raise SettingError(f"--set {name} names no method or metric. Write it as --set NAME.{name}=VALUE.")
        own.setdefault(owner, {})[setting] = value
    left = set(own) - set(methods or ()) - set(metrics or ())
    if left:
        (owner, *_) = sorted(left)
        kind = (
            "--metrics" if owner in registry.parts(METRICS) and owner not in registry.parts(EXPLAINERS) else "--methods"
        )
        raise SettingError(
            f"--set {owner}.{next(iter(own[owner]))} is for {owner}, which is not compared. Name it in {kind}."
        )
    made = [
        None if names is None else [{"name": name, **own[name]} if name in own else name for name in names]
        for names in (methods, metrics)
    ]
    return made[0], made[1]


def _units(run: str) -> str | None:
    """Return the units that a run's masks were trained with; None for a function, which comes with the model."""
    found = settings_of(Path(run))["settings"].get("units")
    return None if found == "function" else found
