"""Importing is cheap and its names are in order."""

from __future__ import annotations

import sys

import maskhooks
from tests.fresh_process import printed_by

HEAVY = [
    "transformers",
    "lightning",
    "matplotlib",
    "pandas",
    "pyarrow",
    "jinja2",
    "torch_geometric",
    "transformer_lens",
    "captum",
    "typer",
]

SCRIPT = """
import sys, torch
import maskhooks
{use}
print(sorted(name for name in {heavy} if name in sys.modules))
"""


def loaded_by(use: str) -> str:
    """The heavy libraries that are loaded after `import maskhooks` and the lines in `use`, as Python prints a list."""
    return printed_by(SCRIPT.format(use=use, heavy=HEAVY))


def test_import_loads_nothing_heavy() -> None:
    assert loaded_by("") == "[]"


def test_plugin_discovery_loads_nothing_heavy() -> None:
    """Not even where models are wrapped and parts made: a plugin touches its library only if the user did."""
    use = (
        "from maskhooks.masks.gates import GATES\n"
        "from maskhooks.plugins.registry import registry\n"
        "registry.load()\n"
        "assert not [report.error for report in registry.reports if report.error], registry.reports\n"
        "hooked = maskhooks.wrap(torch.nn.Sequential(torch.nn.Linear(2, 2)), sites=['0:output'])\n"
        "with hooked.tap(read='0:output'): hooked(torch.zeros(1, 2))\n"
        "registry.make(GATES, 'hard-concrete')\n"
    )
    assert loaded_by(use) == "[]"


def test_public_names_are_sorted_and_there() -> None:
    assert maskhooks.__all__ == sorted(maskhooks.__all__, key=lambda name: (not name.isupper(), name))  # ruff's order
    assert len(set(maskhooks.__all__)) == len(maskhooks.__all__)
    for name in maskhooks.__all__:
        assert getattr(maskhooks, name) is not None
    code = f"from maskhooks import {', '.join(maskhooks.__all__)}"
    exec(code, {})


def test_nothing_public_is_left_out() -> None:
    """What stands in the package and is neither private nor a module is exported on purpose."""
    modules = {name for name in vars(maskhooks) if f"maskhooks.{name}" in sys.modules}
    public = {name for name in vars(maskhooks) if not name.startswith("_")} - modules
    assert public - {"annotations", "jaxtyping"} <= set(maskhooks.__all__)  # jaxtyping: the tests' import hook
