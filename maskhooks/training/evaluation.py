"""Evaluation: what groups of maskings do to a data set, averaged over several gate samples if the set is small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator

from maskhooks.distributed.ranks import Ranks
from maskhooks.hooks.replay import Replay
from maskhooks.masks.group import MaskingGroup, reads_of, sites_of
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Divergence, agreement
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.passes.masked import masked_pass

ENOUGH, MOST = 500, 16  # examples times draws, and draws


def draws_for(examples: int, max_draws: int = MOST) -> int:
    """Return how often to sample the gates of a data set: so that it counts as `ENOUGH` examples, at most `MOST` times.

    The mean over a few examples depends on which positions one gate sample happens to drop.

    Args:
        examples: number of examples in the set.
        max_draws: the most draws that there is time for.
    """
    return max(1, min(MOST, max_draws, -(-ENOUGH // max(1, examples))))


@dataclass
class Measure:
    """Means over examples for one group: divergence in nats, fraction kept, agreement of predictions."""

    group: MaskingGroup
    rounded: bool = False
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    @torch.no_grad()
    def add(self, clean: Clean, divergence: Divergence, source: Generator) -> None:
        """Add a batch, with sampled gates and, if `rounded`, also with gates rounded at one half."""
        samples, outputs = masked_pass(clean, self.group, source)
        found = {
            "divergence": divergence(clean.outputs, outputs),
            "expected_l0": samples.expected_l0,
            "agreement": agreement(clean.outputs, outputs),
        }
        if self.rounded:
            samples, outputs = masked_pass(clean, self.group, rounded=0.5)
            found["rounded_divergence"] = divergence(clean.outputs, outputs)
            found["rounded_kept"] = samples.per_example(samples.sample)
            found["rounded_agreement"] = agreement(clean.outputs, outputs)
        for key, values in found.items():
            self.sums[key] = self.sums.get(key, 0.0) + values.sum().item()
        self.count += len(found["divergence"])

    def add_up(self, totals: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Replace its counts and sums by the totals over processes."""
        self.count, self.sums = 0, {}
        for count, sums in totals:
            self.count += count
            for key, value in sums.items():
                self.sums[key] = self.sums.get(key, 0.0) + value

    def row(self) -> dict[str, Any]:
        means = {key: total / self.count for key, total in self.sums.items()}
        return {"site": self.group.label, "depth": self.group.depth, **means}


_Measures = dict[int, Measure]  # by the index of the group


class Evaluation:
    """Means over the examples of a data set and over draws of the gates; the first set decides the number of draws.

    Args:
        hooked, groups, divergence, replay: what is evaluated.
        source: `batch index, group index[, draw] -> generator` of the samples; the first draw has no index.
        ranks: the processes among which the batches are split.
        rounded: whether to measure gates rounded at one half too.
        passes: the most masked passes for several draws; None for no limit.

    Attributes:
        draws: the number of draws; None before the first set.
    """

    def __init__(
        self,
        hooked: Hooked,
        groups: Sequence[MaskingGroup],
        divergence: Divergence,
        source: Callable[..., Generator],
        *,
        replay: Replay | None = None,
        ranks: Ranks | None = None,
        rounded: bool = False,
        passes: int | None = None,
    ) -> None:
        self.hooked, self.groups, self.divergence, self.source = hooked, groups, divergence, source
        self.replay, self.ranks, self.rounded = replay, ranks or Ranks(), rounded
        self.passes = passes
        self.draws: int | None = None

    def rows(self, batches: Iterable[tuple[int, Any]], only: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return a row for each group, the same on all ranks; see `Measure`.

        Args:
            batches: this rank's batches, on the model's device, each with its index among all batches. They are read
                once; the batches of a small set are held in memory for its other draws.
            only: the indices of the groups to measure; None measures all.
        """
        indices = range(len(self.groups)) if only is None else only
        draws = [self._measures(draw, indices) for draw in range(self.draws or 1)]
        few: list[tuple[int, Any]] = []
        seen = 0
        for number, batch in batches:
            self._add(number, batch, dict(enumerate(draws)))
            seen += 1
            if self.draws is None:
                few.append((number, batch))
            if _examples(draws[0]) >= ENOUGH:
                few.clear()
        if self.draws is None:
            self.draws = self._decided(_examples(draws[0]), seen)
            draws += [self._measures(draw, indices) for draw in range(1, self.draws)]
            for number, batch in few if self.draws > 1 else ():
                self._add(number, batch, dict(list(enumerate(draws))[1:]))
        return self._means(draws)

    def _decided(self, examples: int, batches: int) -> int:
        """Return the number of draws, given this rank's numbers of examples and batches."""
        examples, batches = map(sum, zip(*self.ranks.all_gather((examples, batches)), strict=True))
        once = max(1, batches * len(self.groups))
        return draws_for(examples, MOST if self.passes is None else self.passes // once)

    def _measures(self, draw: int, indices: Iterable[int]) -> _Measures:
        return {index: Measure(self.groups[index], rounded=self.rounded and draw == 0) for index in indices}

    def _add(self, number: int, batch: Any, draws: Mapping[int, _Measures]) -> None:
        """Add a batch: one clean pass, and for each draw a masked pass from each masked site onward."""
        groups = [measure.group for measure in next(iter(draws.values())).values()]
        clean = clean_pass(self.hooked, batch, reads_of(groups), sites_of(groups), self.replay)
        for draw, measures in draws.items():
            for index, measure in measures.items():
                source = self.source(number, index, *([draw] if draw else []))
                measure.add(clean, self.divergence, source)

    def _means(self, draws: Sequence[_Measures]) -> list[dict[str, Any]]:
        gathered = self.ranks.all_gather([[(one.count, one.sums) for one in found.values()] for found in draws])
        for found, *totals in zip(draws, *gathered, strict=True):
            for measure, *own in zip(found.values(), *totals, strict=True):
                measure.add_up(own)
        by_group = zip(*(found.values() for found in draws), strict=True)
        return [_mean([measure.row() for measure in of_one]) for of_one in by_group]


def _examples(measures: _Measures) -> int:
    return next(iter(measures.values())).count


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of the rows' numbers; what only the first row has (rounded gates) stays as it is."""
    numbers = [key for key in rows[-1] if key not in ("site", "depth")]
    return {**rows[0], **{key: sum(row[key] for row in rows) / len(rows) for key in numbers}}
