"""Chains: the modules that pass hidden states on, one after another, as seen in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn

from maskhooks.adapter import join
from maskhooks_transformers.flow import Call, Pass

LEAST = 0.1  # of the calls in the longest chain; shorter ones are heads and the like


@dataclass(frozen=True)
class Step:
    """One layer: the call whose input is the state before it, and the one whose output is the state after it."""

    enter: Call
    leave: Call

    def covers(self, moment: int) -> bool:
        return self.enter.start <= moment <= self.leave.end


@dataclass
class Chain:
    """Layers in order. Lists whose members take turns (XLM's attentions, norms, feed-forward parts) make one chain."""

    steps: list[Step]
    merged: list[list[Call]] = field(default_factory=list)

    @property
    def span(self) -> tuple[int, int]:
        return self.steps[0].enter.start, self.steps[-1].leave.end

    def covers(self, moment: int) -> bool:
        return any(step.covers(moment) for step in self.steps)


def chains(base: nn.Module, seen: Pass) -> list[Chain]:
    """The chains of a model in order, those that attend where any does.

    Candidates are lists of modules that fire one after another, each with a state in and a state out, and not all on
    the same one, as experts do. The one with the most calls inside counts first, and those within its span not at all.
    """
    found: list[Chain] = []
    ranked = sorted(_candidates(base, seen), key=lambda calls: -_size(calls, seen))
    for calls in ranked:
        first, last = calls[0].start, calls[-1].end
        around = [chain for chain in found if chain.span[0] <= last and first <= chain.span[1]]
        if not around:
            found.append(Chain([Step(call, call) for call in calls], [calls]))
        elif len(around) == 1 and _take_turns(around[0], calls):
            _merge(around[0], calls)
    found.sort(key=lambda chain: chain.span)
    attend = [chain for chain in found if any(chain.covers(moment) for moment in seen.attentions)]
    largest = max((_size(chain.merged[0], seen) for chain in found), default=0)
    return attend or [chain for chain in found if _size(chain.merged[0], seen) >= LEAST * largest]


def _candidates(base: nn.Module, seen: Pass) -> Iterator[list[Call]]:
    first_names = {id(module): name for name, module in base.named_modules()}
    for name, part in base.named_modules():
        if not isinstance(part, (nn.ModuleList, nn.Sequential)):
            continue
        children = [child for child in part._modules.values() if child is not None]
        if isinstance(part, nn.Sequential) and (len(children) < 2 or len({type(child) for child in children}) > 1):
            continue
        names = {first_names.get(id(child), join(name, "")) for child in children}
        calls = sorted((call for call in seen.calls if call.name in names), key=lambda call: call.start)
        if calls and _is_chain(calls):
            yield calls


def _is_chain(calls: list[Call]) -> bool:
    if any(call.takes is None or call.gives is None for call in calls):
        return False
    for one, other in pairwise(calls):
        shared = one.takes is not None and other.takes is not None and one.takes.tensor is other.takes.tensor
        if other.start < one.end or shared:
            return False
    return True


def _size(calls: list[Call], seen: Pass) -> int:
    """How many calls there are inside."""
    return sum(any(call.start <= one.start <= call.end for call in calls) for one in seen.calls)


def _take_turns(chain: Chain, calls: list[Call]) -> bool:
    """Whether the members of a list fire in turn with those of a chain, outside of them."""
    if len(calls) != len(chain.steps):
        return False
    if any(step.covers(call.start) for group in chain.merged for step in group_steps(group) for call in calls):
        return False
    turns = [
        (min(step.enter.start, call.start), max(step.leave.end, call.end))
        for step, call in zip(chain.steps, calls, strict=True)
    ]
    return all(one[1] < other[0] for one, other in pairwise(turns))


def group_steps(calls: list[Call]) -> list[Step]:
    return [Step(call, call) for call in calls]


def _merge(chain: Chain, calls: list[Call]) -> None:
    chain.merged.append(calls)
    chain.steps = [
        Step(min(step.enter, call, key=lambda one: one.start), max(step.leave, call, key=lambda one: one.end))
        for step, call in zip(chain.steps, calls, strict=True)
    ]
