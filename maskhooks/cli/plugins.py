"""`maskhooks plugins`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from maskhooks.cli.console import say, say_table
from maskhooks.errors import PluginWarning
from maskhooks.plugins.registry import registry


def plugins() -> None:
    """List the plugins that were found, what each offers, and what failed and why.

    A package offers a plugin with an entry point in the group `maskhooks`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the table has them
        registry.load()
    rows = [
        {
            "plugin": report.name,
            "distribution": report.distribution,
            "version": report.version,
            "offers": _grouped(report.offers),
            "failed": report.error,
        }
        for report in registry.reports
    ]
    say_table(rows, "Plugins", alarm=lambda row: bool(row["failed"]))
    failed = sum(bool(report.error) for report in registry.reports)
    if failed:
        say(f"{failed} of {len(rows)} could not be loaded; the others work all the same.")


def _grouped(offers: Sequence[str]) -> str:
    """Parts such as "gate bernoulli", a line for each kind."""
    kinds: dict[str, list[str]] = {}
    for offer in offers:
        kind, _, name = offer.partition(" ")
        kinds.setdefault(kind, []).append(name)
    return "\n".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
