"""`maskhooks settings`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from maskhooks.cli.console import say, say_table
from maskhooks.errors import UnknownNameError, close_matches
from maskhooks.plugins.kind import Kind
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import REQUIRED, Schema, schema_of, summary


def settings(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="An explainer such as diffmask, a recipe such as language, or any other part that `maskhooks plugins` "
            "lists.",
            show_default=False,
        ),
    ],
) -> None:
    """List the settings of an explainer, a recipe or another part: type, range, default and meaning.

    `maskhooks fit` and `maskhooks explain` take the settings of an explainer as `--set NAME=VALUE`.

    Examples:

    - `maskhooks settings diffmask`
    - `maskhooks settings language`
    - `maskhooks settings hard-concrete`
    """
    found = [(kind, registry.parts(kind)[name]) for kind in registry.kinds() if not kind.listed and _has(kind, name)]
    if not found:
        known = [other for kind in registry.kinds() if not kind.listed for other in registry.parts(kind)]
        raise UnknownNameError(
            f"no part is named {name!r}. `maskhooks plugins` lists them.", near=close_matches(name, known)
        )
    for kind, part in found:
        say(f"{kind.name} {name}: {getattr(part, 'description', '') or summary(part)}")
        schema = schema_of(type(part)) if kind.made and not callable(part) else schema_of(part)
        if kind.name == "divergence":
            say("It has no settings.")
        else:
            say_table(_rows(schema, part if kind.made else None), f"Settings of {name}")


def _has(kind: Kind[Any], name: str) -> bool:
    return name in registry.parts(kind)


def _rows(schema: Schema, made: object | None) -> list[dict[str, str]]:
    return [
        {
            "setting": setting.name,
            "value": setting.words,
            "default": _default(setting.default if made is None else getattr(made, setting.name)),
            "meaning": setting.description,
        }
        for setting in schema.values()
    ]


def _default(value: object) -> str:
    return "(required)" if value is REQUIRED else repr(value)
