"""Captum's methods that replace positions by the baseline and look at the output, as explainers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskhooks.errors import MissingExtraError
from maskhooks.masks.baselines import BaselineSetting
from maskhooks.model.hooked import Hooked
from maskhooks.settings.types import Count, NonNegative, Seed
from maskhooks.sites.site import Selector
from maskhooks_captum.at_site import AtSite
from maskhooks_captum.explained import Output, Target
from maskhooks_captum.explainer import CaptumExplainer, Value, library


class FeatureAblation(CaptumExplainer):
    """How far the output falls if a position is replaced by the baseline, by Captum's `FeatureAblation`.

    Args:
        hooked, sites, target, output, baseline, seed: as `CaptumExplainer` takes them.
        perturbations_per_eval: changed copies of the batch in one pass of the model.
    """

    name = "feature-ablation"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        target: Target = None,
        output: Output | None = None,
        baseline: BaselineSetting | Value = "zero",
        perturbations_per_eval: Count = 1,
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, target=target, output=output, baseline=baseline, seed=seed)
        self.perturbations_per_eval = perturbations_per_eval

    @torch.no_grad()
    def attributed(self, at: AtSite) -> Float[Tensor, "*gated"]:
        found = (
            library(self.name)
            .FeatureAblation(at)
            .attribute(
                at.layout.value,
                self.baseline_of(at),
                additional_forward_args=(at.rows,),
                feature_mask=at.layout.units,
                perturbations_per_eval=self.perturbations_per_eval,
            )
        )
        return at.layout.taken(found)


class Occlusion(CaptumExplainer):
    """Like feature-ablation, with windows of neighbouring positions, by Captum's `Occlusion` (Zeiler and Fergus 2014).

    A position's score is the mean over the windows that cover it.

    Args:
        hooked, sites, target, output, baseline, seed: as `CaptumExplainer` takes them.
        window: positions in a window, along each axis of positions. A head is always by itself.
        perturbations_per_eval: changed copies of the batch in one pass of the model.

    While explaining:
        SettingError: positions are gated together, as in words, which windows would cut.
    """

    name = "occlusion"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        target: Target = None,
        output: Output | None = None,
        baseline: BaselineSetting | Value = "zero",
        window: Count = 3,
        perturbations_per_eval: Count = 1,
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, target=target, output=output, baseline=baseline, seed=seed)
        self.window, self.perturbations_per_eval = window, perturbations_per_eval

    @torch.no_grad()
    def attributed(self, at: AtSite) -> Float[Tensor, "*gated"]:
        shape, strides = at.layout.windows(self.window)
        found = (
            library(self.name)
            .Occlusion(at)
            .attribute(
                at.layout.value,
                shape,
                strides,
                self.baseline_of(at),
                additional_forward_args=(at.rows,),
                perturbations_per_eval=self.perturbations_per_eval,
            )
        )
        return at.layout.taken(found)


class ShapleySampling(CaptumExplainer):
    """Shapley values from random orders of the positions, by Captum's `ShapleyValueSampling` (Castro et al. 2009).

    Args:
        hooked, sites, target, output, baseline, seed: as `CaptumExplainer` takes them.
        n_samples: number of orders; each takes a pass of the model for every position.
        perturbations_per_eval: changed copies of the batch in one pass of the model.
    """

    name = "shapley-sampling"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        target: Target = None,
        output: Output | None = None,
        baseline: BaselineSetting | Value = "zero",
        n_samples: Count = 25,
        perturbations_per_eval: Count = 1,
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, target=target, output=output, baseline=baseline, seed=seed)
        self.n_samples, self.perturbations_per_eval = n_samples, perturbations_per_eval

    @torch.no_grad()
    def attributed(self, at: AtSite) -> Float[Tensor, "*gated"]:
        found = (
            library(self.name)
            .ShapleyValueSampling(at)
            .attribute(
                at.layout.value,
                self.baseline_of(at),
                additional_forward_args=(at.rows,),
                feature_mask=at.layout.units,
                n_samples=self.n_samples,
                perturbations_per_eval=self.perturbations_per_eval,
            )
        )
        return at.layout.taken(found)


class KernelShap(CaptumExplainer):
    """Shapley values by weighted least squares (Lundberg and Lee 2017), by Captum's `KernelShap`.

    Each example is explained by itself.

    Args:
        hooked, sites, target, output, baseline, seed: as `CaptumExplainer` takes them.
        n_samples: number of sets of positions for each example, one pass of the model each.
        perturbations_per_eval: sets in one pass of the model.

    Raises:
        MissingExtraError: captum or scikit-learn is not installed.

    """

    name = "kernel-shap"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        target: Target = None,
        output: Output | None = None,
        baseline: BaselineSetting | Value = "zero",
        n_samples: Count = 25,
        perturbations_per_eval: Count = 1,
        seed: Seed = 0,
    ) -> None:
        _check_sklearn(self.name)
        super().__init__(hooked, sites, target=target, output=output, baseline=baseline, seed=seed)
        self.n_samples, self.perturbations_per_eval = n_samples, perturbations_per_eval

    @torch.no_grad()
    def attributed(self, at: AtSite) -> Float[Tensor, "*gated"]:
        attr = library(self.name)
        several, single = attr.KernelShap(at), attr.FeatureAblation(at)
        settings = {"n_samples": self.n_samples, "perturbations_per_eval": self.perturbations_per_eval}
        found = [
            several.attribute(**one, **settings) if int(one["feature_mask"].max()) else single.attribute(**one)
            for one in _examples(at, self.baseline_of(at))
        ]  # the value of a single position is its effect, but Captum has no weights for it
        return at.layout.taken(torch.cat(found))


class Lime(CaptumExplainer):
    """Weights of a sparse linear model around the example (Ribeiro et al. 2016), by Captum's `Lime`.

    Sets of positions are weighted by the cosine similarity of the changed value to the value. Each example is explained
    by itself.

    Args:
        hooked, sites, target, output, baseline, seed: as `CaptumExplainer` takes them.
        n_samples: number of sets of positions for each example, one pass of the model each.
        alpha: the weight of the lasso's penalty. If all scores are 0, it is too large for this output.
        perturbations_per_eval: sets in one pass of the model.

    Raises:
        MissingExtraError: captum or scikit-learn is not installed.
    """

    name = "lime"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        target: Target = None,
        output: Output | None = None,
        baseline: BaselineSetting | Value = "zero",
        n_samples: Count = 50,
        alpha: NonNegative = 0.01,
        perturbations_per_eval: Count = 1,
        seed: Seed = 0,
    ) -> None:
        _check_sklearn(self.name)
        super().__init__(hooked, sites, target=target, output=output, baseline=baseline, seed=seed)
        self.n_samples, self.alpha, self.perturbations_per_eval = n_samples, alpha, perturbations_per_eval

    @torch.no_grad()
    def attributed(self, at: AtSite) -> Float[Tensor, "*gated"]:
        from captum._utils.models.linear_model import SkLearnLasso

        method = library(self.name).Lime(at, interpretable_model=SkLearnLasso(alpha=self.alpha))
        settings = {"n_samples": self.n_samples, "perturbations_per_eval": self.perturbations_per_eval}
        found = [method.attribute(**one, **settings) for one in _examples(at, self.baseline_of(at))]
        return at.layout.taken(torch.cat(found))


def _examples(at: AtSite, baseline: Tensor) -> Iterator[dict[str, Any]]:
    """Yield the arguments of `attribute` for each example by itself, with its own units."""
    units = at.layout.units
    parts = (at.layout.value, baseline, units.expand(len(at.rows), *units.shape[1:]), at.rows)
    for value, base, mask, row in zip(*(part.split(1) for part in parts), strict=True):
        yield {"inputs": value, "baselines": base, "feature_mask": mask, "additional_forward_args": (row,)}


def _check_sklearn(purpose: str) -> None:
    try:
        import sklearn.linear_model  # noqa: F401 # Captum imports it where it fits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "captum", purpose) from error
