"""Ranks: the processes of one training run, and what they tell each other in a step.

A global batch is one batch from each rank. Noise is drawn for the global batch on every rank, each rank takes its rows;
an objective sees all examples; gradients are added up. So several processes do what one does with the whole batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Generator, Tensor, nn

from maskhooks.masks.gates import Gate
from maskhooks.masks.samples import GateSamples
from maskhooks.sites.example_index import ExampleIndex

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pooled:
    """What a masked pass did to the global batch; gradients reach this rank's examples only.

    Attributes:
        samples: the gates of all examples; in a row, where there are several ranks.
        divergence, penalty, agreement: per example of all.
    """

    samples: GateSamples
    divergence: Float[Tensor, " example"]
    penalty: Float[Tensor, " example"]
    agreement: Float[Tensor, " example"]


@dataclasses.dataclass(frozen=True)
class Share:
    """One rank's gates among those of the global batch.

    Args:
        start: rows of the ranks before it.
        whole: the shape of the global batch's gates.
    """

    start: int
    whole: Shape

    def of(self, gates: Float[Tensor, "all *longest"], shape: Shape) -> Float[Tensor, "own *size"]:
        """The rank's part, of a shape, of gates for the global batch."""
        begins = (self.start, *(0 for _ in shape[1:]))
        return gates[tuple(slice(begin, begin + size) for begin, size in zip(begins, shape, strict=True))]

    def spread(self, gates: Float[Tensor, "own *size"]) -> Float[Tensor, "all *longest"]:
        """The rank's gates where they are among those of the global batch, zero elsewhere."""
        longer = _padded(gates, (len(gates), *self.whole[1:]))
        before, after = self.start, self.whole[0] - self.start - len(gates)
        return F.pad(longer, [0, 0] * (gates.dim() - 1) + [before, after])

    def drawing(self, gate: Gate) -> Gate:
        """The gate, drawing for the global batch."""
        return _Shared(gate, self)


class Ranks:
    """This process among `world`; alone, everything is as it is.

    Args:
        number: this process's, from 0.
        world: how many there are.
        device: where tensors are exchanged.
    """

    def __init__(self, number: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.number, self.world = number, world
        self.device = device or torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.number == 0

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def everyones(self, value: Any) -> list[Any]:
        """The ranks' objects, in order; for what is small and seldom."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def firsts(self, value: Any) -> Any:
        """The first rank's object."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def shapes(self, shape: Shape | None, axes: int) -> list[Shape]:
        """The gates' shape on every rank; one without a batch has no rows."""
        if self.world == 1 and shape is not None:
            return [tuple(shape)]
        own = torch.tensor(shape or (0,) * axes, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own)
        return [tuple(sizes.tolist()) for sizes in found]

    def share(self, shapes: Sequence[Shape]) -> Share:
        """Which gates of the global batch are this rank's."""
        return Share(sum(shape[0] for shape in shapes[: self.number]), _whole(shapes))

    def add(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum of the ranks' tensors, which are alike in shape."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def not_a_number(self) -> Pooled:
        """Stands for what this rank cannot compute."""
        gates = torch.full((1,), torch.nan, device=self.device)
        first = ExampleIndex(torch.zeros(1, dtype=torch.long, device=self.device), 1)
        samples = GateSamples(gates, gates, torch.ones_like(gates, dtype=torch.bool), first)
        return Pooled(samples, gates, gates, gates)

    def pool(self, own: Pooled | None) -> Pooled:
        """All ranks' examples together, in the order of ranks; their gates in one row, each with its example.

        Args:
            own: this rank's, None for one without a batch.
        """
        held = None if own is None else dataclasses.replace(own, samples=GateSamples.flattened([own.samples]))
        sizes = self.shapes(None if held is None else (len(held.samples.sample), len(held.divergence)), 2)
        packed = _pack(held, _longest(sizes), self.device)
        gathered = [torch.empty_like(packed) for _ in range(self.world)]
        dist.all_gather(gathered, packed.detach())
        gathered[self.number] = packed  # the one that gradients reach
        before = itertools.accumulate((examples for _, examples in sizes), initial=0)
        rows = [_unpack(*of_one, _longest(sizes)) for of_one in zip(gathered, sizes, before, strict=False)]
        parts = (torch.cat(parts) for parts in zip(*rows, strict=True))
        sample, log_open, valid, index, divergence, penalty, agreement = parts
        samples = GateSamples(sample, log_open, valid > 0, ExampleIndex(index.long(), len(divergence)))
        return Pooled(samples, divergence, penalty, agreement)

    def add_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Adds up the ranks' gradients; a weight without one on any rank is left without."""
        if self.world == 1:
            return
        trained = [weight for weight in weights if weight.requires_grad]
        if not trained:
            return
        parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trained]
        known = torch.tensor([float(weight.grad is not None) for weight in trained], device=self.device)
        flat = torch.cat([known, *(part.reshape(-1) for part in parts)])
        dist.all_reduce(flat)
        sums = flat[len(trained) :].split([part.numel() for part in parts])
        for weight, count, total in zip(trained, flat[: len(trained)].tolist(), sums, strict=True):
            weight.grad = total.view_as(weight).clone() if count else None


def first_rank() -> bool:
    """Whether this process is the first of those started together, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _whole(shapes: Sequence[Shape]) -> Shape:
    """The shape of the global batch's gates: rows add up, other axes are as long as the longest."""
    rows, *others = zip(*shapes, strict=True)
    return (sum(rows), *(max(sizes) for sizes in others))


def _longest(sizes: Sequence[Shape]) -> Shape:
    return tuple(max(column) for column in zip(*sizes, strict=True))


def _pack(own: Pooled | None, longest: Shape, device: torch.device) -> Float[Tensor, " number"]:
    """Gates, their examples, and what is known of each example in one flat tensor, padded to the longest."""
    gates, examples = longest
    if own is None:
        return torch.zeros(4 * gates + 3 * examples, device=device)
    samples = own.samples
    assert samples.examples is not None
    by_gate = (samples.sample, samples.log_open, samples.counted, samples.examples.index)
    by_example = (own.divergence, own.penalty, own.agreement)
    rows = [_padded(part.float(), (gates,)) for part in by_gate] + [_padded(p.float(), (examples,)) for p in by_example]
    return torch.cat(rows)


def _unpack(packed: Float[Tensor, " number"], sizes: Shape, before: int, longest: Shape) -> list[Float[Tensor, " _"]]:
    """What one rank has packed; examples are counted on from those before it."""
    (gates, examples), (long, many) = sizes, longest
    parts = packed.split([long, long, long, long, many, many, many])
    sample, log_open, valid, index = (part[:gates] for part in parts[:4])
    return [sample, log_open, valid, index + before, *(part[:examples] for part in parts[4:])]


def _padded(part: Shaped[Tensor, "*size"], shape: Shape) -> Shaped[Tensor, "*longest"]:
    """The part with zeros behind, along each axis, up to a shape."""
    missing = [(0, size - has) for has, size in zip(part.shape, shape, strict=True)]
    return F.pad(part, [count for pair in reversed(missing) for count in pair])


class _Shared(Gate):
    """A gate that samples for the global batch and gives one rank's rows."""

    def __init__(self, gate: Gate, share: Share) -> None:
        self.gate, self.share = gate, share

    def sample(self, logits: Float[Tensor, "*any"], generator: Generator | None = None) -> Float[Tensor, "*any"]:
        return self.share.of(self.gate.sample(self.share.spread(logits), generator), tuple(logits.shape))

    def log_open(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return self.gate.log_open(logits)

    def log_prob(self, sample: Float[Tensor, "*any"], logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return self.gate.log_prob(sample, logits)
