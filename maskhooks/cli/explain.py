"""`maskhooks explain`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from maskhooks.cli.console import say, say_table, tell
from maskhooks.cli.folder import make_folder
from maskhooks.cli.job import Job
from maskhooks.cli.options import (
    BatchSize,
    Data,
    Device,
    LabelColumn,
    MaxLength,
    Model,
    SecondColumn,
    TextColumn,
    Units,
    parsed,
)
from maskhooks.cli.workers import devices_of, share
from maskhooks.data.records import Columns
from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.score_labels import P_KEPT, score_label
from maskhooks.explanations.shards import MANIFEST, Shards, remove
from maskhooks.progress import counter

_LARGE = "Large data"
_INTERRUPTED = 130  # the shells' exit code for Ctrl-C


def explain(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A folder that fit wrote, or the name of an explainer that needs no training: erasure, beam, "
            "leave-one-out, attention, rollout, reinforce, random, or one of Captum such as integrated-gradients.",
            show_default=False,
        ),
    ],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the explanation.", show_default=False)],
    data: Data = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Explain only the first examples, this many.", rich_help_panel="Data"),
    ] = None,
    text_column: TextColumn = "text",
    second_column: SecondColumn = None,
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    units: Units = None,
    max_examples: Annotated[int, typer.Option(min=1, help="Examples on the page.")] = 100,
    plots: Annotated[int, typer.Option(min=0, help="Examples to plot.")] = 3,
    device: Device = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Share the work among this many processes, each on its own GPU or all on the CPU; or name the device "
            "of each process, such as cuda:0,cuda:1.",
            rich_help_panel=_LARGE,
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Do one shard of the work, such as 0/4, while other machines do 1/4, 2/4 and 3/4 into the same --out.",
            rich_help_panel=_LARGE,
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the explainer that RUN names, such as sites=input or max_positions=30. May be repeated; "
            "`maskhooks settings NAME` lists them.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the rows in --out.", rich_help_panel=_LARGE)
    ] = False,
) -> None:
    """Explain data: which positions does each prediction need, depth by depth?

    Writes explanation.parquet (a folder with all rows), explanation.html (the first examples, with a depth slider)
    and plots. Data may have any size. If the command is stopped, the same command resumes.

    Examples:

    - `maskhooks explain run bert-base-uncased-sst5 --data dev.txt --out explained`
    - `maskhooks explain run my_package.networks:make --out explained`
    - `maskhooks explain run my_folder/my_model --data reviews.parquet --out explained --devices 4`
    - `maskhooks explain erasure my_package.networks:make --out erased --set max_positions=20 --set max_sets=1000000`
    - `maskhooks explain rollout bert-base-uncased-sst5 --data dev.txt --out attended --set queries=cls`
    """
    make_folder(out)
    columns = Columns(text_column, second_column, label_column)
    rows = out / "explanation.parquet"
    job = Job(run, model, rows, data, limit, columns, batch_size, max_length, parsed(settings), units)
    try:
        shards = _work(job, device, devices, shard, overwrite)
    except KeyboardInterrupt:
        tell("stopped", f"{_there(job.rows)} Run the same command again to resume.", "yellow")
        raise typer.Exit(_INTERRUPTED) from None
    if not shards.complete:
        say(f"Shard {shard} is done. The last shard to finish writes the page. So far: {_there(job.rows)}")
        return
    files = [*show(_first(shards, max(max_examples, plots)), out, max_examples, plots), job.rows]
    label = score_label(shards.settings["explainer"])
    mean, table = ("mean kept", "Fraction kept") if label == P_KEPT else (f"mean {label}", label.capitalize())
    means = [
        {"masked": site, "depth": str(depth), mean: f"{kept:.1%}"} for (site, depth), kept in shards.mean_kept().items()
    ]
    say_table(means, f"{table} on average over {shards.examples} examples")
    say(f"Open {files[0]} in a browser. Also written: {', '.join(map(str, files[1:]))}.")


def show(explanation: Explanation, out: Path, max_examples: int, plots: int) -> list[Path]:
    """Write the page and the plots into a folder; return their paths, the page's first.

    Args:
        max_examples: examples on the page.
        plots: examples to plot.
    """
    numbers = sorted(set(explanation["example"].tolist()))
    page = out / "explanation.html"
    pictures = [out / f"example-{number}.png" for number in numbers[:plots]]
    explanation.select(example=numbers[:max_examples], valid=None).to_html(page)
    for number, picture in zip(numbers, pictures, strict=False):
        explanation.plot(number).savefig(picture, dpi=150)
    return [page, *pictures]


def _work(job: Job, device: str | None, devices: str | None, shard: str | None, overwrite: bool) -> Shards:
    """Explain what is missing, in this process or in several."""
    if shard is not None and (devices is not None or overwrite):
        other = "--devices" if devices is not None else "--overwrite"
        raise SettingError(
            f"--shard and {other} exclude each other: a shard is one process, and keeps the rows of the others"
        )
    places = [] if devices is None else devices_of(devices, device)
    total = job.total()
    if len(places) < 2:
        return job.work(places[0] if places else device, _shard(shard), total=total, overwrite=overwrite)
    if overwrite:
        remove(job.rows)
    with counter("explaining", total, _examples(job.rows)) as advance:
        share(job, places, advance)
    return Shards(job.rows)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise SettingError(f"--shard {text} is not a shard. Give its index and the number of shards, from 0/4 to 3/4.")
    return int(found[1]), int(found[2])


def _first(shards: Shards, count: int) -> Explanation:
    return Explanation.from_parquet(shards.folder, example=range(min(count, shards.examples)))


def _examples(rows: Path) -> int:
    return Shards(rows).examples if (rows / MANIFEST).exists() else 0


def _there(rows: Path) -> str:
    files = len(Shards(rows)) if (rows / MANIFEST).exists() else 0
    return f"{rows} holds {files} complete files with {_examples(rows)} examples."
