"""Evaluation: what groups of maskings do to a set of examples, averaged over samples of gates where it is small."""

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
    """How often gates are sampled for a set: so that it counts as `ENOUGH` examples, at most `MOST` times.

    The mean over a few examples sways with what one sample of their gates happens to drop.

    Args:
        examples: in the set.
        max_draws: draws that there is time for.
    """
    return max(1, min(MOST, max_draws, -(-ENOUGH // max(1, examples))))


@dataclass
class Measure:
    """Means over examples of what one group does: divergence in nats, fraction kept, agreement of predictions."""

    group: MaskingGroup
    rounded: bool = False
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    @torch.no_grad()
    def add(self, clean: Clean, divergence: Divergence, source: Generator) -> None:
        """Adds a batch, with sampled gates and, where asked, with gates rounded at one half."""
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
        """Takes counts and sums of several processes in place of its own."""
        self.count, self.sums = 0, {}
        for count, sums in totals:
            self.count += count
            for key, value in sums.items():
                self.sums[key] = self.sums.get(key, 0.0) + value

    def row(self) -> dict[str, Any]:
        means = {key: total / self.count for key, total in self.sums.items()}
        return {"site": self.group.label, "depth": self.group.depth, **means}


class Evaluation:
    """Means over the examples of a set, and over draws of the gates: as many as the set needs when it is first seen.

    Args:
        hooked, groups, divergence, replay: what is evaluated.
        source: `batch number, group's number[, draw] -> generator` of the samples; the first draw has no number.
        ranks: processes that each have some of the batches.
        rounded: whether gates are rounded at one half too.
        passes: masked passes that several draws may take; None for any number.

    Attributes:
        draws: how many; None before the first set.
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

    def rows(self, batches: Iterable[tuple[int, Any]]) -> list[dict[str, Any]]:
        """A row for each group, the same on all ranks; see `Measure`.

        Args:
            batches: this rank's, each with its number among all, where the model is. They are gone through once; those
                of a set that turns out to be small are held until it has had its draws.
        """
        draws = [self._measures(draw) for draw in range(self.draws or 1)]
        few: list[tuple[int, Any]] = []
        seen = 0
        for number, batch in batches:
            self._add(number, batch, dict(enumerate(draws)))
            seen += 1
            if self.draws is None:
                few.append((number, batch))
            if draws[0][0].count >= ENOUGH:
                few.clear()
        if self.draws is None:
            self.draws = self._decided(draws[0][0].count, seen)
            draws += [self._measures(draw) for draw in range(1, self.draws)]
            for number, batch in few if self.draws > 1 else ():
                self._add(number, batch, dict(list(enumerate(draws))[1:]))
        return self._means(draws)

    def _decided(self, examples: int, batches: int) -> int:
        """The draws of a set of which this rank has these."""
        examples, batches = map(sum, zip(*self.ranks.all_gather((examples, batches)), strict=True))
        once = max(1, batches * len(self.groups))
        return draws_for(examples, MOST if self.passes is None else self.passes // once)

    def _measures(self, draw: int) -> list[Measure]:
        return [Measure(group, rounded=self.rounded and draw == 0) for group in self.groups]

    def _add(self, number: int, batch: Any, draws: dict[int, list[Measure]]) -> None:
        """Adds a batch: one clean pass, and for each draw a masked pass from each masked site onward."""
        clean = clean_pass(self.hooked, batch, reads_of(self.groups), sites_of(self.groups), self.replay)
        for draw, measures in draws.items():
            for index, measure in enumerate(measures):
                source = self.source(number, index, *([draw] if draw else []))
                measure.add(clean, self.divergence, source)

    def _means(self, draws: Sequence[Sequence[Measure]]) -> list[dict[str, Any]]:
        gathered = self.ranks.all_gather([[(one.count, one.sums) for one in measures] for measures in draws])
        for measures, *totals in zip(draws, *gathered, strict=True):
            for measure, *own in zip(measures, *totals, strict=True):
                measure.add_up(own)
        return [_mean([measure.row() for measure in of_one]) for of_one in zip(*draws, strict=True)]


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the rows' numbers; what only the first has, as of rounded gates, as it is."""
    numbers = [key for key in rows[-1] if key not in ("site", "depth")]
    return {**rows[0], **{key: sum(row[key] for row in rows) / len(rows) for key in numbers}}
