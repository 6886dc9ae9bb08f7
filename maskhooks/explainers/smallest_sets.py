"""The base class of explainers that search for the smallest sets of positions that leave a prediction unchanged."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool
from torch import Tensor

from maskhooks.errors import SettingError
from maskhooks.explainers.closing import Closing
from maskhooks.masks.baselines import BaselineSetting
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DivergenceSetting, Outputs, agreement
from maskhooks.search.question import Criterion
from maskhooks.settings.types import Count, Positive, Seed
from maskhooks.sites.site import Selector


class SmallestSets(Closing):
    """An explainer that closes sets of positions and checks whether each leaves the prediction unchanged.

    Args:
        hooked, sites, baseline, divergence, batch_size, replay, seed: as `Closing` takes them.
        criterion: `(original, masked) -> row`, where True, or a number of at least 1, means that the prediction is
            unchanged. Default: the most probable class stays, at all positions and heads; see
            `maskhooks.model.outputs.agreement`.
        margin: instead of a criterion, the divergence allowed, in nats.

    Raises:
        SettingError: a number is out of range, or both a criterion and a margin are given.
        UnknownSiteError: no site matches.
    """

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        baseline: BaselineSetting = "zero",
        criterion: Criterion | None = None,
        margin: Positive | None = None,
        divergence: DivergenceSetting = "kl",
        batch_size: Count = 64,
        replay: bool = True,
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            hooked, sites, baseline=baseline, divergence=divergence, batch_size=batch_size, replay=replay, seed=seed
        )
        if criterion is not None and margin is not None:
            raise SettingError("give a criterion or a margin, not both: each says when a prediction is unchanged.")
        self.margin, self.criterion = margin, criterion
        self._criterion = criterion or (agreement if margin is None else self._within)

    def unchanged(self, original: Outputs, masked: Outputs) -> Bool[Tensor, " row"]:
        """Return whether each prediction is unchanged.

        Raises:
            SettingError: the criterion does not return one truth value per row.
        """
        found = self._criterion(original, masked)
        if not isinstance(found, Tensor) or found.dim() != 1:
            got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise SettingError(
                f"a criterion must return a tensor with a truth value for each row, got {got}. An example: "
                "lambda original, masked: masked.probs[:, 0] > 0.5"
            )
        return found >= 1

    def provenance(self) -> dict[str, Any]:
        criterion = "margin" if self.margin is not None else getattr(self._criterion, "__name__", "criterion")
        return {**super().provenance(), "criterion": criterion}

    def _within(self, original: Outputs, masked: Outputs) -> Tensor:
        return self.divergence(original, masked) <= (self.margin or 0.0)
