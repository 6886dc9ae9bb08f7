"""Captum's metrics, for scores of any explainer at any site."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Annotated

import numpy as np
import torch
from annotated_types import Gt, Lt
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskhooks.errors import MissingExtraError, SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.hooks.preserved import preserved
from maskhooks.masks.baselines import BaselineSetting
from maskhooks.metrics.erasure import ErasureMetric
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.metric import Metric
from maskhooks.metrics.removal import Operator, Removal
from maskhooks.model.outputs import Outputs, predicted_probability
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.seeds import seeded
from maskhooks.settings.types import Count, Natural, Positive, Seed
from maskhooks_captum.layout import Layout

_REMOVED, _MOVED = 440, 441  # the purposes of random numbers


class Infidelity(ErasureMetric):
    """How far scores miss the change of the output when random positions are removed; from 0, lower is better.

    E[(sum of the scores of the removed positions - (f_j(x) - f_j(x without them)))^2] over random sets of positions,
    by `captum.metrics.infidelity` with the input 1 for a position that is there. Scores of gradients times inputs sum
    to a change of the output, and fit this as they are. Others, such as P(kept), have no such unit. By default, scores
    are scaled for each example such that they fit best, as the authors' code does, and the value is divided by that of
    scores that are all 0, the mean squared change: 0 is a perfect fit, and 1 none. Scaled scores have no sign: s and -s
    have the same value. Not defined where no set changes the output.

    Yeh et al. 2019; Captum's default is not scaled, and not divided.

    Args:
        n_samples: the number of random sets; the authors take 10,000.
        removed: the probability of a position to be removed.
        normalize: whether scores are scaled.
        relative: whether the value is divided by that of scores that are 0; otherwise it is a squared probability.
        absolute, operator, baseline, token, seed: as `ErasureMetric` takes them.
    """

    name = "infidelity"
    better = "lower"
    range = (0.0, float("inf"))
    unit = "share of that of zero scores"
    source = "Yeh et al. 2019, by Captum"

    def __init__(
        self,
        *,
        n_samples: Count = 100,
        removed: Annotated[float, Gt(0), Lt(1)] = 0.5,
        normalize: bool = True,
        relative: bool = True,
        absolute: bool = False,
        operator: Operator = "baseline",
        baseline: BaselineSetting = "zero",
        token: Natural | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(absolute=absolute, operator=operator, baseline=baseline, token=token, seed=seed)
        self.n_samples, self.removed, self.normalize, self.relative = n_samples, removed, normalize, relative
        captum_metrics(self.name)

    def measured(self, removal: Removal) -> Float[Tensor, " example"]:
        grid = _Grid(removal)
        scores = grid.spread(torch.from_numpy(removal.scores))
        found = self._infidelity(removal, grid, scores, self.normalize)
        if not self.relative:
            return found
        worst = self._infidelity(removal, grid, torch.zeros_like(scores), False)
        return torch.where(worst > 0, found.clamp(min=0) / worst, torch.nan)

    def _infidelity(self, removal: Removal, grid: _Grid, scores: Tensor, normalize: bool) -> Float[Tensor, " example"]:
        draw = torch.Generator().manual_seed(seeded(self.seed, _REMOVED, int(removal.examples[0])))

        def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
            taken = (torch.rand(inputs.shape, generator=draw, dtype=torch.float64) < self.removed) & grid.there
            return taken.double(), inputs - taken.double()

        def forward(inputs: Tensor) -> Tensor:
            return removal.without(grid.gathered(inputs == 0).numpy(), _probability)

        found: Tensor = captum_metrics(self.name).infidelity(
            forward,
            perturb,
            torch.ones(grid.there.shape, dtype=torch.float64),
            scores,
            n_perturb_samples=self.n_samples,
            max_examples_per_batch=len(grid.there),  # one set for each example in a pass
            normalize=normalize,
        )
        return found.detach()


class _Grid:
    """The positions of a batch that count, as a row for each example.

    Attributes:
        there: where a position is, `(example, position)`.
    """

    def __init__(self, removal: Removal) -> None:
        owners = torch.from_numpy(removal.owners)
        counts = torch.bincount(owners, minlength=len(removal.examples))
        order = owners.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        within = torch.empty_like(owners)
        within[order] = torch.arange(len(owners)) - starts[owners[order]]
        self._rows: Int[Tensor, " position"] = owners
        self._columns: Int[Tensor, " position"] = within
        self.there = torch.zeros(len(counts), max(1, int(counts.max())), dtype=torch.bool)
        self.there[owners, within] = True

    def spread(self, values: Float[Tensor, " position"]) -> Float[Tensor, "example place"]:
        found = torch.zeros(self.there.shape, dtype=torch.float64)
        found[self._rows, self._columns] = values.double()
        return found

    def gathered(self, grid: Bool[Tensor, "example place"]) -> Bool[Tensor, " position"]:
        return grid[self._rows, self._columns]


class SensitivityMax(Metric):
    """The largest relative change of the scores when the value at the site moves a little; from 0, lower is better.

    The largest norm of s(x') - s(x) over the norm of s(x), with x' = x + noise that is uniform in [-radius, radius] in
    each feature of each valid position, by `captum.metrics.sensitivity_max`: a lower bound, as only some x' are tried.
    The norm is over the positions that count. The paper does not divide by that of s(x); if it is 0, it counts as 1.
    Each example is explained again for each x', by itself; an explainer that draws numbers draws the same ones.

    Yeh et al. 2019.

    Args:
        radius: how far values move, as a share of the root mean square of the example's values at the site. The
            radius of the paper and of Captum is in the values' own units.
        n_samples: how many x' are tried for each example.
        absolute: as `Metric` takes it.
        seed: the random seed of the noise.
    """

    name = "sensitivity-max"
    better = "lower"
    range = (0.0, float("inf"))
    unit = "share of the scores' norm"
    source = "Yeh et al. 2019, by Captum"
    needs = frozenset({"hooked", "explainer"})

    def __init__(
        self, *, radius: Positive = 0.02, n_samples: Count = 10, absolute: bool = False, seed: Seed = 0
    ) -> None:
        super().__init__(absolute=absolute)
        self.radius, self.n_samples, self.seed = radius, n_samples, seed
        captum_metrics(self.name)

    def __call__(self, evidence: Evidence) -> Floats:
        found = np.full(len(evidence.examples), np.nan)
        for number, clean in _singles(evidence):
            at = np.flatnonzero(evidence.examples == number)
            if len(at):
                found[at] = self._sensitivity(evidence, clean, number)
        return found

    def _sensitivity(self, evidence: Evidence, clean: Clean, number: int) -> float:
        assert evidence.explainer is not None
        (site,) = clean.hooked.required_sites(evidence.site)
        layout = Layout(clean, site)
        if layout.whole:
            raise SettingError(
                f"the metric {self.name!r} needs the batch axis first, and the rows of {site} belong to examples by an "
                "index. Explain another site"
            )
        original, explainer = clean.values[site], evidence.explainer
        valid = site.gating().spread(layout.valid, original).expand_as(original)
        scale = original[valid].double().square().mean().sqrt().item() if bool(valid.any()) else 0.0

        def scores(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            moved = torch.where(valid, layout.back(values[0]).to(original), original)
            with clean.hooked.tap(replace={site: lambda old: _copies(moved, old, layout)}):
                again = explainer.explain(clean.batch, start_index=number)
            return (self._counted(evidence, again, number),)

        with preserved(clean.hooked.model):
            torch.manual_seed(seeded(self.seed, _MOVED, number))
            found = captum_metrics(self.name).sensitivity_max(
                scores,
                (layout.value,),
                perturb_radius=self.radius * scale,
                n_perturb_samples=self.n_samples,
                max_examples_per_batch=1,
            )
        return float(found)

    def _counted(self, evidence: Evidence, again: Explanation, number: int) -> Float[Tensor, "1 position"]:
        """Return the scores of one example at the positions that count."""
        (one,) = (
            part
            for part in Evidence.of(again, counts=evidence.counts)
            if part.site == evidence.site and part.depth == evidence.depth
        )
        assert one.examples.tolist() == [number]
        (row,) = one.scores(absolute=self.absolute)
        return torch.from_numpy(row)[None]


def captum_metrics(purpose: str) -> ModuleType:
    """Return `captum.metrics`.

    Raises:
        MissingExtraError: captum is not installed.
    """
    try:
        import captum.metrics
    except ImportError as error:
        raise MissingExtraError("captum", "captum", purpose) from error
    found: ModuleType = captum.metrics
    return found


def _probability(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    return predicted_probability(original, masked)


def _singles(evidence: Evidence) -> Iterator[tuple[int, Clean]]:
    """Yield each example by itself: its index, and its clean pass, which has read the site."""
    hooked = evidence.hooked
    assert hooked is not None
    (site,) = hooked.required_sites(evidence.site)
    number = evidence.start_index
    for batch in evidence.batches:
        moved = move(batch, device_of(hooked.model))
        whole = clean_pass(hooked, moved, [site])
        examples = Layout(whole, site).examples
        for index in range(examples):
            one = hooked.task.select(moved, [index], examples)
            yield number + index, clean_pass(hooked, one, [site])
        number += examples


def _copies(value: Tensor, old: Tensor, layout: Layout) -> Tensor:
    """Return the value of one example for a pass with any number of copies of it."""
    rows = layout.front(old)
    return layout.back(layout.front(value).expand_as(rows)).to(old).clone()
