"""The adapter: L + 2 sites for a transformer of L layers, as De Cao et al. (2020) count hidden states.

depth 0 is the output of the word-embedding table alone, depth 1 the input of the first layer (positions and
segments added, normalised), depths 2 to L + 1 the outputs of the layers, before any final norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Literal

from torch import nn

from maskhooks.adapter import Adapter, join, stacks
from maskhooks.pattern import Pattern
from maskhooks.site import Site
from maskhooks_transformers import flow
from maskhooks_transformers.flow import Call
from maskhooks_transformers.loaded import model_types

PATTERN = Pattern("batch token hidden -> batch token")
_HIDDEN = frozenset({"hidden"})
_WORDS = frozenset({"hidden", "input"})


class TransformersAdapter(Adapter):
    """Finds the sites of a `PreTrainedModel` from its modules and from what flows through them (see `flow`).

    The layers are the largest ordered stack of modules through which one hidden state passes. Where a layer's
    output is not what the next one takes (a convolution in DeBERTa-v2, a rescaling in RWKV), the site is the
    next one's input. A shared layer has one site for each call, `...@3:output`. A model that cannot be run
    without data (other inputs than token ids, control flow on values) gets the sites that its modules alone
    show: one call of each layer, whose output is a tensor; where that is wrong, tapping the site says so.
    """

    name = "transformers"

    def types(self) -> tuple[type[nn.Module], ...]:
        return model_types()

    def sites(self, name: str, module: nn.Module) -> Iterator[Site]:
        base = getattr(module, "base_model", module)
        prefix = join(name, _name_of(base, module) or "")
        try:
            calls = flow.trace(base)
        except Exception:  # any model's own code ran; whatever it raised, it needs real data
            found = [*_words(base, None), *_stacked(base)]
        else:
            found = [*_words(base, calls), *_layers(_chain(base, calls))]
        for site in found:
            yield Site(join(prefix, site.module), site.port, site.path, site.call, PATTERN, site.tags)


def _words(base: nn.Module, calls: list[Call] | None) -> Iterator[Site]:
    """The output of the word-embedding table; a model that calls it several times embeds its tokens first."""
    table = _embedding(base)
    name = None if table is None else _name_of(table, base)
    if name is None:
        return
    if calls is None:
        if isinstance(table, nn.Embedding):
            yield Site(name, tags=_WORDS)
        return
    own = [call for call in calls if call.name == name]
    if own and own[0].gives is not None:
        yield Site(name, "output", own[0].gives.path, 0 if len(own) > 1 else None, tags=_WORDS)


def _embedding(base: nn.Module) -> nn.Module | None:
    get = getattr(base, "get_input_embeddings", None)
    try:
        table = None if get is None else get()
    except (NotImplementedError, AttributeError):  # how transformers says that there is none
        return None
    return table if isinstance(table, nn.Module) else None


def _chain(base: nn.Module, calls: list[Call]) -> list[Call]:
    """The calls of the layers in order: of the largest stack that passes one hidden state on, step by step.

    Lists whose members take turns (XLM's attentions, norms and feed-forward parts) are no stack of layers.
    """
    found = stacks(base)
    for names in found:
        others = {name for other in found if other is not names for name in other}
        own = [index for index, call in enumerate(calls) if call.name in names]
        if not own or any(call.name in others for call in calls[own[0] : own[-1]]):
            continue
        steps = [calls[index] for index in own]
        if all(step.takes is not None and step.gives is not None for step in steps):
            return steps
    return []


def _layers(steps: list[Call]) -> Iterator[Site]:
    """The input of the first step, and each step's output, or the next one's input where the two differ."""
    if not steps:
        return
    several = {step.name for step in steps if step.index > 0}

    def at(step: Call, port: Literal["input", "output"]) -> Site:
        call = step.index if step.name in several else None
        state = step.takes if port == "input" else step.gives
        return Site(step.name, port, state.path if state else (), call, tags=_HIDDEN)

    yield at(steps[0], "input")
    for step, following in pairwise(steps):
        passed_on = step.gives and following.takes and step.gives.tensor is following.takes.tensor
        yield at(step, "output") if passed_on else at(following, "input")
    yield at(steps[-1], "output")


def _stacked(base: nn.Module) -> Iterable[Site]:
    """The sites of the largest stack, by its modules alone."""
    names = next(iter(stacks(base)), [])
    if names:
        yield Site(names[0], "input", tags=_HIDDEN)
    for name in names:
        yield Site(name, tags=_HIDDEN)


def _name_of(wanted: nn.Module, root: nn.Module) -> str | None:
    return next((name for name, module in root.named_modules() if module is wanted), None)
