"""What holds for all commands: help, version, errors and warnings in one line, light imports."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from maskhooks.cli.console import reporting, say_table
from maskhooks.errors import MarginWarning, SettingError
from maskhooks.plugins.registry import PluginReport, registry

Run = Callable[..., Result]
COMMANDS = ["demo", "sites", "doctor", "fit", "explain", "plugins"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: maskhooks {command}" in result.stdout or f"Usage: root {command}" in result.stdout
    takes_model = command not in ("demo", "plugins")
    assert (f"maskhooks {command} " in result.stdout) == takes_model  # an example to copy
    assert "[cyan]" not in result.stdout


def test_help_lists_the_commands(run: Run) -> None:
    for result in (run(), run("--help"), run("-h")):
        found = re.findall(r"^│ (\w+) ", result.stdout, re.MULTILINE)
        assert [name for name in found if name in COMMANDS] == COMMANDS


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"maskhooks {version('maskhooks')}\n"


def test_module_is_the_command_too_and_imports_little() -> None:
    heavy = ("transformers", "pandas", "matplotlib", "lightning", "pyarrow", "datasets", "jinja2")
    code = (
        "import runpy, sys\n"
        "sys.argv = ['maskhooks', '--help']\n"
        "try:\n    runpy.run_module('maskhooks', run_name='__main__')\n"
        f"finally:\n    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: maskhooks [OPTIONS] COMMAND" in found.stdout
    assert found.stderr.strip().endswith("[]")


def test_error_is_one_line_and_exit_code_2(run: Run) -> None:
    result = run("sites", "./no_such_folder")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: no source knows how to open the model './no_such_folder'. Give ")
    assert result.stderr.count("\n") == 1


def test_debug_lets_the_error_through(run: Run) -> None:
    result = run("--debug", "sites", "./no_such_folder")
    assert type(result.exception).__name__ == "PluginError"


def test_errors_of_others_keep_their_traceback(run: Run, network: str) -> None:
    result = run("sites", f"{network}:fails")
    assert isinstance(result.exception, ModuleNotFoundError)


def test_unknown_option_and_missing_argument(run: Run) -> None:
    assert run("fit").exit_code == 2
    assert run("sites", "gpt2", "--no-such-option").exit_code == 2


def _reported(function: Callable[[], Any]) -> Result:
    """A command of one function, run with and without colours."""
    app = typer.Typer()

    @app.command()
    def command() -> None:
        with reporting():
            function()

    return CliRunner().invoke(app, [])


def test_warnings_of_maskhooks_are_one_line_and_others_are_dropped() -> None:
    def warn() -> None:
        warnings.warn("no checkpoint\nwithin the margin", MarginWarning, stacklevel=1)
        warnings.warn("use the other function", DeprecationWarning, stacklevel=1)
        print("done")

    shown = warnings.showwarning
    result = _reported(warn)
    assert result.exit_code == 0
    assert result.stdout == "done\n"
    assert result.stderr == "warning: no checkpoint within the margin\n"
    assert warnings.showwarning is shown


def test_error_text_is_taken_literally() -> None:
    def fail() -> None:
        raise SettingError("no site 'rnn:output[1]' or [bold]x[/]")

    result = _reported(fail)
    assert result.exit_code == 2
    assert result.stderr == "error: no site 'rnn:output[1]' or [bold]x[/]\n"


def test_table_leaves_empty_columns_out_and_folds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    long = "encoder.layer.0:output[1]" * 8
    say_table([{"site": long, "empty": "", "calls": "1"}, {"site": "[red]x", "empty": "", "calls": "2"}])
    printed = capsys.readouterr().out
    assert long in printed
    assert "[red]x" in printed
    assert "empty" not in printed


# plugins


def test_plugins(run: Run) -> None:
    result = run("plugins")
    assert result.exit_code == 0
    package = rf"maskhooks {re.escape(version('maskhooks'))}"
    parts = {(kind.name, name) for kind in registry.kinds() if not kind.listed for name in registry.parts(kind)}
    for kind, name in parts:
        assert re.search(rf"^ *{kind} +{re.escape(name)} +{package} +\w", result.stdout, re.MULTILINE), (kind, name)
    assert "failed" not in result.stdout


def test_plugins_that_failed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load()
    broken = PluginReport("broken", "third-party", "2.0", [], "ImportError: no module named 'nothing'")
    monkeypatch.setattr(registry, "reports", [*registry.reports, broken])
    result = run("plugins")
    assert result.exit_code == 0
    assert re.search(r"broken +third-party 2\.0 +ImportError: no module named 'nothing'", result.stdout)
    assert f"1 of {len(registry.reports)} plugins could not be loaded" in result.stdout
