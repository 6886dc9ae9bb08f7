"""Outputs as distributions, and how far two of them lie apart.

A model's outputs are a `torch.distributions.Distribution`, a `Positions` (one distribution per position), or
a mapping of several of these, whose divergences add up. The first axis of every batch shape is the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, kl_divergence

from maskhooks.errors import UnknownDistributionError


@dataclass(frozen=True)
class Positions:
    """One distribution per position, as in token classification; divergences are means over chosen positions.

    Args:
        distribution: batch shape `(batch, position)`, or with further axes, such as labels, which add up.
        chosen: bool `(batch, position)`, the positions that count; at least one in each example.
    """

    distribution: Distribution
    chosen: Tensor

    def __post_init__(self) -> None:
        if not bool(self.chosen.any(-1).all()):
            raise UnknownDistributionError(
                "an example has no position whose prediction counts (no label, mask token or real token in "
                "it). Choose others, with wrap(model, output=...) returning Positions(distribution, chosen)"
            )


Outputs = Distribution | Positions | Mapping[str, Distribution | Positions]
Divergence = Callable[[Outputs, Outputs], Float[Tensor, " batch"]]


def kl(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """KL(original || masked) per example, in nats: heads add up, positions are averaged."""
    return _each(original, masked, _kl)


def prediction_loss(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """-log of the probability that the masked model gives to the original's prediction, per example, in nats.

    Heads add up, positions are averaged. It is no divergence: it may be small for an output surer than the original.

    Raises:
        UnknownDistributionError: the outputs are no classes.
    """
    return _each(original, masked, _loss)


def lost_lead(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """`overtaken` with a lead of 0.05: 0 where the predicted class stays ahead, however much the output moves.

    A divergence for masks that are to keep the prediction and nothing else, at a margin below 0.05.
    """
    return overtaken(original, masked, 0.05)


#: Divergences by the name under which settings are saved.
DIVERGENCES: Mapping[str, Divergence] = {"kl": kl, "prediction": prediction_loss, "lost-lead": lost_lead}


def agreement(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """Per example, whether both predict the same: 1 or 0, the mean over positions, all heads at once.

    The prediction is the most probable class; for other distributions the mean, rounded for binary ones.
    Continuous predictions agree where they differ by less than one standard deviation of the original.
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


def overtaken(original: Outputs, masked: Outputs, lead: float = 0.3) -> Float[Tensor, " batch"]:
    """How far another class overtakes the predicted one, max(0, min(lead, L) - L_masked) per example, in nats.

    L is the log-odds of the original's predicted class against the next one in the original, L_masked those of the
    same class against the best other one in the masked outputs: 0 while the prediction keeps its lead, or `lead` of
    it. Heads add up, positions are averaged; 0 for distributions that are no classes.
    """
    return _each(original, masked, functools.partial(_overtaken, lead=lead))


def predicted(outputs: Outputs) -> tuple[Tensor, int] | None:
    """The predicted class of each example, `(batch,)`, and how many classes there are; None where it is not one."""
    if isinstance(outputs, Categorical) and outputs.logits.dim() == 2:
        return outputs.logits.argmax(-1), outputs.logits.shape[-1]
    if isinstance(outputs, Bernoulli) and outputs.logits.dim() == 1:
        return (outputs.logits > 0).long(), 2
    return None


def predictions(outputs: Outputs) -> list[str] | None:
    """The predicted class of each example as text, heads joined; None where it is not a single class."""
    if isinstance(outputs, Mapping):
        heads = {name: predictions(part) for name, part in outputs.items()}
        if any(head is None for head in heads.values()):
            return None
        return [
            ", ".join(f"{n}: {h}" for n, h in zip(heads, row, strict=True)) for row in zip(*heads.values(), strict=True)
        ]
    classes = predicted(outputs)
    return None if classes is None else [str(index) for index in classes[0].tolist()]


def count(outputs: Outputs) -> int:
    """How many examples there are."""
    if isinstance(outputs, Mapping):
        return count(next(iter(outputs.values())))
    distribution = outputs.distribution if isinstance(outputs, Positions) else outputs
    return int(distribution.batch_shape[0]) if distribution.batch_shape else 1


def parameters(outputs: Outputs) -> list[Tensor]:
    """All that determines the distributions."""
    if isinstance(outputs, Mapping):
        return [number for part in outputs.values() for number in parameters(part)]
    distribution = outputs.distribution if isinstance(outputs, Positions) else outputs
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return [getattr(distribution, name) for name in distribution.arg_constraints]


def check(outputs: object) -> Outputs:
    """The outputs, if they are distributions.

    Raises:
        UnknownDistributionError: they are not.
    """
    if isinstance(outputs, (Distribution, Positions)) or (
        isinstance(outputs, Mapping)
        and outputs
        and all(isinstance(o, (Distribution, Positions)) for o in outputs.values())
    ):
        return outputs
    raise UnknownDistributionError(
        f"outputs of type {type(outputs).__name__} are no torch.distributions.Distribution. Say what the "
        "model predicts, for example wrap(model, output=lambda outputs: "
        "torch.distributions.Categorical(logits=outputs))"
    )


def _bases(original: Distribution, masked: Distribution) -> tuple[Distribution, Distribution]:
    while isinstance(original, Independent) and isinstance(masked, Independent):
        original, masked = original.base_dist, masked.base_dist
    return original, masked


def _overtaken(original: Distribution, masked: Distribution, lead: float) -> Tensor:
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
        f"a loss against the model's own prediction needs classes, and outputs are {type(original).__name__}. Use "
        "divergence=maskhooks.model.outputs.kl, or a function of your own"
    )


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
            f"torch.distributions knows no divergence of {type(masked).__name__} from "
            f"{type(original).__name__}. Give one of your own, `divergence=` with a function of (original, "
            "masked) to a value per example, or register one with torch.distributions.kl.register_kl"
        ) from error


def _kl_bernoulli(original: Bernoulli, masked: Bernoulli) -> Tensor:
    """From logits: torch's own is infinite where a probability rounds to 1, which in float32 is a logit
    above 17."""
    p, q = original.logits, masked.logits
    yes = F.softplus(-q) - F.softplus(-p)
    no = F.softplus(q) - F.softplus(p)
    return torch.sigmoid(p) * yes + torch.sigmoid(-p) * no


def _kl_categorical(original: Categorical, masked: Categorical) -> Tensor:
    """From logits: torch's own is infinite where a probability rounds to 0, which in float32 is a logit 104 lower."""
    further = torch.where(original.probs == 0, 0, original.logits - masked.logits)
    return (original.probs * further).sum(-1)


def _each(
    original: Outputs, masked: Outputs, compare: Callable[[Distribution, Distribution], Tensor]
) -> Float[Tensor, " batch"]:
    """A comparison per example: heads add up, positions are averaged."""
    if isinstance(original, Mapping):
        assert isinstance(masked, Mapping)
        return torch.stack([_each(part, masked[name], compare) for name, part in original.items()]).sum(0)
    if isinstance(original, Positions):
        assert isinstance(masked, Positions)
        values = compare(original.distribution, masked.distribution)
        return _mean(values.flatten(2).sum(2) if values.dim() > 2 else values, original.chosen)
    assert isinstance(masked, Distribution)
    return _per_example(compare(original, masked))


def _per_example(divergence: Tensor) -> Tensor:
    return divergence.flatten(1).sum(1) if divergence.dim() > 1 else divergence


def _mean(values: Float[Tensor, "batch position"], chosen: Bool[Tensor, "batch position"]) -> Float[Tensor, " batch"]:
    return torch.where(chosen, values, 0).sum(-1) / chosen.sum(-1)
