"""Summarises the results of `coverage.py`, as figures per task and as a table of types by kind of site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = ("input", "hidden", "head", "mlp")
_ABOUT = """# Kinds of sites by model type

Written by `python benchmarks/coverage.py --from RESULTS ... --matrix FILE`; [what was tried](coverage.md).
`tasks`: the number of tasks that the type was tried for; a kind of site counts if it was found for any of them.
`bypassed`: information bypasses a hidden state, such as a decoder's, by cross-attention.
"""


def summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One task's figures; types that cannot be built do not count."""
    built = {kind: one for kind, one in results.items() if "not_buildable" not in one}
    attend = {kind: one for kind, one in built.items() if one["attends"]}
    return {
        "ok": sum(one["ok"] for one in built.values()),
        "total": len(built),
        "failures": {kind: one["reason"] for kind, one in built.items() if not one["ok"]},
        "kinds": {name: sum(name in one["kinds"] for one in built.values()) for name in KINDS},
        "bypassed": [kind for kind, one in built.items() if one["bypassed"]],
        "not_buildable": {kind: one["not_buildable"] for kind, one in results.items() if "not_buildable" in one},
        "softmax_attention": {
            "total": len(attend),
            "head": sum("head" in one["kinds"] for one in attend.values()),
            "without": [kind for kind, one in attend.items() if "head" not in one["kinds"]],
        },
    }


def matrix(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A Markdown page with a table of model types by kind of site, over all tasks."""
    rows: dict[str, dict[str, Any]] = {}
    for of_task in results.values():
        for kind, one in of_task.items():
            row = rows.setdefault(kind, {"tasks": 0, "sites": set(), "ok": True, "bypassed": False, "attends": False})
            if "not_buildable" in one:
                continue
            row["tasks"] += 1
            row["ok"] &= one["ok"]
            row["bypassed"] |= bool(one["bypassed"])
            row["attends"] |= one["attends"]
            row["sites"].update(one["kinds"])
    heading = ["type", "tasks", *KINDS, "bypassed", "all checks"]
    lines = [_ABOUT, f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}"]
    for kind, row in sorted(rows.items()):
        if not row["tasks"]:
            continue
        missing = {"head": "no" if row["attends"] else "no attention"}
        sites = ["yes" if name in row["sites"] else missing.get(name, "no") for name in KINDS]
        cells = [kind, str(row["tasks"]), *sites, "yes" if row["bypassed"] else "no", "yes" if row["ok"] else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
