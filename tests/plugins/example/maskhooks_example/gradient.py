"""An explainer that asks how fast the prediction changes with each position."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import einops
import torch
from torch import Tensor
from torch.distributions import Distribution

from maskhooks import Hooked, Site
from maskhooks.errors import UnknownDistributionError
from maskhooks.explainers.base import Explainer
from maskhooks.explanations.explanation import Scores
from maskhooks.passes.clean import Clean
from maskhooks.sites.site import Selector


class GradientNorm(Explainer):
    """Scores a position by the gradient's norm, s = ||d log p(y*) / d h||, as a part of its example's largest.

    y* is the most probable output, h the value at the position. Nothing is learned, so `fit` has nothing to do.

    Args:
        hooked: the wrapped model.
        sites: what to score: a tag, an address, a glob, a Site, or several of these.
        seed: not used; nothing is drawn.

    Raises:
        UnknownDistributionError: on `explain`, where the model's output is not one distribution per example.
    """

    name = "gradient-norm"

    def __init__(self, hooked: Hooked, sites: Selector = "hidden", *, seed: int = 0) -> None:
        super().__init__(hooked, seed=seed)
        self.sites = hooked.find(sites)

    @property
    def reads(self) -> Sequence[Site]:
        return self.sites

    def scores(self, clean: Clean) -> list[Scores]:
        gradients = self._gradients(clean)
        return [
            self.site_scores(clean, site, site.depth or 0, _relative(_norms(gradient, site)))
            for site, gradient in zip(self.sites, gradients, strict=True)
        ]

    def _gradients(self, clean: Clean) -> Sequence[Tensor]:
        """d log p(y*) / d value for each site, in one forward and one backward pass."""
        values: dict[Site, Tensor] = {}

        def watch(site: Site) -> Callable[[Tensor], Tensor]:
            def replace(value: Tensor) -> Tensor:
                values[site] = value if value.requires_grad else value.detach().requires_grad_()
                return values[site].clone()  # the model may change it in place

            return replace

        with torch.enable_grad(), self.hooked.tap(replace={site: watch(site) for site in self.sites}):
            outputs = self.hooked.distribution(self.hooked(clean.batch), clean.batch)
            if not isinstance(outputs, Distribution):
                raise UnknownDistributionError(
                    "gradient-norm needs one distribution per example. Choose the output to explain: "
                    "wrap(model, output=lambda outputs: torch.distributions.Categorical(logits=...))"
                )
            best = outputs.log_prob(outputs.mode.detach()).sum()
            return torch.autograd.grad(best, [values[site] for site in self.sites], materialize_grads=True)


def _norms(gradient: Tensor, site: Site) -> Tensor:
    """The norm over the axes that the site's pattern, an einops arrow, leaves out."""
    pattern = site.gating()
    return einops.reduce(gradient.float().square(), pattern.arrow, "sum", **pattern.sizes).sqrt()


def _relative(norms: Tensor) -> Tensor:
    """In [0, 1]: divided by the largest of each example; 0 where all are 0."""
    largest = norms.reshape(len(norms), -1).amax(1)
    return norms / largest.clamp(min=torch.finfo(norms.dtype).tiny).reshape(-1, *[1] * (norms.dim() - 1))
