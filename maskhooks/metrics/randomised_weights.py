"""Metrics of explanations of a model whose weights are random: what does not change does not explain the model."""

from __future__ import annotations

from typing import Literal

import numpy as np

from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.metrics.agreement import Spearman
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.explaining import made
from maskhooks.metrics.random_weights import RandomWeights
from maskhooks.model.task import device_of, move
from maskhooks.settings.types import Count, Seed


class RandomisedWeights(Spearman):
    """Spearman's rank correlation of the scores with those of the model with random weights; lower is better.

    In [-1, 1] (Adebayo et al. 2018). Scores that depend on what the model has learned have values near 0; scores that
    depend on the example and the architecture alone have 1. A low value is necessary for a good explanation, and does
    not suffice: noise has it too. Look at both settings of `absolute`: integrated gradients, for one, keep their order
    by absolute value while the signed one is lost. Not defined if all scores of one explanation are equal.

    An explainer that explains the predicted class explains what the random model predicts; one with a target does not.
    Where Adebayo et al. call the model's own initialiser, weights are normal noise of the scale that they had; see
    `RandomWeights`. The model comes back bit for bit. A fitted explainer knows the trained model, so it must be given
    as a function that makes and fits it: `judge(..., explainer=lambda hooked: DiffMask(hooked).fit(train))`.

    Args:
        layers: "all": all weights are random; "top-down": layer by layer from the output, and the value is the mean
            over steps.
        steps: with "top-down", in how many steps of about as many layers. After the last all weights are random.
        draws: over how many random models the value is a mean. All examples share them, so an interval over examples
            does not say how far other models would differ: with few positions or words take several.
        absolute: as `Metric` takes it.
        seed: the random seed of the weights.
    """

    name = "randomised-weights"
    better = "lower"
    source = "Adebayo et al. 2018"
    needs = frozenset({"hooked", "explainer"})

    def __init__(
        self,
        *,
        layers: Literal["all", "top-down"] = "all",
        steps: Count = 4,
        draws: Count = 1,
        absolute: bool = False,
        seed: Seed = 0,
    ) -> None:
        super().__init__(absolute=absolute)
        self.layers, self.steps, self.draws, self.seed = layers, steps, draws, seed

    def __call__(self, evidence: Evidence) -> Floats:
        key = (self.name, self.layers, self.steps, self.draws, self.seed)
        if key not in evidence.memory:
            evidence.memory[key] = self._explained(evidence)
        return super().__call__(evidence.against(evidence.memory[key]))

    def _explained(self, evidence: Evidence) -> list[Explanation]:
        """Return an explanation of the model after each step of each draw."""
        hooked, explainer = evidence.hooked, evidence.explainer
        assert hooked is not None
        assert explainer is not None
        if not callable(explainer) and explainer.fitted:
            raise SettingError(
                f"the explainer {explainer.name!r} was fitted to the trained model, and would say nothing of random "
                "weights. Give a function that makes and fits it, which runs again for these: "
                "explainer=lambda hooked: maskhooks.DiffMask(hooked, ...).fit(train)"
            )
        weights = RandomWeights(hooked, move(evidence.batches[0], device_of(hooked.model)), self.seed)
        numbers = np.arange(len(weights.layers))
        steps = np.array_split(numbers, min(self.steps, len(numbers)) if self.layers == "top-down" else 1)
        found = []
        for draw in range(self.draws):
            with weights.kept():
                for step in steps:
                    for number in step:
                        weights.randomise(int(number), draw)
                    again = made(explainer, hooked)
                    found.append(again.explain_all(evidence.batches, start_index=evidence.start_index))
        return found
