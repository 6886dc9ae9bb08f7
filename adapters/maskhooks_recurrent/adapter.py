"""The adapter for the inputs and hidden states of `nn.RNN`, `nn.GRU` and `nn.LSTM`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from maskhooks.hooks.replay import patch_forward
from maskhooks.hooks.time_steps import Steps
from maskhooks.model.adapter import Adapter, join
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import Site
from maskhooks_recurrent.forward import Tapped
from maskhooks_recurrent.layout import empty_named
from maskhooks_recurrent.recurrence import Recurrent
from maskhooks_recurrent.weights import suffixes

_PATTERN = Pattern("batch token hidden -> batch token")
_TAGS = {"i": frozenset({"input", "hidden"}), "h": frozenset({"hidden"}), "c": frozenset({"cell"})}
_TYPES = (nn.RNN, nn.GRU, nn.LSTM)


class RecurrentAdapter(Adapter):
    """Finds the inputs and the states, step by step, of each layer and direction of RNN, GRU and LSTM modules.

    The sites are `inputs` and `h_l0`, `h_l0_reverse`, ...; in an LSTM also `c_l0`, ... Values are `batch token hidden`,
    whatever the module's layout. A PackedSequence is padded and keeps the order of the batch; an unbatched sequence
    becomes a batch of one. Tags: `input` and `hidden` for the inputs, `hidden` for the
    states h, `cell` for the states c. A cell state is not a bottleneck, because the output gate bypasses it.
    """

    name = "recurrent"

    def types(self) -> tuple[type[nn.Module], ...]:
        return _TYPES

    def sites(self, name: str, module: nn.Module) -> Iterator[Site]:
        for place in self.places(module):
            yield Site(join(name, place), pattern=_PATTERN, tags=_TAGS[place[0]])

    def places(self, module: nn.Module) -> dict[str, nn.Module]:
        if not _known(module):
            return {}
        assert isinstance(module, nn.RNNBase)
        states = "ch" if isinstance(module, nn.LSTM) else "h"
        steps = {f"{state}_{suffix}": Steps() for suffix in suffixes(module) for state in states}
        return {"inputs": nn.Identity(), **steps}

    def expose_sites(
        self, name: str, module: nn.Module, sites: Sequence[Site]
    ) -> contextlib.AbstractContextManager[None]:
        inside = any(site.module != name for site in sites) and _known(module)
        return patch_forward(module, Tapped) if inside else contextlib.nullcontext()

    def recurrence(self, name: str, module: nn.Module) -> Recurrent | None:
        one_way = isinstance(module, nn.RNNBase) and not module.bidirectional and _known(module)
        return Recurrent(module) if one_way and isinstance(module, nn.RNNBase) else None

    @contextlib.contextmanager
    def while_tapped(self, name: str, module: nn.Module) -> Iterator[None]:
        on_gpu = _known(module) and any(weight.is_cuda for weight in module.parameters())
        with empty_named(), patch_forward(module, Tapped) if on_gpu else contextlib.nullcontext():
            yield


def _known(module: nn.Module) -> bool:
    """Whether the module has torch's own forward; nothing is known about any other."""
    return type(module).forward in [kind.forward for kind in _TYPES]
