"""`maskhooks report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskhooks.cli.console import say
from maskhooks.cli.folder import make_folder
from maskhooks.errors import SettingError, StorageError
from maskhooks.reports.run_page import is_run, rows_at
from maskhooks.reports.run_page import report as write


def report(
    given: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|EXPLAINED",
            help="The folder that fit wrote; the folder that explain wrote, or Parquet files; or both, in any order.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="File of the page.")] = Path("report.html"),
    max_examples: Annotated[int, typer.Option(min=1, help="Examples on the page.")] = 100,
    min_count: Annotated[int, typer.Option(min=1, help="Tokens that occur less often get no bar.")] = 5,
    title: Annotated[str | None, typer.Option(help="Heading of the page.", show_default=False)] = None,
) -> None:
    """Make one page about a training run, about what its masks keep, or about both.

    The page has curves of divergence, fraction kept and multiplier; what is kept by depth, kind of token, token and
    class; and examples with a depth slider and a search. It is one file and works offline.

    Examples:

    - `maskhooks report run explained --out report.html`
    - `maskhooks report run`, also while the run is in progress
    - `maskhooks report explained/explanation.parquet --max-examples 500`
    """
    runs = [path for path in given if is_run(path)]
    explained = [path for path in given if rows_at(path) is not None]
    for path in given:
        if path not in runs and path not in explained:
            raise StorageError(
                f"{path} {'holds neither a run nor an explanation' if path.exists() else 'does not exist'}. Give a "
                f"folder that maskhooks fit or maskhooks explain wrote, or a Parquet file.",
                path=path,
            )
    if len(runs) > 1:
        raise SettingError(f"{' and '.join(map(str, runs))} are separate runs. Make one report for each.")
    make_folder(out.parent)
    text = write(
        runs[0] if runs else None, explained or None, out, max_examples=max_examples, min_count=min_count, title=title
    )
    told = " and ".join([*(["its training"] if runs else []), *(["what is kept"] if explained else [])])
    say(f"Open {out} in a browser: {told}, in one file of {len(text.encode()) / 1e3:,.0f} kB.")
