"""REINFORCE (Williams 1992) on the same masks as DiffMask's: gradients from samples alone, not through the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskhooks.errors import SettingError
from maskhooks.explainers.diffmask import DiffMask
from maskhooks.masks.baselines import Baseline
from maskhooks.masks.gates import Gate
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Divergence, kl
from maskhooks.sites.site import Selector
from maskhooks.training.per_example import Estimate, ScoreFunction
from maskhooks.training.recipe import Recipe


class Reinforce(DiffMask):
    """Free logits of Bernoulli gates for each batch, learned by REINFORCE instead of through the model.

    The problem is that of `DiffMask(amortized=False)`, with a multiplier for each example, and so are its settings. The
    gradient of the expected penalty P is that of (P - b) log p(z), with the moving average of an example's penalties as
    its baseline b; the sparsity's is exact (De Cao et al. 2020, section 3.2, compare with this). The model is run
    without gradients, so that a part of it that has none is no obstacle.

    Args:
        hooked: the wrapped model.
        sites: what to mask, each site by itself: a tag, an address, a glob, a Site, or several of these.
        margin: the divergence allowed, in nats.
        memory: of the moving average, the weight of what was before each step.
        gate: a registered name or a `Gate` with a log-probability.
        baseline: what a closed gate lets through; a learned one is learned in `fit`.
        divergence: of original and masked outputs, in nats per example.
        amortized: False; nothing else is there.
        recipe: a `Recipe`, or the name of one; "subset" is made for this.
        seed: of all random numbers.

    Raises:
        SettingError: a setting is out of range.
        UnknownSiteError, PatternError: as with `DiffMask`.
    """

    name = "reinforce"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        margin: float = 0.1,
        memory: float = 0.9,
        gate: str | Gate = "bernoulli",
        baseline: str | Baseline | None = None,
        divergence: Divergence = kl,
        amortized: bool = False,
        recipe: str | Recipe = "stable",
        seed: int = 0,
    ) -> None:
        if amortized:
            raise SettingError("REINFORCE learns free logits for each batch: leave out amortized=True, or use DiffMask")
        if not 0 <= memory < 1:
            raise SettingError(f"the memory of a moving average is a weight from 0 and below 1, got {memory!r}")
        self.memory = memory
        super().__init__(
            hooked,
            sites,
            margin=margin,
            gate=gate,
            baseline=baseline,
            divergence=divergence,
            amortized=False,
            recipe=recipe,
            seed=seed,
        )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "memory": self.memory}

    def _estimator(self) -> Estimate:
        return ScoreFunction(self.memory)

    @classmethod
    def _own(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"memory": settings["memory"]}
