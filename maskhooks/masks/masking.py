"""Masking: a site, a gate, a baseline and probes together mask a value position by position."""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import einops
import torch
from torch import Generator, Tensor, nn

from maskhooks.errors import PatternError, ReplacementError
from maskhooks.hooks.port import Replacement
from maskhooks.hooks.time_steps import Stepwise
from maskhooks.masks.baselines import Baseline
from maskhooks.masks.gates import Gate
from maskhooks.masks.mix import mix
from maskhooks.masks.votes import Vote
from maskhooks.sites.example_index import Examples
from maskhooks.sites.site import Site
from maskhooks.sites.units import Units


@dataclass(frozen=True)
class Masked:
    """What a masking did to one batch; objectives read it.

    Attributes:
        original: the value h.
        replaced: the value that goes on, z h + (1 - z) b.
        sample: z in [0, 1] over the gated positions; 1 at positions that are not real.
        baseline: b over the feature axes.
        log_open: log P(z != 0) in nats over the gated positions.
        real: which gates are at real positions, as `sample`; of positions gated together, the first alone.
        examples: whose each row is; None where the first axis is the batch.
    """

    original: Tensor
    replaced: Tensor
    sample: Tensor
    baseline: Tensor
    log_open: Tensor
    real: Tensor
    examples: Examples | None = None

    def total(self, gates: Tensor) -> Tensor:
        """The sum over an example's real gates of any number per gate, shape `(batch,)`."""
        real = self.real.flatten(1) if self.real.dim() > 1 else self.real[:, None]
        sums = torch.where(real, gates.reshape(real.shape), 0).sum(1)
        return sums if self.examples is None else self.examples.sums(sums)

    def per_example(self, gates: Tensor) -> Tensor:
        """The mean over an example's real gates of any number per gate, shape `(batch,)`."""
        return self.total(gates) / self.total(torch.ones_like(gates)).clamp(min=1)

    @property
    def expected_l0(self) -> Tensor:
        """The mean P(z != 0) over real positions, the fraction kept in expectation, shape `(batch,)`."""
        return self.per_example(self.log_open.exp())


def draw(gate: Gate, logits: Tensor, generator: Generator | None, examples: Examples | None) -> Tensor:
    """A sample for each logit, drawn example by example: the same in any batch that begins with the same examples.

    A layer of graphs may have its rows in another order, such as a node's messages to itself below all others.
    """
    if examples is None:
        return gate.sample(logits, generator)
    return examples.back(gate.sample(examples.in_order(logits), generator))


def in_a_row(*parts: Masked) -> Masked:
    """What maskings did to a batch, their gates in one row, each with its example."""
    first = parts[0]
    indices = []
    for part in parts:
        rows = len(part.sample)
        own = torch.arange(rows, device=part.sample.device) if part.examples is None else part.examples.index
        indices.append(own.repeat_interleave(part.sample.numel() // max(1, rows)))
    return Masked(
        first.original,
        first.replaced,
        torch.cat([part.sample.flatten() for part in parts]),
        first.baseline,
        torch.cat([part.log_open.flatten() for part in parts]),
        torch.cat([part.real.flatten() for part in parts]),
        Examples(torch.cat(indices), len(first.sample) if first.examples is None else first.examples.count),
    )


class Places(NamedTuple):
    """What is known of a site's positions in a batch.

    Attributes:
        real: bool over the position axes.
        examples: whose each row is; None where the first axis is the batch.
        units: which positions are gated together; None where each is alone.
    """

    real: Tensor
    examples: Examples | None = None
    units: Units | None = None


class Masks(ABC):
    """What one masked pass applies: a masking, or several at once.

    Attributes:
        parts: the maskings, in the order of computation.
        depth: what rows call depth.
    """

    parts: Sequence[Masking]
    depth: int

    @property
    def label(self) -> str:
        """The masked sites, as logs name them."""
        return ", ".join(str(part.site) for part in self.parts)

    @property
    def modules(self) -> list[nn.Module]:
        """What is trained: probes and baselines, each once."""
        return list({id(module): module for part in self.parts for module in part.trained}.values())

    @property
    def reads(self) -> list[Site]:
        """All sites whose values the votes need, and those that are masked."""
        return list(dict.fromkeys(site for part in self.parts for site in part.needed))

    @abstractmethod
    def masked(
        self,
        values: Mapping[str, Tensor],
        places: Callable[[Site], Places],
        generator: Generator | None = None,
        *,
        rounded: float | None = None,
    ) -> list[Masked]:
        """Masks a batch, part by part.

        Args:
            values: by address, the values at `reads`.
            places: for each masked site which positions are real, and whose.
            generator: for the samples.
            rounded: instead of sampling, open the gates with P(z != 0) above this.
        """

    @abstractmethod
    def drawing(self, gates: Sequence[Gate]) -> Masks:
        """The same with another gate for each part, such as one that draws for several processes."""

    def staged(self, progress: float) -> Masks:
        """What takes part in a step, given the fraction of the stages that is over."""
        return self


class Masking(Masks):
    """Masks one site with the product of votes: z = prod_k z_k, P(z != 0) = prod_k P(z_k != 0).

    Hidden states take one vote, read at the site itself. Inputs conditioned on the states up to a depth take one vote
    for each state up to there, each reading input and state (De Cao et al. 2020, section 2.2).

    Args:
        site: what is masked.
        depth: the place of the last site read; what rows of an explanation call depth.
        votes: probes with the sites they read.
        gate: the distribution of each vote.
        baseline: what a closed gate lets through.
    """

    def __init__(self, site: Site, depth: int, votes: Sequence[Vote], gate: Gate, baseline: Baseline) -> None:
        self.site = site
        self.depth = depth
        self.votes = list(votes)
        self.gate = gate
        self.baseline = baseline
        self.sizes: dict[str, Any] = {}  # what the parts were started with

    def __str__(self) -> str:
        read = self.votes[-1].reads[-1:] if self.votes else ()
        return f"{self.site} given {read[0]}" if read and read[0] != self.site else str(self.site)

    @property
    def parts(self) -> Sequence[Masking]:  # type: ignore[override] # it is its own
        return [self]

    def drawing(self, gates: Sequence[Gate]) -> Masking:
        other = copy.copy(self)
        (other.gate,) = gates
        return other

    @property
    def trained(self) -> list[nn.Module]:
        """Probes and baseline."""
        return [*(vote.probe for vote in self.votes), self.baseline]

    @property
    def needed(self) -> list[Site]:
        """All sites whose values the votes need, the masked one first."""
        return list(dict.fromkeys([self.site, *(site for vote in self.votes for site in vote.sites)]))

    def logits(self, values: Mapping[str, Tensor], units: Units | None = None) -> list[Tensor]:
        """The votes' logits over the gated positions, each the mean over its unit."""
        shape = self.site.gating().mask_shape(values[str(self.site)], site=self.site)
        found = [self._vote(vote, values, shape) for vote in self.votes]
        return found if units is None else [units.mean(logits, self.site.gating()) for logits in found]

    def log_open(self, values: Mapping[str, Tensor], units: Units | None = None) -> Tensor:
        """log P(z != 0) over the gated positions, in nats: the sum over votes."""
        found = [self.gate.log_open(logits) for logits in self.logits(values, units)]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def masked(
        self,
        values: Mapping[str, Tensor],
        places: Callable[[Site], Places],
        generator: Generator | None = None,
        *,
        rounded: float | None = None,
    ) -> list[Masked]:
        here = places(self.site)
        return [self(values, here.real, generator, rounded=rounded, examples=here.examples, units=here.units)]

    def __call__(
        self,
        values: Mapping[str, Tensor],
        real: Tensor,
        generator: Generator | None = None,
        *,
        rounded: float | None = None,
        examples: Examples | None = None,
        units: Units | None = None,
    ) -> Masked:
        """Masks a batch.

        Args:
            values: by address, the values at `reads`.
            real: bool over the position axes of the site.
            generator: for the samples.
            rounded: instead of sampling, open the gates with P(z != 0) above this.
            examples: whose each row is, where the first axis is not the batch.
            units: which positions are gated together.
        """
        logits = self.logits(values, units)
        log_open = torch.stack([self.gate.log_open(vote) for vote in logits]).sum(0)
        if rounded is None:
            sample = torch.stack([draw(self.gate, vote, generator, examples) for vote in logits]).prod(0)
        else:
            sample = (log_open > math.log(rounded)).float()
        return self.mask(values[str(self.site)], real, sample, log_open, examples, units)

    def mask(
        self,
        value: Tensor,
        real: Tensor,
        sample: Tensor,
        log_open: Tensor | None = None,
        examples: Examples | None = None,
        units: Units | None = None,
    ) -> Masked:
        """Masks a value with a given sample over the gated positions, whatever the probes say.

        Raises:
            ReplacementError: the value is of whole numbers, which have nothing in between.
        """
        if not (value.is_floating_point() or value.is_complex()):
            raise ReplacementError(
                f"site {self.site}: its values are {value.dtype}, and masks are on floating-point ones. Mask a site "
                "further on, or give the model such inputs, as x.float()",
                site=self.site,
            )
        pattern = self.site.gating()
        sample = sample if units is None else units.shared(sample, pattern)
        log_open = sample.log() if log_open is None else log_open
        counted = self._gates_real(real if units is None else real & units.leads.to(real.device), sample)
        sample = torch.where(self._gates_real(real, sample), sample, 1.0)
        baseline = self.baseline()
        replaced = mix(value, pattern.spread(sample, value), pattern.spread_features(baseline, value))
        return Masked(value, replaced, sample, baseline, log_open, counted, examples)

    def onto(self, masked: Masked, *, anew: bool = False) -> Replacement:
        """The same gates and baseline for another pass: states of a sequence are gated as they come out there.

        Args:
            anew: whether they meet another value than was masked, since another site was masked before this one.
        """
        pattern, value = self.site.gating(), masked.original
        sample, baseline = pattern.spread(masked.sample, value), pattern.spread_features(masked.baseline, value)
        return _Gated(self.site, None if anew else masked.replaced, sample.to(value.dtype), baseline.to(value))

    def _gates_real(self, real: Tensor, like: Tensor) -> Tensor:
        """Real positions as real gates: group axes share their position's."""
        pattern = self.site.gating()
        left = " ".join(pattern.positions)
        right = " ".join(axis if axis in pattern.positions else "1" for axis in pattern.gated)
        return einops.rearrange(real, f"{left} -> {right}").expand_as(like)

    def _vote(self, vote: Vote, values: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        pattern = self.site.gating()
        given = vote.values(values)
        with torch.autocast(values[str(self.site)].device.type, enabled=False):  # or a gate would be bfloat16
            logits: Tensor = vote.probe(given)
        sizes = dict(zip(pattern.gated, shape, strict=True))
        expected = tuple(sizes[axis] for axis in pattern.positions)
        if tuple(logits.shape[:-1]) != expected:
            raise PatternError(
                f"site {self.site} has positions ({', '.join(pattern.positions)}) of shape {list(expected)}, but "
                f"{', '.join(map(str, vote.reads))} gives logits for {list(logits.shape[:-1])}: sites read together "
                f"need the same positions.",
                site=self.site,
            )
        if not pattern.groups:
            return logits.squeeze(-1)
        groups = " ".join(pattern.groups)
        gates: Tensor = einops.rearrange(
            logits,
            f"{' '.join(pattern.positions)} ({groups}) -> {' '.join(pattern.gated)}",
            **{axis: sizes[axis] for axis in pattern.groups},
        )
        return gates


class _Gated(Stepwise):
    """What masking has put in place of a value, or its gates on the states that come out step by step."""

    def __init__(self, site: Site, replaced: Tensor | None, sample: Tensor, baseline: Tensor) -> None:
        self._site, self._replaced, self._sample, self._baseline = site, replaced, sample, baseline

    def __call__(self, value: Tensor) -> Tensor:
        return self._mixed(value, self._sample) if self._replaced is None else self._replaced

    def at(self, step: int) -> Replacement:
        sample = self._sample[:, step : step + 1]
        return lambda state: mix(state, sample, self._baseline)

    def on(self, step: int, state: Tensor) -> Tensor:
        samples, rests, closed, baseline = self._split
        mixed, shut = torch.addcmul(rests[step], state, samples[step]), closed[step]  # mix, without its gradients
        return mixed if shut is None else torch.where(shut, baseline, mixed)

    def rows(self, begin: int, end: int) -> Replacement:
        sample = self._sample[begin:end]
        return lambda part: self._mixed(part, sample)

    def _mixed(self, value: Tensor, sample: Tensor) -> Tensor:
        sizes = list(zip(value.shape, sample.shape, strict=True))
        if any(gates not in (1, size) for size, gates in sizes):
            raise ReplacementError(
                f"site {self._site}: its value has shape {list(value.shape)} behind masks, and its gates are for "
                f"{list(sample.shape)}, as where a model chooses by what it has computed, such as a pooling layer, "
                "or draws edges at random. Mask sites before that place or this one by itself, or draw none",
                site=self._site,
            )
        return mix(value, sample, self._baseline)

    @functools.cached_property
    def _split(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None], Tensor]:
        """By step: the sample, what of the baseline is added, and where gates are closed (None where none is); and
        the baseline of a step.

        An open gate adds -0.0, to which any number may be added without a change.
        """
        sample, closed = self._sample, self._sample == 0
        rest = torch.where(sample == 1, -0.0, (1 - sample) * self._baseline)
        some = closed.flatten(2).any(2).any(0).tolist()
        shut = [part if there else None for part, there in zip(closed.unbind(1), some, strict=True)]
        return sample.unbind(1), rest.unbind(1), shut, self._baseline[0, 0]


def needs(maskings: Sequence[Masks]) -> tuple[list[Site], list[Site]]:
    """The sites that masked passes of these maskings read, and those they go on from, each once."""
    reads = [site for masking in maskings for site in masking.reads]
    return list(dict.fromkeys(reads)), list(dict.fromkeys(part.site for masking in maskings for part in masking.parts))
