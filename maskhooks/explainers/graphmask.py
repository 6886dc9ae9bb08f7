"""GraphMask (Schlichtkrull et al. 2021): learn which messages a graph network does not need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskhooks.errors import SettingError
from maskhooks.explainers.learned import Learned
from maskhooks.explanations.explanation import Scores
from maskhooks.masks.baselines import BaselineSetting
from maskhooks.masks.gates import GateSetting
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.masking import Masking
from maskhooks.masks.votes import Vote
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DivergenceSetting
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.settings.types import Positive, Seed
from maskhooks.sites.site import Selector, Site
from maskhooks.training.recipe import RecipeSetting


class GraphMask(Learned):
    """Learns gates on the messages of all layers at once that drop as many messages as possible within a margin.

    min E[mean P(z != 0)] over all layers' messages, subject to E[D(y || y_masked)] <= margin. A gate reads the message
    m and the states h_u and h_v at its ends, all without masks. Each layer has a learned vector that replaces dropped
    messages. Layers join training from the top down (Schlichtkrull et al. 2021, section 3).

    Args:
        hooked, sites, margin, gate, baseline, divergence, amortized, recipe, seed: as `Learned` takes them. Sites are
            messages, the divergence may be "prediction-loss" for the loss against the model's own prediction, and the
            recipe "graph" is made for this.
        tied: whether an edge has one gate in all layers, read at the last one, instead of one gate in each layer; an
            explanation then has the last layer's rows.

    Raises:
        SettingError, UnknownSiteError, PatternError: as with `Learned`.
    """

    name = "graphmask"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "message",
        *,
        margin: Positive = 0.03,
        tied: bool = False,
        gate: GateSetting = "hard-concrete",
        baseline: BaselineSetting | None = None,
        divergence: DivergenceSetting = "kl",
        amortized: bool = True,
        recipe: RecipeSetting = "graph",
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, margin, gate, baseline, divergence, amortized, recipe, seed)
        self.tied = tied
        self.groups = self._make_groups()

    @property
    def reads(self) -> list[Site]:
        return self.maskings[-1].reads if self.tied and self.amortized else super().reads

    def scores(self, clean: Clean) -> list[Scores]:
        if self.tied and not self.amortized:
            self._check_tied(clean)
        return super().scores(clean)

    @property
    def _scored(self) -> Sequence[Masking]:
        return self.maskings[-1:] if self.tied else self.maskings

    def _check_batch(self, batch: Any) -> None:
        if self.tied:
            self._check_tied(clean_pass(self.hooked, batch, self.sites))

    def _check_tied(self, clean: Clean) -> None:
        """Refuse one gate for messages along different edges.

        Raises:
            SettingError: layers have messages along different edges, or in a different order.
        """
        first, *rest = (_along(clean, site) for site in self.sites)
        for site, along in zip(self.sites[1:], rest, strict=True):
            if first is not None and along is not None and not _alike(first, along):
                way = "Give each layer its own gates: tied=False"
                if self.hooked.sites.tagged("edge"):
                    way += ", or mask edges in every layer at once, without self-loops: GraphMask(hooked, 'edge')"
                raise SettingError(
                    f"tied=True gives an edge one gate in all layers, but {self.sites[0]} and {site} do not have "
                    f"messages along the same edges in the same order ({len(first[0])} and {len(along[0])}), for "
                    f"example because one of them adds self-loops. {way}."
                )

    def _make_groups(self) -> Sequence[MaskingGroup]:
        """Return one group with the messages of all layers."""
        sites = sorted(self.sites, key=lambda site: site.depth or 0)
        if not self.tied:
            return [MaskingGroup([self._masking(site, self._message_vote(site)) for site in sites])]
        vote = self._message_vote(sites[-1])
        return [MaskingGroup([self._masking(site, vote) for site in sites], tied=True)]

    def _message_vote(self, site: Site) -> Vote:
        """Return a vote that reads source states, messages and target states of a layer."""
        return self._vote(*self._ends(site, "source"), site, *self._ends(site, "target"))

    def _ends(self, site: Site, tag: str) -> list[Site]:
        """Return the states at one end of a layer's messages: a site with the same depth, call and parent module."""
        return [
            dataclasses.replace(other, optional=False)
            for other in self.hooked.sites.tagged(tag)
            if (other.depth, other.call, _parent(other)) == (site.depth, site.call, _parent(site))
        ][:1]


def _along(clean: Clean, site: Site) -> tuple[Tensor, Tensor | None] | None:
    """Return the two nodes of each message, `edge node`, and its relation; None if the task does not know them."""
    columns = clean.hooked.task.edges(site, clean.batch, clean.values)
    if columns is None:
        return None
    ends = torch.stack([torch.as_tensor(columns[name]) for name in ("source", "target")], 1).sort(1).values
    return ends, torch.as_tensor(columns["relation"]) if "relation" in columns else None


def _alike(one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> bool:
    """Whether messages go along the same edges; a layer may or may not distinguish relations."""
    (ends, relation), (others, another) = one, other
    return torch.equal(ends, others) and (relation is None or another is None or torch.equal(relation, another))


def _parent(site: Site) -> str:
    return site.module.rpartition(".")[0]
