"""The adapter for the input, hidden states, attention heads and MLPs of a `PreTrainedModel`.

A transformer of L layers has L + 2 hidden states, as De Cao et al. (2020) count: depth 0 is the output of the word
embeddings alone, depth 1 the input of the first layer (positions and segments added, normalised), depths 2 to L + 1 the
outputs of the layers, before any final norm.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from itertools import pairwise

from torch import nn
from torch.autograd import Function

from maskhooks.model.adapter import Adapter, join, stacks
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import Site
from maskhooks_transformers import axes, flow, reversible
from maskhooks_transformers.chains import Chain, Step, chains
from maskhooks_transformers.flow import Call, Pass, State
from maskhooks_transformers.loaded import model_types

PATTERN = Pattern("batch token hidden -> batch token")
_HIDDEN = frozenset({"hidden"})
_INPUT = frozenset({"hidden", "input"})


@dataclasses.dataclass(frozen=True)
class _Found:
    """A site, the time of its value on the clock of the pass, and the layer around it."""

    site: Site
    moment: int
    inside: Step | None = None
    before: Step | None = None


class TransformersAdapter(Adapter):
    """Finds the sites of a Hugging Face model from its modules and from what flows through them (see `flow`).

    Tags: `input`, the word embeddings, or the first map of an image or a recording; `hidden`, the input and the states
    between layers; `head`, the output of attention before its output projection, gated by head (cross-attention is
    also `cross`); `mlp`, what a feed-forward part adds. In an encoder-decoder all sites are also tagged `encoder` or
    `decoder`.

    If the next layer's input is not a layer's output (a convolution in DeBERTa-v2, a rescaling in RWKV), the site is
    the next layer's input. If a layer is several modules in turn (XLM), or its `forward` is called directly
    (SqueezeBERT), the state before the first one is the output of the module that computed it. A shared layer has one
    site for each call, `...@3:output`. A model that cannot run without data gets the sites that its modules alone
    show: one call of each layer, with a tensor as output; if that is wrong, tapping the site raises an error.
    """

    name = "transformers"

    def __init__(self) -> None:
        self._reversible: dict[type[nn.Module], set[type[Function]]] = {}

    def types(self) -> tuple[type[nn.Module], ...]:
        return model_types()

    def sites(self, name: str, module: nn.Module) -> Iterator[Site]:
        base = getattr(module, "base_model", module)
        part, found = base, [*_table(base), *_stacked(base)]
        for body in dict.fromkeys([module, base]):  # a user's network around the base may need other inputs
            with contextlib.suppress(Exception):  # a model's own code may raise anything; then it needs real data
                sites = self._sites(type(module), body)
                if any(site.tags & _INPUT == _HIDDEN for site in sites):
                    part, found = body, sites
                    break
        prefix = join(name, _name_of(part, module) or "")
        for site in found:
            yield dataclasses.replace(site, module=join(prefix, site.module))

    def _sites(self, kind: type[nn.Module], body: nn.Module) -> list[Site]:
        seen = flow.trace(body)
        sites = _numbered(list(_seen(body, seen)))
        hiding = reversible.functions(seen.nodes())
        if hiding and not all(call.graded for call in seen.calls):
            with reversible.opened(hiding):
                opened = _numbered(list(_seen(body, flow.trace(body))))
            if len(opened) > len(sites):
                self._reversible[kind] = hiding
                return opened
        return sites

    def while_tapped(self, name: str, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        return reversible.opened(self._reversible.get(type(module), ()))


def _seen(base: nn.Module, seen: Pass) -> Iterator[_Found]:
    several = {call.name for call in seen.calls if call.index > 0}
    found, used = chains(base, seen), seen.used()

    def at(call: Call, port: str, state: State | None, tags: frozenset[str]) -> Site | None:
        pattern = None if state is None else axes.pattern(state.tensor.shape, seen.kind)
        if state is None or pattern is None or not call.graded or not used(state.tensor):
            return None
        index = call.index if call.name in several else None
        return Site(call.name, "input" if port == "input" else "output", state.path, index, pattern, tags)

    inputs = list(_inputs(base, seen, found))
    for call, tags in inputs:
        site = at(call, "output", call.gives, tags)
        if site is not None:
            yield _Found(site, call.end)
    for chain in found:
        for call, port, moment, step in _states(chain, seen):
            first = not inputs and chain is found[0] and step is None  # no other module computes the layers' input
            site = at(call, port, call.takes if port == "input" else call.gives, _INPUT if first else _HIDDEN)
            if site is not None:
                yield _Found(site, moment, before=step)
        for call in _mlps(chain, seen):
            site = at(call, "output", call.gives, frozenset({"mlp"}))
            if site is not None:
                yield _Found(site, call.end, inside=_step(chain, call))
        for call, state, codes, crossed in seen.heads:
            pattern = axes.heads(codes, seen.kind) if chain.covers(call.start) and used(state.tensor) else None
            if pattern is not None:
                index = call.index if call.name in several else None
                tags = frozenset({"head", "cross"} if crossed else {"head"})
                yield _Found(
                    Site(call.name, "input", state.path, index, pattern, tags), call.start, inside=_step(chain, call)
                )


def _numbered(found: list[_Found]) -> list[Site]:
    """The sites in order of computation, with depths; a part of a layer has the depth of the layer's output."""
    found.sort(key=lambda one: one.moment)
    depths: dict[int, int] = {}
    count = 0
    for one in found:
        if one.inside is None:
            if one.before is not None:
                depths[id(one.before)] = count
            count += 1
    sites, depth = [], 0
    decodes = any("target" in (one.site.pattern or PATTERN).positions for one in found)
    for one in found:
        side = {"decoder" if "target" in (one.site.pattern or PATTERN).positions else "encoder"} if decodes else set()
        place = depth if one.inside is None else depths.get(id(one.inside))
        depth += one.inside is None
        sites.append(dataclasses.replace(one.site, depth=place, tags=one.site.tags | side))
    return sites


def _states(chain: Chain, seen: Pass) -> Iterator[tuple[Call, str, int, Step | None]]:
    """The input of the first step, and each step's output, or the next one's input if the two differ.

    In a step of several modules, others than the first take the input too; if a module computed it, the site is that
    module's output.
    """
    first = chain.steps[0]
    given = [] if first.enter is first.leave else [call for call in seen.calls if _gave(call, first.enter)]
    if given:
        yield given[-1], "output", given[-1].end, None
    else:
        yield first.enter, "input", first.enter.start, None
    for step, following in pairwise(chain.steps):
        gives, takes = step.leave.gives, following.enter.takes
        if gives is not None and takes is not None and gives.tensor is takes.tensor:
            yield step.leave, "output", step.leave.end, step
        else:
            yield following.enter, "input", following.enter.start, step
    last = chain.steps[-1]
    yield last.leave, "output", last.leave.end, last


def _gave(call: Call, other: Call) -> bool:
    """Whether a call's output, or a view of it, is the input of a later one."""
    if call.gives is None or other.takes is None or call.end >= other.start:
        return False
    given, taken = call.gives.tensor, other.takes.tensor
    return given.numel() == taken.numel() and given.untyped_storage()._cdata == taken.untyped_storage()._cdata


def _mlps(chain: Chain, seen: Pass) -> Iterator[Call]:
    """The last linear map of each feed-forward part, and each whole mixture of experts."""
    for step in chain.steps:
        shapes = {state.tensor.shape for state in (step.enter.takes, step.leave.gives) if state is not None}
        inside = [call for call in seen.calls if step.covers(call.start) and call not in (step.enter, step.leave)]
        states = [call for call in inside if call.gives is not None and call.gives.tensor.shape in shapes]

        def within(call: Call, moments: list[int]) -> bool:
            return any(call.start < moment < call.end for moment in moments)

        mixtures = [
            call
            for call in states
            if call.takes is not None and within(call, seen.choices) and not within(call, seen.attentions)
        ]
        outer = [one for one in mixtures if not any(two.start < one.start < two.end for two in mixtures)]
        yield from outer
        for call, activated in seen.projections:
            if (
                call in states
                and step.covers(activated)
                and not any(one.start <= call.start <= one.end for one in outer)
            ):
                yield call


def _inputs(base: nn.Module, seen: Pass, found: list[Chain]) -> Iterator[tuple[Call, frozenset[str]]]:
    """The word embeddings, also the decoder's; or the first map of an image or a recording."""
    calls = sorted((call for call in seen.calls if call.gives is not None), key=lambda call: call.end)
    if seen.kind != "token":
        weighted = [call for call in calls if base.get_submodule(call.name)._parameters]
        first = found[0].steps[0].enter.takes if found and seen.kind == "frame" else None
        wanted = None if first is None else _places(first, seen.kind)
        same = [call for call in weighted if call.gives is not None and _places(call.gives, seen.kind) == wanted]
        if same and found:  # not a part of the first layer, whose input bypasses it
            same = [call for call in same if call.end < found[0].steps[0].enter.start]
            weighted = []
        yield from ((call, _INPUT) for call in (same or weighted)[:1])
        return
    table = _embedding(base)
    own = [call for call in calls if table is not None and base.get_submodule(call.name) is table]
    tables = [call for call in calls if isinstance(base.get_submodule(call.name), nn.Embedding)]
    sides: dict[str, Call] = {}
    for call in [*own, *tables] or calls:  # a decoder may have its own table
        called = axes.names(call.gives.tensor.shape, seen.kind) if call.gives is not None else None
        side = "target" if called is not None and "target" in called else "token"
        sides.setdefault(side, call)
    for side, call in sides.items():
        yield call, _INPUT if side == "token" or len(sides) == 1 else _HIDDEN


def _places(state: State, kind: str) -> int:
    """The number of positions."""
    called = axes.names(state.tensor.shape, kind) or ()
    count = 1
    for axis, size in zip(called, state.tensor.shape, strict=False):
        count *= 1 if axis in ("batch", "hidden", "channel", "stream") else size
    return count


def _step(chain: Chain, call: Call) -> Step | None:
    return next((step for step in chain.steps if step.covers(call.start)), None)


def _embedding(base: nn.Module) -> nn.Module | None:
    get = getattr(base, "get_input_embeddings", None)
    try:
        table = None if get is None else get()
    except (NotImplementedError, AttributeError):  # raised by transformers if there is none
        return None
    return table if isinstance(table, nn.Module) else None


def _table(base: nn.Module) -> Iterator[Site]:
    """The site of the word embeddings, from the modules alone."""
    table = _embedding(base)
    name = None if table is None else _name_of(table, base)
    if name is not None and isinstance(table, nn.Embedding):
        yield Site(name, pattern=PATTERN, tags=_INPUT)


def _stacked(base: nn.Module) -> Iterable[Site]:
    """The sites of the largest stack, from the modules alone."""
    names = next(iter(stacks(base)), [])
    if names:
        yield Site(names[0], "input", pattern=PATTERN, tags=_HIDDEN)
    for name in names:
        yield Site(name, pattern=PATTERN, tags=_HIDDEN)


def _name_of(wanted: nn.Module, root: nn.Module) -> str | None:
    return next((name for name, module in root.named_modules() if module is wanted), None)
