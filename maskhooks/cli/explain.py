"""`maskhooks explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskhooks.cli.console import say, say_table
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
    TextColumn,
)
from maskhooks.explanation import Explanation
from maskhooks.records import Columns
from maskhooks.storage import load


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that fit wrote.", show_default=False)],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the explanation.", show_default=False)],
    data: Data = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Examples explained at most, from the first.", rich_help_panel="Data"),
    ] = None,
    text_column: TextColumn = "text",
    second_column: SecondColumn = None,
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    shown: Annotated[int, typer.Option(min=1, help="Examples on the page.")] = 100,
    plots: Annotated[int, typer.Option(min=0, help="Examples that are plotted.")] = 3,
    device: Device = None,
) -> None:
    """Explain data with trained masks: which positions does each prediction need, depth by depth?

    Writes explanation.parquet (all rows), explanation.html (the first examples, with a slider for the depth)
    and plots.

    Examples:

    - `maskhooks explain run bert-base-uncased-sst5 --data dev.txt --out explained`
    - `maskhooks explain run my_package.networks:make --out explained`
    """
    make_folder(out)
    columns = Columns(text_column, second_column, label_column)
    material = Material.of(model, device, max_length, columns=columns, batch_size=batch_size)
    explainer = load(run, material.hooked)
    explanation = explainer.explain_all(material.for_explaining(data, limit))
    files = write(explanation, out, shown, plots)
    rows = [
        {"masked": site, "depth": str(depth), "mean kept": f"{kept:.1%}"}
        for (site, depth), kept in explanation.mean_kept().items()
    ]
    say_table(rows, f"Fraction kept on average over {len(set(explanation['example'].tolist()))} examples")
    say(f"Open {files[0]} in a browser. Written too: {', '.join(map(str, files[1:]))}.")


def write(explanation: Explanation, out: Path, shown: int, plots: int) -> list[Path]:
    """Writes page, table and plots into a folder; gives their paths, in this order.

    Args:
        shown: examples on the page.
        plots: examples that are plotted.
    """
    numbers = sorted(set(explanation["example"].tolist()))
    page, table = out / "explanation.html", out / "explanation.parquet"
    pictures = [out / f"example-{number}.png" for number in numbers[:plots]]
    explanation.select(example=numbers[:shown], real=None).to_html(page)
    explanation.to_parquet(table)
    for number, picture in zip(numbers, pictures, strict=False):
        explanation.plot(number).savefig(picture, dpi=150)
    return [page, table, *pictures]
