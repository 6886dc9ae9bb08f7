"""Recipes: the settings of a training run, as presets by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from maskhooks.errors import SettingError, UnknownNameError, near
from maskhooks.masks.probes import MLP, FreeLogits, PaperMLP, Probe, SummedMLP
from maskhooks.training.objectives import AugmentedLagrangian, Objective, PaperLagrangian, RatioLagrangian
from maskhooks.training.optimizers import Lookahead
from maskhooks.training.penalty import Penalty

_KINDS = {
    "optimizer": ["adam", "lookahead"],
    "probe": ["mlp", "summed", "paper"],
    "objective": ["augmented", "ratio", "paper"],
}


@dataclass(frozen=True)
class Recipe:
    """How masks are trained, as presets by name.

    "stable" are the defaults, for models that answer with confidence; "language" is for pretrained models of text,
    whose predictions depend a little on nearly every position; "graph" is for messages of graph networks (`GraphMask`);
    "subset" is for free logits that are to come to the smallest set of positions; "paper" is the way of DiffMask's
    authors.

    Args:
        steps: training steps per masking.
        per_step: maskings trained in a step, all from one clean pass. More pay where masked passes are short, as those
            from high layers are, and no store keeps the clean pass.
        learning_rate: of the probes.
        free_rate: of free logits, without amortisation.
        free_start: where free logits start.
        free_spread: their standard deviation there.
        free_memory: Adam's memory of their squared gradients. A shorter one forgets the first steps, in which gates are
            dear, and lets gates that are open beyond need close against a small gradient.
        starts: how often free logits are optimised, each time from other random numbers; each example keeps the best.
        heat: how many times hotter than their own temperature gates of free logits are at the first step; hot gates
            take values between 0 and 1, and their gradient says more of what a position is good for.
        baseline_rate: of learned baselines that learn together with the gates, in deviations of their features.
        baseline_steps: steps in which the learned baseline of conditioned masks (inputs) is fitted first, under masks
            drawn at random, and then kept; 0 to let it learn with the gates.
        lowest: the least logit of "mlp" probes. At -7 a closed gate is closed, and gets no gradient; at -3 one sample
            in sixteen is open, so that a gate that closed too early can come back.
        price: with the "ratio" objective, the least fraction of positions for which a whole margin of divergence is
            spent, of the target to be exact; what saves less is kept.
        overtaken: how much the loss charges for predictions that another class overtakes, beside the divergence.
        balance: whether each predicted class counts the same in the loss (see `Penalty`).
        stagger: the first fraction of steps, in which maskings join one after another: groups that share votes from the
            lowest depth up, those within one group from the top down. Votes that all begin at once close too much
            together, and gates that closed hardly open again.
        warmup: steps over which rates rise.
        decay: the last fraction of steps, over which rates fall to zero.
        validations: how often checkpoints are compared.
        patience: validations without a better checkpoint after which training stops; None for never.
        statistics: batches from which means and deviations are taken.
        replay: whether masked passes go on from the masked site; False runs the model in full.
        optimizer: "adam", or "lookahead" for Lookahead over centered RMSprop.
        probe: "mlp", "summed" or "paper".
        objective: "augmented", "ratio" or "paper".
    """

    name: str = "stable"
    steps: int = 700
    per_step: int = 1
    learning_rate: float = 1e-2
    free_rate: float = 0.03
    free_start: float = 2.0
    free_spread: float = 0.0
    free_memory: float = 0.99
    starts: int = 1
    heat: float = 1.0
    baseline_rate: float = 1e-3
    baseline_steps: int = 300
    lowest: float = -7.0
    price: float = 0.0
    overtaken: float = 0.0
    balance: bool = False
    stagger: float = 0.0
    warmup: int = 50
    decay: float = 0.3
    validations: int = 10
    patience: int | None = None
    statistics: int = 64
    replay: bool = True
    optimizer: str = "adam"
    probe: str = "mlp"
    objective: str = "augmented"

    def __post_init__(self) -> None:
        for name, known in _KINDS.items():
            kind = getattr(self, name)
            if kind not in known:
                raise UnknownNameError(
                    f"no {name} of a recipe is named {kind!r}. There are: {', '.join(known)}.", near=near(kind, known)
                )
        for name in ("steps", "per_step", "starts", "validations", "statistics"):
            if getattr(self, name) < 1:
                raise SettingError(f"a recipe's {name} is a whole number from 1, got {getattr(self, name)}")
        for name in ("stagger", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"a recipe's {name} is a fraction of the steps, 0 to 1, got {getattr(self, name)}")

    @classmethod
    def named(cls, name: str) -> Recipe:
        """A preset: "stable", "language", "paper", "graph" or "subset".

        Raises:
            UnknownNameError: there is none of this name.
        """
        presets = {
            "stable": cls(),
            "language": cls(
                name="language",
                steps=1000,
                objective="ratio",
                lowest=-3.0,
                price=0.05,
                overtaken=1.0,
                balance=True,
                stagger=0.6,
                learning_rate=5e-3,
                baseline_rate=0.005,
                baseline_steps=0,
                validations=5,
            ),
            "paper": cls(
                name="paper",
                learning_rate=3e-4,
                baseline_rate=1e-3,
                baseline_steps=0,
                warmup=200,
                decay=0.0,
                optimizer="lookahead",
                probe="paper",
                objective="paper",
            ),
            "subset": cls(
                name="subset",
                steps=100,
                warmup=10,
                starts=16,
                free_rate=1.0,
                free_start=-1.0,
                free_spread=2.0,
                free_memory=0.9,
                lowest=-5.0,
                heat=5.0,
            ),
            "graph": cls(name="graph", steps=600, learning_rate=2e-3, probe="summed", stagger=0.5),
        }
        if name not in presets:
            raise UnknownNameError(
                f"no recipe is named {name!r}. There are: {', '.join(presets)}.", near=near(name, presets)
            )
        return presets[name]

    def make_free(self) -> FreeLogits:
        """The free logits of one site, without amortisation."""
        return FreeLogits(start_logit=self.free_start, spread=self.free_spread, low=self.lowest)

    def make_probe(self, number: int = 0, votes: int = 1) -> Probe:
        """The probe of one vote.

        Args:
            number: its place among the votes whose product masks a site. Those after the first start nearly open, so
                that at the start as much is kept at every depth, and closing more has to be learned.
            votes: how many there are. Each may open the further, so that together they are as open as one alone.
        """
        if self.probe == "paper":
            return PaperMLP()
        if self.probe == "summed":
            return SummedMLP(low=self.lowest)
        return MLP(start_logit=2.0 if number == 0 else 4.0, low=self.lowest, high=5.0 + math.log(votes))

    def make_objective(self, margin: float) -> Objective:
        """The objective of one group of maskings."""
        if self.objective == "ratio":
            return RatioLagrangian(margin, floor=self.price)
        return AugmentedLagrangian(margin) if self.objective == "augmented" else PaperLagrangian(margin)

    def make_penalty(self) -> Penalty:
        """What the loss charges an example for."""
        return Penalty(self.overtaken, balance=self.balance)

    def make_optimizer(self, probes: list[nn.Parameter], baselines: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer, with a learning rate for probes and one for baselines."""
        groups: list[dict[str, Any]] = [
            {"params": parameters, "lr": rate}
            for parameters, rate in ((probes, self.learning_rate), (baselines, self.baseline_rate))
            if parameters
        ]
        if self.optimizer == "lookahead":
            return Lookahead(partial(torch.optim.RMSprop, alpha=0.99, eps=1e-8, centered=True)(groups))
        return torch.optim.Adam(groups, betas=(0.9, 0.99))

    def rate(self, step: int, steps: int) -> float:
        """The factor on learning rates at a step: linear warm-up, constant, linear decay."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (steps - step) / (self.decay * steps)) if self.decay else 1.0
        return rise * fall
