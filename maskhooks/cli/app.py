"""The application: its commands, and the options before them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from maskhooks.cli.compare import compare
from maskhooks.cli.console import reporting, say
from maskhooks.cli.demo import demo
from maskhooks.cli.doctor import doctor
from maskhooks.cli.explain import explain
from maskhooks.cli.fit import fit
from maskhooks.cli.plugins import plugins
from maskhooks.cli.report import report
from maskhooks.cli.settings import settings
from maskhooks.cli.sites import sites


class _Commands(TyperGroup):
    """Commands that print each maskhooks error and warning in one line."""

    def invoke(self, ctx: Any) -> Any:
        with reporting(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # in the order a newcomer uses them


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, sites, doctor, fit, explain, compare, report, plugins, settings):
    app.command()(command)


def _version(wanted: bool) -> bool:
    if wanted:
        say(f"maskhooks {version('maskhooks')}")
        raise typer.Exit
    return wanted


@app.callback(epilog="Start with `maskhooks demo`: it takes a minute and downloads nothing.")
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show errors with their traceback.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Learn which inputs and hidden states the predictions of a PyTorch model need."""


def main() -> None:
    """Run the command `maskhooks`."""
    app(prog_name="maskhooks")
