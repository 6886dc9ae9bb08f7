"""Tiny transformers, built from configurations without any download, and batches for them."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import jaxtyping

_shapes = jaxtyping.install_import_hook(["maskhooks_captum", "maskhooks_transformers"], "beartype.beartype")
