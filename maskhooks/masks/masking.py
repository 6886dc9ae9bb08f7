"""Masking: a site, a gate, a baseline and probes that mask a value position by position."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Generator, Tensor, nn

from maskhooks.errors import PatternError, ReplacementError
from maskhooks.hooks.port import Replacement
from maskhooks.hooks.tap import Values
from maskhooks.masks.baselines import Baseline
from maskhooks.masks.gates import Gate
from maskhooks.masks.replacement import Gated
from maskhooks.masks.samples import Masked
from maskhooks.masks.votes import Vote, value_at
from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.places import Places
from maskhooks.sites.site import Site
from maskhooks.sites.units import Units

Normal = Callable[[tuple[int, ...], Generator], Float[Tensor, "..."]]


def standard_normal(shape: tuple[int, ...], generator: Generator) -> Float[Tensor, "..."]:
    """Return standard normal numbers in float32, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


class Masking:
    """The mask of one site, a product of votes: z = prod_k z_k, P(z != 0) = prod_k P(z_k != 0).

    Hidden states take one vote, read at the site itself. Inputs conditioned on the states up to a depth take one vote
    per depth, each reading input and states (De Cao et al. 2020, section 2.2).

    Args:
        site: the masked site.
        depth: the depth of the last site read, which the rows of an explanation carry.
        votes: probes with the sites they read.
        gate: the distribution of each vote.
        baseline: what replaces a masked value.

    Raises:
        PatternError: the site has no pattern.
    """

    def __init__(self, site: Site, depth: int, votes: Sequence[Vote], gate: Gate, baseline: Baseline) -> None:
        self.site, self.pattern = site, site.gating()
        self.depth = depth
        self.votes = list(votes)
        self.gate = gate
        self.baseline = baseline
        self.sizes: dict[str, Any] = {}  # what `start` was called with
        self._normal: Normal = standard_normal

    def __str__(self) -> str:
        read = self.votes[-1].reads[-1:] if self.votes else ()
        return f"{self.site} given {read[0]}" if read and read[0] != self.site else str(self.site)

    @property
    def modules(self) -> list[nn.Module]:
        """The trained modules: probes and baseline."""
        return [*(vote.probe for vote in self.votes), self.baseline]

    @property
    def reads(self) -> list[Site]:
        """All sites whose values the votes need, the masked one first."""
        return list(dict.fromkeys([self.site, *(site for vote in self.votes for site in vote.sites)]))

    @property
    def noisy(self) -> bool:
        """Whether a sample draws noise in the shape of the site's value."""
        return self.baseline.random

    def drawing(self, gate: Gate, normal: Normal) -> Masking:
        """Return a copy whose gate and noise draw in another way, such as for several processes."""
        other = copy.copy(self)
        other.gate, other._normal = gate, normal
        return other

    def normal(
        self, value: Shaped[Tensor, "*value"], places: Places, generator: Generator | None
    ) -> Float[Tensor, "*value"]:
        """Draw standard normal numbers in the shape of a value, in float32; zeros without a generator."""
        if generator is None:
            return torch.zeros(value.shape, device=value.device)
        found, examples = self._normal(tuple(value.shape), generator).to(value.device), places.example_index
        return found if examples is None else examples.back(found)

    def sizes_for(self, values: Values) -> dict[str, Any]:
        """Return the sizes of the parts, from the values of one batch; see `start`."""
        pattern, value = self.pattern, values[self.site]
        known = pattern.shape(value, site=self.site)

        def features(site: Site) -> int:
            return math.prod(site.gating().feature_shape(value_at(site, values), site=site))

        return {
            "baseline": list(pattern.feature_shape(value, site=self.site)),
            "reads": [[features(site) for site in vote.reads] for vote in self.votes],
            "groups": math.prod(known[axis] for axis in pattern.groups),
        }

    def start(self, sizes: Mapping[str, Any], device: torch.device) -> None:
        """Allocate the parts that no other masking has started yet.

        Args:
            sizes: what `sizes_for` returns, JSON-serialisable: `baseline`, the shape of the baseline; `reads`, for
                each vote the number of features of each site it reads; `groups`, the logits per position.
        """
        self.sizes = dict(sizes)
        if not self.baseline.started:
            self.baseline.start(tuple(sizes["baseline"]))
            self.baseline.to(device, torch.float32).started = True
        for vote, features in zip(self.votes, sizes["reads"], strict=True):
            if not vote.probe.started:
                vote.probe.start(features, sizes["groups"])
                vote.probe.to(device, torch.float32).started = True

    def logits(self, values: Values, units: Units | None = None) -> list[Float[Tensor, "*gated"]]:
        """Return each vote's logits over the gated positions, averaged over units."""
        found = [self._vote(vote, values) for vote in self.votes]
        return found if units is None else [units.mean(logits, self.pattern) for logits in found]

    def probability(self, values: Values, places: Places) -> Float[Tensor, "*gated"]:
        """Return P(z != 0) over the gated positions, the product over votes."""
        return self._log_open(self.logits(values, places.units)).exp()

    def _log_open(self, logits: Sequence[Float[Tensor, "*gated"]]) -> Float[Tensor, "*gated"]:
        """Return log P(z != 0), in nats: the sum over votes."""
        found = [self.gate.log_open(vote) for vote in logits]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def sample(
        self,
        values: Values,
        places: Places,
        generator: Generator | None = None,
        *,
        rounded: float | None = None,
    ) -> Masked:
        """Mask a batch with a sample of the gates.

        Args:
            values: the values read at `reads`.
            places: the positions of the masked site.
            generator: the random generator of the samples.
            rounded: open the gates with P(z != 0) above this, instead of sampling.
        """
        logits = self.logits(values, places.units)
        log_open = self._log_open(logits)
        if rounded is None:
            sample = torch.stack([draw(self.gate, vote, generator, places.example_index) for vote in logits]).prod(0)
        else:
            sample = (log_open > math.log(rounded)).float()
        return self.mask(values[self.site], places, sample, log_open, generator)

    def mask(
        self,
        value: Shaped[Tensor, "*value"],
        places: Places,
        sample: Float[Tensor, "*gated"],
        log_open: Float[Tensor, "*gated"] | None = None,
        generator: Generator | None = None,
    ) -> Masked:
        """Mask a value with a given sample over the gated positions, ignoring the probes.

        Args:
            log_open: log P(z != 0) in nats; default: 0 where the sample is open, -inf where it is closed.
            generator: what a random baseline draws from.

        Raises:
            ReplacementError: the value holds integers, which cannot be mixed.
        """
        if not (value.is_floating_point() or value.is_complex()):
            raise ReplacementError(
                f"site {self.site} has values of type {value.dtype}, but masks need floating-point values. Mask a "
                "later site, or give the model floating-point inputs, such as x.float()",
                site=self.site,
            )
        sample = sample if places.units is None else places.units.shared(sample, self.pattern)
        log_open = (sample != 0).float().log() if log_open is None else log_open
        counted = self._valid_gates(places.unit_heads, sample)
        normal = self.normal(value, places, generator) if self.baseline.random and generator is not None else None
        sample = torch.where(self._valid_gates(places.valid, sample), sample, 1.0)
        return Masked(
            sample,
            log_open,
            counted,
            places.example_index,
            original=value,
            baseline=self.baseline.drawn(value, self.pattern, normal),
            pattern=self.pattern,
        )

    def replacement(self, masked: Masked) -> Replacement:
        """Return the replacement for the site's value in a pass; it gates the value that arrives there."""
        value = masked.original
        return Gated(self.site, self.pattern.spread(masked.sample, value), masked.baseline.to(value))

    def _valid_gates(self, valid: Bool[Tensor, "*positions"], like: Shaped[Tensor, "*gated"]) -> Bool[Tensor, "*gated"]:
        """Return which gates are valid, from the valid positions: group axes share their position's."""
        pattern = self.pattern
        left = " ".join(pattern.positions)
        right = " ".join(axis if axis in pattern.positions else "1" for axis in pattern.gated)
        return einops.rearrange(valid, f"{left} -> {right}").expand_as(like)

    def _vote(self, vote: Vote, values: Values) -> Float[Tensor, "*gated"]:
        pattern, value = self.pattern, values[self.site]
        with torch.autocast(value.device.type, enabled=False):  # otherwise gates would be bfloat16
            logits: Tensor = vote.probe(vote.values(values))
        sizes = pattern.shape(value, site=self.site)
        expected = tuple(sizes[axis] for axis in pattern.positions)
        if tuple(logits.shape[:-1]) != expected:
            raise PatternError(
                f"site {self.site} has positions ({', '.join(pattern.positions)}) of shape {list(expected)}, but "
                f"{', '.join(map(str, vote.reads))} has positions of shape {list(logits.shape[:-1])}. Read sites "
                f"with the same positions together.",
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


def draw(
    gate: Gate, logits: Float[Tensor, "*gated"], generator: Generator | None, examples: ExampleIndex | None
) -> Float[Tensor, "*gated"]:
    """Draw a sample per logit, example by example: the same in any batch that begins with the same examples.

    A graph layer may order its rows differently, such as a node's messages to itself after all others.
    """
    if examples is None:
        return gate.sample(logits, generator)
    return examples.back(gate.sample(examples.in_order(logits), generator))
