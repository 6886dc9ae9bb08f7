"""Sanity: do scores depend on what the model has learned?"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.hooks.preserved import preserved
from maskhooks.metrics import ranking
from maskhooks.metrics.evidence import Evidence, Explains, Floats
from maskhooks.metrics.metric import Metric
from maskhooks.seeds import seeded
from maskhooks.settings.types import Seed

_WEIGHTS = 430  # the purpose of random numbers


class RandomisedWeights(Metric):
    """Spearman's correlation of scores with those of the model with random weights, in [-1, 1]; lower is better.

    Weights are drawn anew from the output down: those of the last share of all modules that have weights, by the
    modules' own `reset_parameters`, and others from a normal distribution with their mean and deviation. Scores that
    hardly change do not tell of what the model has learned. It is a necessary test, not a sufficient one: random scores
    pass it, and integrated gradients keep their absolute rank where the signed one falls to 0.

    Adebayo et al. 2018, with its cascading order; there are no thresholds. Not defined if all scores of an example are
    equal. Statistics and baselines of the explainer are fitted anew, on the batches that are judged; masks that were
    trained in advance are refused.

    Args:
        share: the share of modules with weights that are randomised, the last ones first; 1 is all.
        absolute: as `Metric` takes it.
        seed: the random seed of the weights.
    """

    name = "randomised-weights"
    better = "lower"
    range = (-1.0, 1.0)
    unit = "correlation"
    source = "Adebayo et al. 2018"
    needs = frozenset({"hooked", "explainer"})

    def __init__(self, *, share: Annotated[float, Gt(0), Le(1)] = 1.0, absolute: bool = False, seed: Seed = 0) -> None:
        super().__init__(absolute=absolute)
        self.share, self.seed = share, seed

    def __call__(self, evidence: Evidence) -> Floats:
        assert evidence.explainer is not None
        assert evidence.hooked is not None
        if evidence.explainer.hooked.model is not evidence.hooked.model:
            raise SettingError("explainer is of another model than hooked. Give the explainer of the same model")
        with randomised(evidence.explainer.hooked.model, self.share, self.seed):
            other = _explained(evidence.explainer, evidence.batches, evidence.start_index)
        both = evidence.beside([other])
        pairs = zip(both.scores(absolute=self.absolute), both.other_scores(absolute=self.absolute)[0], strict=True)
        return np.array([ranking.spearman(*pair) for pair in pairs], np.float64)


@contextlib.contextmanager
def randomised(model: nn.Module, share: float = 1.0, seed: int = 0) -> Iterator[None]:
    """Give the last modules of a model random weights; afterwards all are as they were, bit for bit.

    Args:
        share: the share of modules with weights, rounded up.
        seed: the random seed.
    """
    weights = {id(weight): weight for weight in model.parameters()}
    before = [(weight, weight.detach().clone()) for weight in weights.values()]
    modules = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    try:
        with preserved(model), torch.no_grad():
            torch.manual_seed(seeded(seed, _WEIGHTS))
            for module in modules[len(modules) - math.ceil(share * len(modules)) :]:
                _draw(module)
            yield
    finally:
        with torch.no_grad():
            for weight, values in before:
                weight.copy_(values)


def _draw(module: nn.Module) -> None:
    reset: Any = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for weight in module.parameters(recurse=False):
        if weight.is_floating_point() and weight.numel():
            weight.normal_(weight.mean().item(), _deviation(weight))


def _deviation(weight: Tensor) -> float:
    return weight.std().item() if weight.numel() > 1 else 1.0


def _explained(explainer: Explains, batches: Sequence[Any], start_index: int) -> Explanation:
    """Explain the batches by a copy of the explainer, which learns from them what it needs to know of the model."""
    fresh: Any = copy.copy(explainer)
    if getattr(fresh, "fitted", False):
        if getattr(fresh, "amortized", False):
            raise SettingError(
                f"the masks of this {type(explainer).__name__} were trained in advance, on the weights that the model "
                "has, so they tell nothing of other weights. Judge one with amortized=False; or train another on a "
                "copy of the model with random weights, and compare: judge(explanation, 'spearman', others=[...])"
            )
        fresh.fit(batches, **({"progress": False} if hasattr(fresh, "amortized") else {}))
    parts: list[Explanation] = []
    for batch in batches:
        parts.append(fresh.explain(batch, start_index=start_index))
        numbers = [*parts[-1]["example"].tolist(), *parts[-1].metadata]
        start_index = max(numbers, default=start_index - 1) + 1
    return Explanation.concat(parts)
