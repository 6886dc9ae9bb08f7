"""Synthetic tasks whose true explanation is known."""
