"""The command line: `maskhooks demo`, `sites`, `doctor`, `fit`, `explain`, `plugins`."""

from maskhooks.cli.app import main

__all__ = ["main"]
