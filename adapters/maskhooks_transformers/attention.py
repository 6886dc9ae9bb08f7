"""Makes a Hugging Face model return its attention weights within a `with`.

`output_attentions` gives weights only with eager attention: fused kernels do not have them. transformers also adds
hooks at the first such pass, which stay on the model. Here both are undone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from maskhooks.errors import ModelError

_WANTED = {"_attn_implementation_internal": "eager", "_output_attentions": True}  # behind properties that check
_HOOKED = "_output_capturing_hooks_installed"
_HOOKS = "transformers.utils.output_capturing"


@contextlib.contextmanager
def returned(model: nn.Module) -> Iterator[None]:
    """A context in which a model computes attention weights without fused kernels, and returns them."""
    settings = [(vars(config), {key: vars(config)[key] for key in _WANTED}) for config in _configs(model)]
    modules = list(model.modules())
    hooks = [(module, set(module._forward_hooks), _HOOKED in vars(module)) for module in modules]
    try:
        for now, _ in settings:
            now.update(_WANTED)
        yield
    finally:
        for now, before in settings:
            now.update(before)
        for module, there, marked in hooks:
            for number, hook in list(module._forward_hooks.items()):
                if number not in there and getattr(hook, "__module__", "") == _HOOKS:
                    del module._forward_hooks[number]
            if not marked:
                vars(module).pop(_HOOKED, None)


def weights(model: nn.Module, result: Any) -> tuple[Tensor, ...]:
    """The attention weights among a model's outputs, for each layer that has some.

    Raises:
        ModelError: there are none, or not only those of positions to positions of one sequence.
    """
    name = type(model).__name__
    kinds = result.items() if isinstance(result, Mapping) else ()
    found = {key: value for key, value in kinds if "attentions" in key and value}  # GPT-2 gives an empty kind
    given: tuple[Tensor | None, ...] | None = found.pop("attentions", None)
    if found:
        raise ModelError(
            f"{name} has attention weights of several kinds ({', '.join(found)}), and one score for each position "
            "needs weights from each position of a sequence to each other. Use LeaveOneOut, Erasure or DiffMask, or "
            "choose weights: wrap(model, attention=lambda model, batch: ...)"
        )
    layers = tuple(layer for layer in given or () if layer is not None)
    if not layers:
        raise ModelError(
            f"{name} returns no attention weights: state-space models, recurrent networks and linear attention have "
            "none. Use LeaveOneOut, Erasure or DiffMask. If it has some, load it with attn_implementation='eager', or "
            "say where they are: wrap(model, attention=...)"
        )
    return layers


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that a model's modules hold, with those inside them."""
    found: dict[int, Any] = {}
    waiting = [value for module in model.modules() for value in vars(module).values()]
    while waiting:
        config = waiting.pop()
        if hasattr(type(config), "sub_configs") and id(config) not in found and vars(config).keys() >= _WANTED.keys():
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())
