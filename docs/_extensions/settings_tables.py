"""The directive `settings`: tables of the settings of all our parts of a kind, from the schema that checks them."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from maskhooks.plugins.kind import Kind
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import REQUIRED, Schema, schema_of, summary


class Settings(SphinxDirective):
    """`{settings} explainer` lists every explainer with its settings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        kind = next(kind for kind in registry.kinds() if kind.name == self.arguments[0])
        found: list[nodes.Node] = []
        for name, part in sorted(registry.parts(kind).items()):
            section = nodes.section(ids=[f"{kind.name}-{name}"], names=[f"{kind.name}-{name}"])
            section += nodes.title("", name)
            section += self.parse_text_to_nodes(_text(kind, part))
            found.append(section)
        return found


def _text(kind: Kind[Any], part: Any) -> str:
    about = getattr(part, "description", "") or summary(part)
    if kind.made and not hasattr(part, "__dataclass_fields__"):
        return about
    schema = schema_of(type(part) if kind.made else part)
    made = part if kind.made else None
    return f"{about}\n\n{_table(schema, made)}" if schema else about


def _table(schema: Schema, made: Any) -> str:
    rows = ["| setting | value | default | meaning |", "|---|---|---|---|"]
    for setting in schema.values():
        default = setting.default if made is None else getattr(made, setting.name)
        cells = ("required" if default is REQUIRED else f"`{default!r}`", _cell(setting.description))
        rows.append(f"| `{setting.name}` | {_cell(setting.words)} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}
