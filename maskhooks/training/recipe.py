"""A recipe: the settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from maskhooks.masks.probes import PROBES, PerExampleLogits, Probe
from maskhooks.plugins.kind import declare
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import check_fields
from maskhooks.settings.types import Count, Decay, Fraction, Natural, NonNegative, Positive, Text
from maskhooks.training.objectives import OBJECTIVES, Objective
from maskhooks.training.optimizers import OPTIMIZERS
from maskhooks.training.penalty import PENALTIES, Penalty

_Name = str | Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How masks are trained.

    `Recipe.named("language")` is a registered recipe, `dataclasses.replace(recipe, steps=500)` changes one. Probe,
    objective, penalty and optimizer are registered parts, each given by name, or as a mapping of its name and settings:
    `Recipe(probe={"name": "mlp", "hidden": 64})`. A part takes `min_logit`, `l0_price`, `flip_penalty` and `balance`
    from the recipe if it has a setting of that name.

    Args:
        name: the recipe's name, which is saved with a run.
        description: what the recipe is for, in one line.
        steps: training steps per masking.
        batch_size: examples in a training batch, where maskhooks makes the batches, as on the command line.
        maskings_per_step: maskings trained in a step, all from one clean pass; None for all of them. More than one
            pays off where masked passes are short, as those from high layers are, or where a run ends before it has
            used each stored clean pass several times.
        learning_rate: learning rate of the probes.
        logit_learning_rate: learning rate of per-example logits (unamortised masks).
        logit_init: mean of per-example logits at the start.
        logit_init_std: their standard deviation at the start.
        adam_beta2: Adam's decay rate of squared gradients for per-example logits. A lower one forgets the first steps
            sooner, in which open gates cost most, so that gates that are no longer needed can close.
        restarts: how often per-example logits are optimised, each time with other random numbers; each example keeps
            its best masks.
        initial_temperature: temperature of per-example gates at the first step, as a multiple of the gate's own. Warmer
            gates take values between 0 and 1, and their gradients say more about each position.
        baseline_learning_rate: learning rate of baselines that are learned together with the gates, in standard
            deviations of each feature.
        baseline_steps: steps in which the learned baseline of conditioned masks (inputs) is trained first, under random
            masks, before it is frozen; 0 trains it together with the gates.
        logit_optimizer: a registered optimizer for per-example logits; default: Adam with `adam_beta2`.
        samples: gate samples of each example in a step of per-example logits, in one batch where examples can be
            repeated.
        max_logit: the highest per-example logit.
        min_logit: the lowest logit of a probe. At -7 a closed gate stays closed and gets no gradient; at -3 one sample
            in sixteen is open, so a gate that closed too early can open again.
        warm_start_batches: batches from which probes first learn an estimate of each gate's divergence, which takes one
            backward pass for all sites together; 0 for none. Masks that share votes start cold.
        l0_price: with the "ratio" objective, the lowest price of an open position, as a fraction of positions per
            margin. Positions that save less than this are kept.
        flip_penalty: weight of lost predictions in the loss, added to the divergence; see `Penalty`.
        balance: whether each predicted class counts the same in the loss; see `Penalty`.
        layer_warmup: the first fraction of the steps, during which maskings join training one after another: groups
            that share votes from the lowest depth up, maskings of one group from the top layer down. Maskings that all
            start at once close too many gates together, and gates that have closed rarely open again.
        warmup_steps: steps over which learning rates rise linearly.
        decay_fraction: the last fraction of the steps, over which learning rates fall linearly to zero.
        validations: how often checkpoints are compared on validation data.
        calibrations: how often, after the last step, the logits of each masking are shifted by one number towards the
            margin and compared once more on validation data; 0 for never. Masks that share votes stay as they are.
        sharpness: by which factor logits are sharpened after the last step, before the last comparison: their distance
            from an open probability of one half is multiplied. Gates whose logits have not reached either end then
            cost less noise, and rounding them changes less. Masks that share votes stay as they are.
        least_gain: a masking that is within the margin and whose fraction kept fell by less since the last validation
            rests until the last 30 % of the run, and its steps go to the others; 0 for no rests.
        patience: validations without a better checkpoint after which training stops; None never stops early.
        statistics_batches: batches from which means and standard deviations are computed.
        replay: whether masked passes start at the masked site; False runs the whole model.
        optimizer: a registered optimizer for probes and baselines.
        probe: a registered probe, which computes gate logits.
        objective: a registered objective: the loss, and how its multiplier moves.
        penalty: a registered penalty: what the loss charges an example for.

    Raises:
        SettingError: a value is of the wrong type or out of range.
        UnknownNameError: no part is registered under a name.
    """

    name: Text = "stable"
    description: str = ""
    steps: Count = 700
    batch_size: Count = 32
    maskings_per_step: Count | None = 1
    learning_rate: NonNegative = 1e-2
    logit_learning_rate: NonNegative = 0.03
    logit_init: float = 2.0
    logit_init_std: NonNegative = 0.0
    adam_beta2: Decay = 0.99
    restarts: Count = 1
    initial_temperature: Positive = 1.0
    baseline_learning_rate: NonNegative = 1e-3
    baseline_steps: Natural = 300
    logit_optimizer: Annotated[_Name, OPTIMIZERS] | None = None
    samples: Count = 1
    max_logit: float = 5.0
    min_logit: float = -7.0
    warm_start_batches: Natural = 0
    l0_price: NonNegative = 0.0
    flip_penalty: NonNegative = 0.0
    balance: bool = False
    layer_warmup: Fraction = 0.0
    warmup_steps: Natural = 50
    decay_fraction: Fraction = 0.3
    validations: Count = 10
    calibrations: Natural = 0
    sharpness: Positive = 1.0
    least_gain: Fraction = 0.0
    patience: Count | None = None
    statistics_batches: Count = 64
    replay: bool = True
    optimizer: Annotated[_Name, OPTIMIZERS] = "adam"
    probe: Annotated[_Name, PROBES] = "mlp"
    objective: Annotated[_Name, OBJECTIVES] = "augmented"
    penalty: Annotated[_Name, PENALTIES] = "divergence"

    def __post_init__(self) -> None:
        check_fields(self)
        for kind in (OPTIMIZERS, PROBES, OBJECTIVES, PENALTIES):
            registry.check(kind, getattr(self, kind.name))
        if self.logit_optimizer is not None:
            registry.check(OPTIMIZERS, self.logit_optimizer)

    @classmethod
    def named(cls, name: str) -> Recipe:
        """Return a registered recipe, such as "stable", "language", "graph", "subset" or "paper".

        Raises:
            UnknownNameError: no recipe has this name; the message lists similar names.
        """
        return registry.make(RECIPES, name)

    def make_logits(self) -> PerExampleLogits:
        """Return the per-example logits of one site (unamortised)."""
        return PerExampleLogits(
            init_logit=self.logit_init,
            init_std=self.logit_init_std,
            min_logit=self.min_logit,
            max_logit=self.max_logit,
        )

    def make_probe(self, vote: int = 0, votes: int = 1) -> Probe:
        """Return the probe of one vote.

        Args:
            vote: its index among the votes whose product masks a site.
            votes: how many there are.
        """
        probe = registry.make(PROBES, self.probe, {"min_logit": self.min_logit})
        probe.join(vote, votes)
        return probe

    def make_objective(self, margin: float) -> Objective:
        """Return the objective of one group of maskings, for a margin in nats."""
        return registry.make(OBJECTIVES, self.objective, {"margin": margin, "l0_price": self.l0_price})

    def make_penalty(self) -> Penalty:
        """Return the penalty of a run."""
        return registry.make(PENALTIES, self.penalty, {"flip_penalty": self.flip_penalty, "balance": self.balance})

    def make_optimizer(self, probes: list[nn.Parameter], baselines: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of probes and baselines, each with their own learning rate."""
        groups = [
            {"params": parameters, "lr": rate}
            for parameters, rate in ((probes, self.learning_rate), (baselines, self.baseline_learning_rate))
            if parameters
        ]
        return registry.make(OPTIMIZERS, self.optimizer, {"params": groups})

    def make_logit_optimizer(self, logits: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of per-example logits."""
        wanted = self.logit_optimizer or {"name": "adam", "beta2": self.adam_beta2}
        groups = [{"params": logits, "lr": self.logit_learning_rate}]
        return registry.make(OPTIMIZERS, wanted, {"params": groups})

    def together(self, groups: int) -> int:
        """Return how many of the groups a step trains."""
        return min(self.maskings_per_step or groups, groups)

    def rate(self, step: int, progress: float) -> float:
        """Return the factor on learning rates: linear warm-up, constant, linear decay.

        Args:
            step: the steps done.
            progress: how far the run is, from 0 to 1.
        """
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fall = min(1.0, (1 - progress) / self.decay_fraction) if self.decay_fraction else 1.0
        return rise * fall


RECIPES = declare("recipe", Recipe, made=True)
#: How an explainer takes a recipe: its name, a mapping of its name and settings, or a `Recipe`.
RecipeSetting = Annotated[str | Mapping[str, Any] | Recipe, RECIPES]
