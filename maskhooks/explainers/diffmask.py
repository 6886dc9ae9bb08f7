"""DiffMask (De Cao et al. 2020): learn which positions a prediction does not need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskhooks.errors import SettingError
from maskhooks.explainers.learned import Learned
from maskhooks.explanations.explanation import Scores
from maskhooks.hooks.replay import Replay
from maskhooks.masks.baselines import BASELINES, Baseline
from maskhooks.masks.gates import GATES, Gate
from maskhooks.masks.masking import Masking, Masks
from maskhooks.masks.votes import Vote
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DIVERGENCES, Divergence, kl
from maskhooks.passes.forward import Clean, units
from maskhooks.plugins.registry import registry
from maskhooks.sites.site import Selector, Site
from maskhooks.training.per_example import Estimate, optimise, pathwise
from maskhooks.training.problem import Problem
from maskhooks.training.recipe import Recipe


class DiffMask(Learned):
    """Gates that drop as many positions as possible while the output distribution stays within a margin.

    min E[mean P(z != 0)] subject to E[D(y || y_masked)] <= margin, over probes and baselines (De Cao et al. 2020,
    eq. 2 to 4). Hidden states: each site is masked by itself, its gates read from the same state. Inputs: masked with
    the product of votes, one for each depth up to theirs, each reading input and states; so every depth has a mask, and
    what is dropped at one depth stays dropped further up. States of one depth are read together.

    Args:
        hooked: the wrapped model.
        sites: what to mask: a tag ("hidden", "input"), an address, a glob, a Site, or several of these.
        given: the states on which masks of `sites` are conditioned, depth by depth. Default: for "input" the sites
            tagged hidden that have the same position axes, for anything else each site itself.
        product: whether masks conditioned on states are the product of the votes of all depths up to theirs, as in the
            paper; False takes each depth's own vote alone, with a baseline of its own, so that depths do not share one
            margin, and what is dropped at one depth may be kept further up.
        margin: the divergence allowed on average, in nats.
        gate: a registered name or a `Gate`.
        baseline: a registered name, or a `Baseline` for a single masked site. Default "learned", without amortisation
            "zero".
        divergence: of original and masked outputs, in nats per example; default KL(original || masked).
        amortized: False optimises free logits for each batch in `explain` instead of learning probes in `fit`.
        recipe: a `Recipe`, or the name of one ("stable", "language", "subset", "paper").
        seed: of all random numbers.

    Attributes:
        maskings: one for each masked site and depth.
        result: what the last fit left: log, validation, within_margin, chosen steps.

    Raises:
        SettingError: the margin is not positive, or another setting is out of range.
        UnknownSiteError: no site is meant; near names are listed.
        PatternError: a site has no pattern.
    """

    name = "diffmask"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        given: Selector | None = None,
        product: bool = True,
        margin: float = 0.1,
        gate: str | Gate = "hard-concrete",
        baseline: str | Baseline | None = None,
        divergence: Divergence = kl,
        amortized: bool = True,
        recipe: str | Recipe = "stable",
        seed: int = 0,
    ) -> None:
        super().__init__(hooked, seed=seed)
        self.recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
        self.objective = self.recipe.make_objective(margin)  # checks the margin
        self.margin, self.divergence, self.amortized, self.product = margin, divergence, amortized, product
        self.gate: Gate = registry.make(GATES, gate)
        self.sites = self._asked = hooked.needed(sites)
        weights = [site for site in self.sites if "weight" in site.tags]
        self._baseline = baseline if baseline is not None else "learned" if amortized and not weights else "zero"
        if weights and self._baseline != "zero":
            raise SettingError(
                f"{weights[0]} is a weight, 1 where nothing is masked, for which no baseline can be learned. Use "
                "baseline='zero', or mask what is weighted"
            )
        if given is None and sites == "input" and amortized and hooked.sites.tagged("hidden"):
            given = hooked.alike(self.sites)
        self.given = None if given is None else hooked.needed(given)
        if not amortized and self.given is not None:
            raise SettingError("free logits read no states: leave out `given`, or use amortized=True")
        self.maskings = self._make_maskings()
        self.replay = Replay(hooked.model) if self.recipe.replay else None

    def __repr__(self) -> str:
        state = "fitted" if self.fitted else "not fitted" if self.amortized else "not amortised"
        what = f"{len(self.maskings)} maskings of {len(self.sites)} sites"
        return f"{type(self).__name__}({what}, margin {self.margin} nats, {state})"

    def scores(self, clean: Clean) -> list[Scores]:
        if not self.amortized:
            optimise(self._problem(), clean, self._estimator)
        with torch.no_grad():
            return [
                self.site_scores(clean, part.site, part.depth, self._log_open(clean, part).exp())
                for masking in self.maskings
                for part in masking.parts
            ]

    def _estimator(self) -> Estimate:
        """What samples free gates in each step of a start."""
        return pathwise

    def _log_open(self, clean: Clean, part: Masking) -> Tensor:
        return part.log_open(clean.values, units(self.hooked, clean, part.site))

    @classmethod
    def restored(cls, hooked: Hooked, settings: Mapping[str, Any], **given: Any) -> DiffMask:
        """The explainer that `settings` describes, not fitted yet.

        Args:
            given: `gate`, `baseline` and `divergence` where they were objects that cannot be saved.

        Raises:
            SettingError: one of these is missing.
        """
        for part in ("gate", "baseline", "divergence"):
            if settings[part] is None and part not in given:
                raise SettingError(
                    f"the {part} was an object that cannot be saved. Pass it again: "
                    f"maskhooks.load(folder, model, {part}=...)"
                )
        gate = settings["gate"]
        made = {
            "gate": gate and registry.make(GATES, gate["name"], **gate["settings"]),
            "baseline": settings["baseline"],
            "divergence": DIVERGENCES.get(settings["divergence"]),
        }
        return cls(
            hooked,
            [Site.from_dict(site) for site in settings["sites"]],
            **cls._own(settings),
            margin=settings["margin"],
            amortized=settings["amortized"],
            recipe=Recipe(**settings["recipe"]),
            seed=settings["seed"],
            **{**made, **given},
        )

    @classmethod
    def _own(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of this class alone that `settings` describes."""
        given = settings["given"]
        conditions = None if given is None else [Site.from_dict(site) for site in given]
        return {"given": conditions, "product": settings["product"]}

    def settings(self) -> dict[str, Any]:
        return {
            "sites": [site.to_dict() for site in self.sites],
            "given": None if self.given is None else [site.to_dict() for site in self.given],
            "product": self.product,
            "margin": self.margin,
            "gate": registry.spell(GATES, self.gate),
            "baseline": self._baseline if isinstance(self._baseline, str) else None,
            "divergence": next((name for name, known in DIVERGENCES.items() if known is self.divergence), None),
            "amortized": self.amortized,
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.seed,
            "units": self.hooked.task.together,
        }

    def provenance(self) -> dict[str, Any]:
        return {**super().provenance(), **self.settings(), "within_margin": self.within_margin}

    def _make_maskings(self) -> Sequence[Masks]:
        return self._conditioned() if self.given is not None else self._unconditioned()

    def _unconditioned(self) -> list[Masking]:
        return [self._alone(site, (site,) if self.amortized else (), _depth(site)) for site in self.sites]

    def _conditioned(self) -> list[Masking]:
        maskings = []
        for site in self.sites:
            states = [state for state in self.given or () if _depth(state) >= _depth(site)]
            if not states:
                raise SettingError(
                    f"no state of `given` comes at or after {site} (depth {_depth(site)}), so nothing can be known of "
                    f"it. Add {site} itself, or sites further up."
                )
            depths = sorted(set(map(_depth, states)))
            reads = [(site, *(s for s in states if _depth(s) == depth and s != site)) for depth in depths]
            if not self.product:
                maskings += [self._alone(site, read, depth) for depth, read in zip(depths, reads, strict=True)]
                continue
            votes = [Vote(read, self.recipe.make_probe(number, len(depths))) for number, read in enumerate(reads)]
            baseline = self._make_baseline()
            maskings += [
                Masking(site, depth, votes[: number + 1], self.gate, baseline) for number, depth in enumerate(depths)
            ]
        return maskings

    def _alone(self, site: Site, read: tuple[Site, ...], depth: int) -> Masking:
        """A masking with one vote, and a baseline of its own."""
        probe = self.recipe.make_probe() if self.amortized else self.recipe.make_free()
        return Masking(site, depth, [Vote(read, probe)], self.gate, self._make_baseline())

    def _make_baseline(self) -> Baseline:
        if not isinstance(self._baseline, str) and len(self.sites) > 1:
            raise SettingError("one Baseline object serves one site; give a registered name, or an explainer for each")
        baseline: Baseline = registry.make(BASELINES, self._baseline)
        baseline.started = False
        return baseline

    def _problem(self) -> Problem:
        return Problem(
            self.hooked,
            self.maskings,
            [self.recipe.make_objective(self.margin) for _ in self.maskings],
            self.recipe,
            self.divergence,
            self.margin,
            self.seed,
            self.recipe.make_penalty(),
            fit_first=self.maskings if self.given is not None or not self.amortized else (),
        )


def _depth(site: Site) -> int:
    return site.depth or 0
