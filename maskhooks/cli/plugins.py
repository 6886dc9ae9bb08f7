"""`maskhooks plugins`."""

from __future__ import annotations

import warnings

from maskhooks.cli.console import say, say_table
from maskhooks.errors import PluginWarning
from maskhooks.plugins.registry import OURS, registry


def plugins() -> None:
    """List every registered part: its kind, name, package and what it does; and plugins that failed to load.

    A package offers a plugin by an entry point in the group `maskhooks`. `maskhooks settings NAME` lists the
    settings of a part.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the second table lists them
        registry.load()
    kinds = [kind.name for kind in registry.kinds()]
    parts = [
        {"kind": offer.kind, "name": offer.name, "package": report.package, "what it does": offer.line}
        for report in registry.reports
        for offer in report.offers
    ]
    say_table(
        sorted(parts, key=lambda row: (kinds.index(row["kind"]), not row["package"].startswith(f"{OURS} "))),
        "Registered parts",
    )
    failed = [
        {"plugin": one.name, "package": one.package, "failed": one.error} for one in registry.reports if one.error
    ]
    if failed:
        say_table(failed, "Plugins that could not be loaded", alarm=lambda row: True)
        say(f"{len(failed)} of {len(registry.reports)} plugins could not be loaded; the others work.")
