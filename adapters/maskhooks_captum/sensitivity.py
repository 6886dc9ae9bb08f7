"""Sensitivity: how far scores move when the value that is explained moves a little."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.explaining import Explaining, made
from maskhooks.metrics.metric import Metric
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.seeds import generator
from maskhooks.settings.types import Count, Positive, Seed
from maskhooks.sites.site import Site
from maskhooks_captum.displaced import Displaced, displacing
from maskhooks_captum.explainer import library
from maskhooks_captum.layout import Layout

_NOISE = 331  # the purpose of random numbers


class SensitivityMax(Metric):
    """The largest relative change of scores under small noise, by Captum, from 0; lower is better.

    The largest norm of scores(x + noise) - scores(x) over the norm of scores(x), Euclidean over the positions of an
    example that count (Yeh et al. 2019, without the division), by `captum.metrics.sensitivity_max`. The noise is
    uniform in a box around the value at the explanation's own site, and the largest of some samples, so the value is a
    lower bound. Padding does not move; states of a recurrent network also move with those before them. Not defined for
    an example whose scores are all 0.

    Args:
        radius: half the width of the box.
        relative: whether `radius` is a share of the root mean square of the example's values at the site; otherwise it
            is in their units.
        samples: the number of samples.
        seed: the random seed of the noise. An explainer that samples keeps its own seed.

    Raises:
        MissingExtraError: captum is not installed.
    """

    name = "sensitivity-max"
    better = "lower"
    range = (0.0, math.inf)
    unit = "relative change"
    source = "Yeh et al. 2019; captum.metrics.sensitivity_max"
    needs = frozenset({"hooked", "explainer"})

    def __init__(self, *, radius: Positive = 0.02, relative: bool = True, samples: Count = 10, seed: Seed = 0) -> None:
        super().__init__()
        library(self.name)
        self.radius, self.relative, self.samples, self.seed = radius, relative, samples, seed

    def __call__(self, evidence: Evidence) -> Floats:
        assert evidence.hooked is not None
        assert evidence.explainer is not None
        explainer = made(evidence.explainer, evidence.hooked)
        hooked, first = explainer.hooked, evidence.start_index
        (site,) = hooked.required_sites(evidence.site)
        found = np.full(len(evidence.examples), np.nan)
        for batch in evidence.batches:
            clean = clean_pass(hooked, move(batch, device_of(hooked.model)), [site])
            around = _Around(clean, site, explainer, evidence, first)
            here = np.isin(around.examples, evidence.examples)
            if here.any():
                at = np.searchsorted(evidence.examples, around.examples[here])
                found[at] = self._measured(around).cpu().numpy()[here]
            first = int(around.examples[-1]) + 1
        evidence.check_reached(first)
        return found

    def _measured(self, around: _Around) -> Float[Tensor, " example"]:
        from captum.metrics import sensitivity_max

        drawn = iter(range(self.samples))
        scale = around.scale if self.relative else torch.ones_like(around.scale)

        def perturb(shift: Float[Tensor, "example element"], radius: float) -> Float[Tensor, "example element"]:
            return shift + radius * scale[:, None] * around.noise(self.seed, next(drawn)).to(scale)

        original: list[Tensor] = []

        def explain(given: Any) -> tuple[Tensor]:
            scores = around.scores(given[0] if isinstance(given, tuple) else given)
            original.append(scores) if not original else None
            return (scores,)

        found: Tensor = sensitivity_max(
            explain,
            torch.zeros_like(around.values),  # the value is the point around which all moves
            perturb_func=perturb,
            perturb_radius=self.radius,
            n_perturb_samples=self.samples,
            max_examples_per_batch=len(around.values),
        )
        return torch.where(original[0].any(1).to(found.device), found, math.nan)


class _Around:
    """The valid elements of a site's value, example by example, and the scores of values around it.

    Args:
        clean: the clean pass of a batch, which has read the site.
        site: the site.
        explainer: explains again.
        evidence: what is judged.
        first: the index of the batch's first example.

    Attributes:
        examples: the indices of the batch's examples.
        values: the elements of each example, in float64; 0 where it has no more.
        scale: the root mean square of each example's elements.
    """

    def __init__(self, clean: Clean, site: Site, explainer: Explaining, evidence: Evidence, first: int) -> None:
        layout = Layout(clean, site)
        self._site, self._explainer, self._evidence, self._first = site, explainer, evidence, first
        self._clean, self._value = clean, clean.values[site].detach()
        self._axis = None if layout.whole else site.gating().axes.index(site.gating().positions[:1])
        self.examples = np.arange(first, first + layout.examples)
        self._at = _elements(clean, site, layout, self._value)
        self._there = self._at >= 0
        self.values = torch.where(self._there, self._value.reshape(-1)[self._at.clamp(min=0)].double(), 0)
        squares = self.values.square().sum(1)
        self.scale = (squares / self._there.sum(1).clamp(min=1)).sqrt()

    def noise(self, seed: int, sample: int) -> Float[Tensor, "example element"]:
        """Return uniform noise in [-1, 1], the same for an example in any batch."""
        sizes = self._there.sum(1).tolist()
        draws = [
            2 * torch.rand(size, generator=generator(seed, _NOISE, int(number), sample)) - 1
            for number, size in zip(self.examples, sizes, strict=True)
        ]
        return pad_sequence(draws, batch_first=True)

    def scores(self, shift: Float[Tensor, "example element"]) -> Float[Tensor, "example position"]:
        """Return the scores at positions that count if this is added to the elements; 0 where there are no more."""
        flat = torch.zeros(self._value.numel(), dtype=shift.dtype, device=self._value.device)
        flat[self._at[self._there]] = shift[self._there]
        batch = Displaced(self._clean.batch, flat.view(self._value.shape).to(self._value))
        with displacing(self._explainer.hooked, self._site, self._axis), torch.enable_grad():
            found = self._explainer.explain(batch, start_index=self._first)
        evidence = self._evidence
        inside = np.isin(evidence.columns["example"], self.examples)
        columns = {name: column[inside] for name, column in evidence.columns.items()}
        mine = evidence.examples[np.isin(evidence.examples, self.examples)]
        part = dataclasses.replace(evidence, columns=columns, examples=mine).against([found])
        rows = dict(zip(mine.tolist(), part.other_scores()[0], strict=True))
        return pad_sequence(
            [torch.from_numpy(rows.get(int(number), np.zeros(0))) for number in self.examples], batch_first=True
        )


def _elements(clean: Clean, site: Site, layout: Layout, value: Tensor) -> Int[Tensor, "example element"]:
    """Return where the valid elements of each example are in the flattened value; -1 where it has no more."""
    numbers = torch.arange(value.numel(), device=value.device).view(value.shape)
    valid = layout.pattern.spread(layout.valid, value).expand(value.shape)
    index = clean.places[site].example_index
    if index is None:
        rows = list(zip(layout.front(numbers), layout.front(valid), strict=True))
    else:
        own = index.index.to(value.device)
        rows = [(numbers[own == example], valid[own == example]) for example in range(layout.examples)]
    return pad_sequence([every[there] for every, there in rows], batch_first=True, padding_value=-1)
