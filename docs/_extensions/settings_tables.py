"""The directive `settings`: tables of the settings of all our parts of a kind, from the schema that checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from maskhooks.plugins.kind import Kind
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import REQUIRED, schema_of, summary

_SUPPLIED = ("margin", "params")  # of an objective and an optimizer: the explainer gives them


class Settings(SphinxDirective):
    """`{settings} explainer` lists every explainer with its settings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        kind = next(kind for kind in registry.kinds() if kind.name == self.arguments[0])
        parts = dict(sorted(registry.parts(kind).items()))
        if kind.made and all(hasattr(part, "__dataclass_fields__") for part in parts.values()):
            return self.parse_text_to_nodes(_compared(parts))
        found: list[nodes.Node] = []
        for name, part in parts.items():
            section = nodes.section(ids=[f"{kind.name}-{name}"], names=[f"{kind.name}-{name}"])
            section += nodes.title("", name)
            section += self.parse_text_to_nodes(_text(kind, part))
            found.append(section)
        return found


def _text(kind: Kind[Any], part: Any) -> str:
    about = summary(part).removeprefix("Return ")
    rows = [] if kind.made else [row for row in schema_of(part).values() if row.name not in _SUPPLIED]
    cells = [
        (f"`{row.name}`", row.words, "required" if row.default is REQUIRED else f"`{row.default!r}`", row.description)
        for row in rows
    ]
    return f"{about}\n\n{_table(('setting', 'value', 'default', 'meaning'), cells)}" if cells else about


def _compared(parts: Mapping[str, Any]) -> str:
    """One table of parts with the same settings, a column each."""
    about = "\n".join(f"- **{name}**: {part.description}" for name, part in parts.items())
    schema = schema_of(type(next(iter(parts.values()))))
    cells = [
        (f"`{row.name}`", row.words, *(f"`{getattr(part, row.name)!r}`" for part in parts.values()), row.description)
        for row in schema.values()
        if row.name not in ("name", "description")
    ]
    return f"{about}\n\n{_table(('setting', 'value', *parts, 'meaning'), cells)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}
