"""Arguments and options that several commands share, each explained once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from maskhooks.errors import SettingError
from maskhooks.settings.schema import schema_of


def parsed(given: list[str] | None) -> dict[str, Any]:
    """Return the settings of `NAME=VALUE` texts; a value is JSON if possible, else a string."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"--set {text} has no value. Write it as --set {name}=VALUE.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def setting_help(name: str, *owners: Callable[..., Any]) -> str:
    """Return the help of an option, from the schema: what the setting means, and its default for each explainer."""
    settings = [schema_of(owner)[name] for owner in owners]
    text = settings[0].description
    defaults: dict[str, list[str]] = {}
    for owner, setting in zip(owners, settings, strict=True):
        if setting.default is not None:
            defaults.setdefault(str(setting.default), []).append(getattr(owner, "name", owner.__name__))
    if len(defaults) == 1:
        text += f" Default: {next(iter(defaults))}."
    elif defaults:
        text += " Default: " + "; ".join(f"{value} for {', '.join(names)}" for value, names in defaults.items()) + "."
    return text[0].upper() + text[1:]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder or hub id of a transformers model; or, for any network, package.module:factory, a function "
        "that returns a Hooked or a module, alone or with training and validation batches.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="A file: SST trees (.txt), .csv, .tsv, .jsonl or .parquet; or a dataset with its split, such as "
        "sst2:validation. A factory may return its own batches instead.",
        show_default=False,
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column of texts.", rich_help_panel="Data")]
SecondColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of second texts, for pairs such as question and context, or prompt and continuation.",
        rich_help_panel="Data",
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="Column of labels; by default 'label', if there is one.", rich_help_panel="Data"),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples in a batch.", rich_help_panel="Data")]
MaxLength = Annotated[
    int, typer.Option(help="Maximum number of tokens of a text; longer texts are truncated.", rich_help_panel="Data")
]
Units = Annotated[
    str | None,
    typer.Option(
        help="Positions that share a gate. words: the pieces of a word, as the tokenizer marks them; undirected: both "
        "directions of an edge. By default each position has its own gate, and trained masks use the units they were "
        "trained with.",
        rich_help_panel="Data",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Device of the model, such as cpu or cuda:1; by default a CUDA GPU, if there is one."),
]
Seed = Annotated[int, typer.Option(min=0, help="The random seed.")]
