"""Ranks: the processes of one training run, and what they exchange in a step.

A global batch is one batch from each rank. Every rank draws noise for the global batch and takes its own rows; an
objective sees all examples; gradients are summed. So several processes compute what one would on the whole batch.
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
    """The results of a masked pass for the global batch; gradients reach this rank's examples only.

    Attributes:
        samples: the gates of all examples; flattened if there are several ranks.
        divergence, penalty, agreement: one number per example of the global batch.
    """

    samples: GateSamples
    divergence: Float[Tensor, " example"]
    penalty: Float[Tensor, " example"]
    agreement: Float[Tensor, " example"]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One rank's slice of the global batch's gates.

    Args:
        start: number of rows on the ranks before it.
        whole: the shape of the global batch's gates.
    """

    start: int
    whole: Shape

    def of(self, gates: Float[Tensor, "all *longest"], shape: Shape) -> Float[Tensor, "own *size"]:
        """Return the rank's slice, with the given shape, of gates for the global batch."""
        begins = (self.start, *(0 for _ in shape[1:]))
        return gates[tuple(slice(begin, begin + size) for begin, size in zip(begins, shape, strict=True))]

    def spread(self, gates: Float[Tensor, "own *size"]) -> Float[Tensor, "all *longest"]:
        """Return gates for the global batch: the rank's gates in their place, zero elsewhere."""
        longer = _padded(gates, (len(gates), *self.whole[1:]))
        before, after = self.start, self.whole[0] - self.start - len(gates)
        return F.pad(longer, [0, 0] * (gates.dim() - 1) + [before, after])

    def normal(self, shape: Shape, generator: Generator) -> Float[Tensor, "own *size"]:
        """Draw standard normal numbers for the whole and return the rank's slice, with the given shape."""
        return self.of(torch.randn(self.whole, generator=generator, device=generator.device), shape)

    def drawing(self, gate: Gate) -> Gate:
        """Return the gate, drawing for the global batch."""
        return _Shared(gate, self)


class Ranks:
    """This process among `world_size` processes; a single process exchanges nothing.

    Args:
        rank: this process's rank, from 0.
        world_size: the number of processes.
        device: the device for exchanging tensors.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self.device = device or torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which writes files and prints."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.world_size == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def all_gather(self, value: Any) -> list[Any]:
        """Gather the ranks' objects, in order; meant for small objects and rare calls."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's object."""
        if self.world_size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def shapes(self, shape: Shape | None, axes: int) -> list[Shape]:
        """Gather the gates' shape on every rank; a rank without a batch has no rows."""
        if self.world_size == 1 and shape is not None:
            return [tuple(shape)]
        own = torch.tensor(shape or (0,) * axes, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(found, own)
        return [tuple(sizes.tolist()) for sizes in found]

    def shard(self, shapes: Sequence[Shape]) -> Shard:
        """Return this rank's slice of the global batch's gates."""
        return Shard(sum(shape[0] for shape in shapes[: self.rank]), _whole(shapes))

    def all_reduce(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Return the sum of the ranks' tensors, which have the same shape."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def not_a_number(self) -> Pooled:
        """Return NaN as the result of a pass that this rank cannot compute."""
        gates = torch.full((1,), torch.nan, device=self.device)
        first = ExampleIndex(torch.zeros(1, dtype=torch.long, device=self.device), 1)
        samples = GateSamples(gates, gates, torch.ones_like(gates, dtype=torch.bool), first)
        return Pooled(samples, gates, gates, gates)

    def pool(self, own: Pooled | None) -> Pooled:
        """Gather all ranks' examples in rank order; their gates are flattened, each with its example index.

        Args:
            own: this rank's results; None if it has no batch.
        """
        held = None if own is None else dataclasses.replace(own, samples=GateSamples.flattened([own.samples]))
        sizes = self.shapes(None if held is None else (len(held.samples.sample), len(held.divergence)), 2)
        packed = _pack(held, _longest(sizes), self.device)
        gathered = [torch.empty_like(packed) for _ in range(self.world_size)]
        dist.all_gather(gathered, packed.detach())
        gathered[self.rank] = packed  # gradients reach only this one
        before = itertools.accumulate((examples for _, examples in sizes), initial=0)
        rows = [_unpack(*of_one, _longest(sizes)) for of_one in zip(gathered, sizes, before, strict=False)]
        parts = (torch.cat(parts) for parts in zip(*rows, strict=True))
        sample, log_open, valid, index, nats, divergence, penalty, agreement = parts
        samples = GateSamples(sample, log_open, valid > 0, ExampleIndex(index.long(), len(divergence)), nats)
        return Pooled(samples, divergence, penalty, agreement)

    def add_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Sum the ranks' gradients; a weight with no gradient on any rank keeps none."""
        if self.world_size == 1:
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
    """Whether this process is the first in its group, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _whole(shapes: Sequence[Shape]) -> Shape:
    """Return the shape of the global batch's gates: rows add up, other axes take the longest."""
    rows, *others = zip(*shapes, strict=True)
    return (sum(rows), *(max(sizes) for sizes in others))


def _longest(sizes: Sequence[Shape]) -> Shape:
    return tuple(max(column) for column in zip(*sizes, strict=True))


def _pack(own: Pooled | None, longest: Shape, device: torch.device) -> Float[Tensor, " number"]:
    """Pack gates, their example indices and each example's results into one flat tensor, padded to the longest."""
    gates, examples = longest
    if own is None:
        return torch.zeros(5 * gates + 3 * examples, device=device)
    samples = own.samples
    assert samples.example_index is not None
    nats = torch.zeros_like(samples.sample) if samples.nats is None else samples.nats
    by_gate = (samples.sample, samples.log_open, samples.counted, samples.example_index.index, nats)
    by_example = (own.divergence, own.penalty, own.agreement)
    rows = [_padded(part.float(), (gates,)) for part in by_gate] + [_padded(p.float(), (examples,)) for p in by_example]
    return torch.cat(rows)


def _unpack(packed: Float[Tensor, " number"], sizes: Shape, before: int, longest: Shape) -> list[Float[Tensor, " _"]]:
    """Unpack one rank's tensor; its example indices continue from the ranks before it."""
    (gates, examples), (long, many) = sizes, longest
    parts = packed.split([long] * 5 + [many] * 3)
    sample, log_open, valid, index, nats = (part[:gates] for part in parts[:5])
    return [sample, log_open, valid, index + before, nats, *(part[:examples] for part in parts[5:])]


def _padded(part: Shaped[Tensor, "*size"], shape: Shape) -> Shaped[Tensor, "*longest"]:
    """Pad the end of each axis with zeros, up to a shape."""
    missing = [(0, size - has) for has, size in zip(part.shape, shape, strict=True)]
    return F.pad(part, [count for pair in reversed(missing) for count in pair])


class _Shared(Gate):
    """A gate that samples for the global batch and returns one rank's rows."""

    def __init__(self, gate: Gate, shard: Shard) -> None:
        self.gate, self.shard = gate, shard

    def sample(self, logits: Float[Tensor, "*any"], generator: Generator | None = None) -> Float[Tensor, "*any"]:
        return self.shard.of(self.gate.sample(self.shard.spread(logits), generator), tuple(logits.shape))

    def log_open(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return self.gate.log_open(logits)

    def log_prob(self, sample: Float[Tensor, "*any"], logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return self.gate.log_prob(sample, logits)
