"""Outputs as distributions, and divergences between them.

A model's outputs are a `torch.distributions.Distribution`, a `Positions` (one distribution per position), or a
mapping of several of these, whose divergences add up. The first axis of every batch shape is the batch axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, kl_divergence

from maskhooks.errors import UnknownDistributionError
from maskhooks.plugins.kind import declare


@dataclass(frozen=True)
class Positions:
    """One distribution per position, as in token classification; divergences are means over chosen positions.

    Args:
        distribution: batch shape `(batch, position)`, or with more axes, such as labels, which are summed.
        chosen: bool `(batch, position)`, the positions that count; at least one per example.
    """

    distribution: Distribution
    chosen: Tensor

    def __post_init__(self) -> None:
        if not bool(self.chosen.any(-1).all()):
            raise UnknownDistributionError(
                "an example has no position whose prediction counts (no label, mask token or valid token). Choose "
                "other positions: wrap(model, output=...) returning Positions(distribution, chosen)"
            )


Outputs = Distribution | Positions | Mapping[str, Distribution | Positions]


@runtime_checkable
class Divergence(Protocol):
    """A function of the original and the masked outputs: one value per example, in nats."""

    def __call__(self, original: Outputs, masked: Outputs, /) -> Float[Tensor, " batch"]: ...


DIVERGENCES = declare("divergence", Divergence, made=True)
#: How an explainer takes a divergence: its name or the function.
DivergenceSetting = Annotated[str | Divergence, DIVERGENCES]


def kl(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """Return KL(original || masked) per example, in nats: heads are summed, positions averaged."""
    return compared(original, masked, _kl)


def prediction_loss(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """Return -log of the masked model's probability of the original prediction, per example, in nats.

    Heads are summed, positions averaged. This is not a divergence: it can be small for an output more confident than
    the original.

    Raises:
        UnknownDistributionError: the outputs are not classes.
    """
    return compared(original, masked, _loss)


@dataclass(frozen=True)
class ClassLoss:
    """-log of the masked model's probability of one class, per example, in nats; the original outputs do not count.

    Args:
        target: the class.

    Raises:
        UnknownDistributionError: the outputs are not classes, or have no class of this number.
    """

    target: int

    def __call__(self, original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
        return compared(original, masked, self._loss)

    def _loss(self, original: Distribution, masked: Distribution) -> Tensor:
        _, other = _bases(original, masked)
        classes = other.logits.shape[-1] if isinstance(other, Categorical) else 2
        if not isinstance(other, (Categorical, Bernoulli)) or not 0 <= self.target < classes:
            what = f"classes 0 to {classes - 1}" if isinstance(other, (Categorical, Bernoulli)) else "no classes"
            raise UnknownDistributionError(
                f"target={self.target} is a class, but the outputs, {type(masked).__name__}, have {what}. Give "
                f"another target, or None for the predicted class"
            )
        if isinstance(other, Categorical):
            return -other.logits[..., self.target]
        return F.softplus(-other.logits if self.target else other.logits)


def lost_lead(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """Return how far another class comes within 0.05 nats of the predicted one, per example; 0 while it leads by more.

    This is `flip_loss` with a lead of 0.05. It suits masks that only need to keep the prediction, at a margin below
    0.05.
    """
    return flip_loss(original, masked, 0.05)


def squared_error(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """Return the sum of squared differences of outputs, per example: log-probabilities, log-odds, or else means.

    Heads are summed, positions averaged.
    """
    return compared(original, masked, _squared_error)


def compared(
    original: Outputs, masked: Outputs, compare: Callable[[Distribution, Distribution], Tensor]
) -> Float[Tensor, " batch"]:
    """Return what a function of two distributions says of outputs, per example: heads are summed, positions averaged.

    A divergence of your own is such a function, and need not know of heads and positions.

    Args:
        compare: gives a number for each place of the distributions' batch shape.
    """
    if isinstance(original, Mapping):
        assert isinstance(masked, Mapping)
        return torch.stack([compared(part, masked[name], compare) for name, part in original.items()]).sum(0)
    if isinstance(original, Positions):
        assert isinstance(masked, Positions)
        values = compare(original.distribution, masked.distribution)
        return _mean(values.flatten(2).sum(2) if values.dim() > 2 else values, original.chosen)
    assert isinstance(masked, Distribution)
    return _per_example(compare(original, masked))


def agreement(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """Return 1 per example if both predict the same, else 0: positions are averaged, and all heads must agree.

    The prediction is the most probable class; for other distributions the mean, rounded for binary ones.
    Continuous predictions agree if they differ by less than one standard deviation of the original.
    """
    if isinstance(original, Mapping):
        assert isinstance(masked, Mapping)
        return torch.stack([agreement(part, masked[name]) for name, part in original.items()]).amin(0)
    if isinstance(original, Positions):
        assert isinstance(masked, Positions)
        same = _same(original.distribution, masked.distribution)
        return _mean(same.flatten(2).amin(2) if same.dim() > 2 else same, original.chosen)
    assert isinstance(masked, Distribution)
    same = _same(original, masked)
    return same.flatten(1).amin(1) if same.dim() > 1 else same


def flip_loss(original: Outputs, masked: Outputs, lead: float = 0.3) -> Float[Tensor, " batch"]:
    """Return how far another class overtakes the predicted one, max(0, min(lead, L) - L_masked) per example, in nats.

    L is the log-odds of the predicted class against the runner-up in the original, L_masked the log-odds of the same
    class against the best other one in the masked outputs. The loss is 0 while the prediction keeps its lead, or
    `lead` of it. Heads are summed, positions averaged; 0 for distributions that are not classes.
    """
    return compared(original, masked, functools.partial(_flip_loss, lead=lead))


def predicted_probability(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """Return the masked model's probability of the original prediction per example: a mean over positions and heads.

    Raises:
        UnknownDistributionError: the outputs are not classes.
    """
    if isinstance(original, Mapping):
        assert isinstance(masked, Mapping)
        return torch.stack([predicted_probability(part, masked[name]) for name, part in original.items()]).mean(0)
    if isinstance(original, Positions):
        assert isinstance(masked, Positions)
        found = (-_loss(original.distribution, masked.distribution)).exp()
        return _mean(found.flatten(2).mean(2) if found.dim() > 2 else found, original.chosen)
    assert isinstance(masked, Distribution)
    found = (-_loss(original, masked)).exp()
    return found.flatten(1).mean(1) if found.dim() > 1 else found


def predicted(outputs: Outputs) -> tuple[Tensor, int] | None:
    """Return each example's predicted class, `(batch,)`, and the number of classes; None without a single class."""
    if isinstance(outputs, Categorical) and outputs.logits.dim() == 2:
        return outputs.logits.argmax(-1), outputs.logits.shape[-1]
    if isinstance(outputs, Bernoulli) and outputs.logits.dim() == 1:
        return (outputs.logits > 0).long(), 2
    return None


def predictions(outputs: Outputs) -> list[str] | None:
    """Return the predicted class of each example as text, heads joined; None if there is no single class."""
    if isinstance(outputs, Mapping):
        heads = {name: predictions(part) for name, part in outputs.items()}
        if any(head is None for head in heads.values()):
            return None
        return [
            ", ".join(f"{n}: {h}" for n, h in zip(heads, row, strict=True)) for row in zip(*heads.values(), strict=True)
        ]
    classes = predicted(outputs)
    return None if classes is None else [str(index) for index in classes[0].tolist()]


def sampled_log_prob(outputs: Outputs) -> Float[Tensor, " batch"]:
    """Return log p(y) per example, in nats, of outcomes y drawn from the outputs themselves with torch's global RNG.

    The mean square of its gradient is the Fisher information, the curvature of `kl`: heads are summed, and the sum over
    n positions is divided by sqrt(n), because their divergences are averaged.

    Raises:
        UnknownDistributionError: no outcomes can be drawn from the outputs, or they have no log-probability.
    """
    if isinstance(outputs, Mapping):
        return torch.stack([sampled_log_prob(part) for part in outputs.values()]).sum(0)
    distribution = outputs.distribution if isinstance(outputs, Positions) else outputs
    try:
        found = distribution.log_prob(distribution.sample())
    except NotImplementedError as error:
        raise UnknownDistributionError(
            "a warm start needs log-probabilities of outcomes drawn from the outputs, but "
            f"{type(distribution).__name__} has no `sample` or no `log_prob`. Define both, or start cold, with "
            "warm_start_batches=0 in the recipe"
        ) from error
    if isinstance(outputs, Positions):
        found = found.flatten(2).sum(2) if found.dim() > 2 else found
        return torch.where(outputs.chosen, found, 0).sum(-1) / outputs.chosen.sum(-1).sqrt()
    return _per_example(found)


def count(outputs: Outputs) -> int:
    """Return the number of examples."""
    if isinstance(outputs, Mapping):
        return count(next(iter(outputs.values())))
    distribution = outputs.distribution if isinstance(outputs, Positions) else outputs
    return int(distribution.batch_shape[0]) if distribution.batch_shape else 1


def parameters(outputs: Outputs) -> list[Tensor]:
    """Return all tensors that determine the distributions."""
    if isinstance(outputs, Mapping):
        return [number for part in outputs.values() for number in parameters(part)]
    distribution = outputs.distribution if isinstance(outputs, Positions) else outputs
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return [getattr(distribution, name) for name in distribution.arg_constraints]


def check(outputs: object) -> Outputs:
    """Return the outputs if they are distributions.

    Raises:
        UnknownDistributionError: the outputs are not distributions.
    """
    if isinstance(outputs, (Distribution, Positions)) or (
        isinstance(outputs, Mapping)
        and outputs
        and all(isinstance(o, (Distribution, Positions)) for o in outputs.values())
    ):
        return outputs
    raise UnknownDistributionError(
        f"outputs of type {type(outputs).__name__} are not a torch.distributions.Distribution. Say what the "
        "model predicts, for example wrap(model, output=lambda outputs: "
        "torch.distributions.Categorical(logits=outputs))"
    )


def _bases(original: Distribution, masked: Distribution) -> tuple[Distribution, Distribution]:
    while isinstance(original, Independent) and isinstance(masked, Independent):
        original, masked = original.base_dist, masked.base_dist
    return original, masked


def _flip_loss(original: Distribution, masked: Distribution, lead: float) -> Tensor:
    base, other = _bases(original, masked)
    if isinstance(base, Categorical) and isinstance(other, Categorical):
        own = base.logits.argmax(-1, keepdim=True)
        before, after = _lead(base.logits, own), _lead(other.logits, own)
    elif isinstance(base, Bernoulli) and isinstance(other, Bernoulli):
        sign = torch.where(base.logits > 0, 1.0, -1.0)
        before, after = sign * base.logits, sign * other.logits
    else:
        return torch.zeros(original.batch_shape, device=masked.mean.device)
    return (before.clamp(max=lead) - after).clamp(min=0)


def _loss(original: Distribution, masked: Distribution) -> Tensor:
    base, other = _bases(original, masked)
    if isinstance(base, Categorical) and isinstance(other, Categorical):
        return -other.logits.gather(-1, base.logits.argmax(-1, keepdim=True)).squeeze(-1)
    if isinstance(base, Bernoulli) and isinstance(other, Bernoulli):
        return F.softplus(torch.where(base.logits > 0, -other.logits, other.logits))
    raise UnknownDistributionError(
        f"a loss against the model's own prediction needs classes, but the outputs are {type(original).__name__}. Use "
        "divergence=maskhooks.model.outputs.kl, or your own function"
    )


def _squared_error(original: Distribution, masked: Distribution) -> Tensor:
    base, other = _bases(original, masked)
    if isinstance(base, Categorical) and isinstance(other, Categorical):
        return ((base.logits - other.logits) ** 2).sum(-1)
    if isinstance(base, Bernoulli) and isinstance(other, Bernoulli):
        return (base.logits - other.logits) ** 2
    return (base.mean - other.mean) ** 2


def _lead(logits: Tensor, own: Tensor) -> Tensor:
    return logits.gather(-1, own).squeeze(-1) - logits.scatter(-1, own, -torch.inf).amax(-1)


def _same(original: Distribution, masked: Distribution) -> Tensor:
    base, other = _bases(original, masked)
    if isinstance(base, Categorical) and isinstance(other, Categorical):
        return (base.logits.argmax(-1) == other.logits.argmax(-1)).float()
    if isinstance(base, Bernoulli) and isinstance(other, Bernoulli):
        return ((base.probs > 0.5) == (other.probs > 0.5)).float()
    return ((base.mean - other.mean).abs() < base.stddev).float()


def _kl(original: Distribution, masked: Distribution) -> Tensor:
    if isinstance(original, Bernoulli) and isinstance(masked, Bernoulli):
        return _kl_bernoulli(original, masked)
    if isinstance(original, Categorical) and isinstance(masked, Categorical):
        return _kl_categorical(original, masked)
    try:
        return kl_divergence(original, masked)
    except NotImplementedError as error:
        raise UnknownDistributionError(
            f"torch.distributions has no KL divergence from {type(original).__name__} to "
            f"{type(masked).__name__}. Give a function of (original, masked) that returns a value per example as "
            "divergence=, or register one with torch.distributions.kl.register_kl"
        ) from error


def _kl_bernoulli(original: Bernoulli, masked: Bernoulli) -> Tensor:
    """From logits: torch's own is infinite where a probability rounds to 1, in float32 at a logit above 17."""
    p, q = original.logits, masked.logits
    yes = F.softplus(-q) - F.softplus(-p)
    no = F.softplus(q) - F.softplus(p)
    return torch.sigmoid(p) * yes + torch.sigmoid(-p) * no


def _kl_categorical(original: Categorical, masked: Categorical) -> Tensor:
    """From logits: torch's own is infinite where a probability rounds to 0, in float32 at a logit 104 lower."""
    further = torch.where(original.probs == 0, 0, original.logits - masked.logits)
    return (original.probs * further).sum(-1)


def _per_example(divergence: Tensor) -> Tensor:
    return divergence.flatten(1).sum(1) if divergence.dim() > 1 else divergence


def _mean(values: Float[Tensor, "batch position"], chosen: Bool[Tensor, "batch position"]) -> Float[Tensor, " batch"]:
    return torch.where(chosen, values, 0).sum(-1) / chosen.sum(-1)
