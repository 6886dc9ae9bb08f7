"""Finds the chains of modules that pass hidden states on, one after another, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn

from maskhooks.model.adapter import join
from maskhooks_transformers.flow import Call, Pass

LEAST = 0.1  # fraction of the calls in the longest chain; shorter chains are heads and the like


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
    merged: list[list[Step]] = field(default_factory=list)

    @property
    def span(self) -> tuple[int, int]:
        return self.steps[0].enter.start, self.steps[-1].leave.end

    def covers(self, moment: int) -> bool:
        return any(step.covers(moment) for step in self.steps)


def chains(base: nn.Module, seen: Pass) -> list[Chain]:
    """The chains of a model in order; only those with attention, if any has it.

    Candidates are lists of modules that fire one after another, each with a state in and a state out, but not on the
    same state, as experts do. A module whose `forward` is called directly does not fire, but its parts do. The
    candidate with the most calls inside is taken first, and those within its span are dropped.
    """
    found: list[Chain] = []
    ranked = sorted(_candidates(base, seen), key=lambda steps: -_size(steps, seen))
    for steps in ranked:
        first, last = steps[0].enter.start, steps[-1].leave.end
        around = [chain for chain in found if chain.span[0] <= last and first <= chain.span[1]]
        if not around:
            found.append(Chain(steps, [steps]))
        elif len(around) == 1 and _take_turns(around[0], steps):
            _merge(around[0], steps)
    found.sort(key=lambda chain: chain.span)
    attend = [chain for chain in found if any(chain.covers(moment) for moment in seen.attentions)]
    largest = max((_size(chain.merged[0], seen) for chain in found), default=0)
    return attend or [chain for chain in found if _size(chain.merged[0], seen) >= LEAST * largest]


def _candidates(base: nn.Module, seen: Pass) -> Iterator[list[Step]]:
    first_names = {id(module): name for name, module in base.named_modules()}
    for name, part in base.named_modules():
        if not isinstance(part, (nn.ModuleList, nn.Sequential)):
            continue
        children = [child for child in part._modules.values() if child is not None]
        if isinstance(part, nn.Sequential) and (len(children) < 2 or len({type(child) for child in children}) > 1):
            continue
        names = list(dict.fromkeys(first_names.get(id(child), join(name, "")) for child in children))
        fired = sorted((call for call in seen.calls if call.name in names), key=lambda call: call.start)
        steps = [Step(call, call) for call in fired] or [step for name in names for step in _parts(name, seen)]
        if steps and _is_chain(steps):
            yield steps


def _parts(name: str, seen: Pass) -> Iterator[Step]:
    """One step from the first to the last part of a module that did not itself fire."""
    inside = sorted((call for call in seen.calls if call.name.startswith(f"{name}.")), key=lambda call: call.start)
    if inside:
        yield Step(inside[0], max(inside, key=lambda call: call.end))


def _is_chain(steps: list[Step]) -> bool:
    if any(step.enter.takes is None or step.leave.gives is None for step in steps):
        return False
    for one, other in pairwise(steps):
        taken = [step.enter.takes.tensor for step in (one, other) if step.enter.takes is not None]
        if other.enter.start < one.leave.end or taken[0] is taken[1]:
            return False
    return True


def _size(steps: list[Step], seen: Pass) -> int:
    """The number of calls inside."""
    return sum(any(step.covers(one.start) for step in steps) for one in seen.calls)


def _take_turns(chain: Chain, steps: list[Step]) -> bool:
    """Whether the members of a list alternate with those of a chain, outside of them."""
    if len(steps) != len(chain.steps):
        return False
    if any(own.covers(step.enter.start) for group in chain.merged for own in group for step in steps):
        return False
    turns = [_both(own, step) for own, step in zip(chain.steps, steps, strict=True)]
    return all(one.leave.end < other.enter.start for one, other in pairwise(turns))


def _merge(chain: Chain, steps: list[Step]) -> None:
    chain.merged.append(steps)
    chain.steps = [_both(own, step) for own, step in zip(chain.steps, steps, strict=True)]


def _both(one: Step, other: Step) -> Step:
    return Step(
        min(one.enter, other.enter, key=lambda call: call.start), max(one.leave, other.leave, key=lambda call: call.end)
    )
