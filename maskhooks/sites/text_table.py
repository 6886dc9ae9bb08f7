"""Text tables: rows with the same keys, for the terminal and for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

Rows = Sequence[Mapping[str, str]]


def text(rows: Rows) -> str:
    """Return aligned columns under their names; empty columns are left out."""
    columns = [name for name in (rows[0] if rows else {}) if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    lines = [{name: name for name in columns}, *rows]
    return "\n".join("  ".join(line[name].ljust(widths[name]) for name in columns).rstrip() for line in lines)


def markup(rows: Rows) -> str:
    """Return an HTML table, with all text escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (rows[0] if rows else {}))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
