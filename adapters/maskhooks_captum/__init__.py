"""Captum for maskhooks: Captum's methods as explainers at any site, and our explainers as Captum's attributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskhooks_captum.attributions import LayerMaskAttribution, MaskAttribution
    from maskhooks_captum.prompts import PromptMaskAttribution

__all__ = ["LayerMaskAttribution", "MaskAttribution", "PromptMaskAttribution"]


def __getattr__(name: str) -> Any:
    """Import captum only when one of its subclasses is asked for: discovering plugins imports this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maskhooks_captum.explainer import library

    library(name)
    from maskhooks_captum import attributions, prompts

    return getattr(prompts if name == "PromptMaskAttribution" else attributions, name)
