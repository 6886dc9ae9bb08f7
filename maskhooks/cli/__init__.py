"""The command line: `maskhooks demo`, `sites`, `doctor`, `fit`, `explain`, `report`, `plugins`, `settings`."""

from maskhooks.cli.app import main

__all__ = ["main"]
