"""Flow: which hidden states pass through a model's modules, found without computing anything.

A shell of the model, whose weights are on torch's meta device, runs once on two sequences of three tokens.
Nothing is calculated and no memory is used; the model itself and the hooks on it take no part. Almost every
language model of transformers runs this way, from its class's own forward, so that no table of architectures
is needed.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskhooks import nested

BATCH, TOKENS = 2, 3


class State(NamedTuple):
    """A hidden state among a module's arguments or in its output, with its path as in a site's address."""

    path: nested.Path
    tensor: Tensor


@dataclass(frozen=True)
class Call:
    """One call of a module in the pass.

    Attributes:
        name: the module's name.
        index: which call of this module, from 0.
        takes, gives: the first hidden state among the arguments, and in the output, tensors without
            data.
    """

    name: str
    index: int
    takes: State | None
    gives: State | None


def trace(model: nn.Module) -> list[Call]:
    """Every call of a module below `model` in one pass over token ids, in the order in which the calls ended.

    Raises:
        Exception: whatever the model raises, where it needs the values or inputs other than token ids.
    """
    body = shell(model)
    calls: list[Call] = []
    counts: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(Call(name, counts[name], _taken(module, args, kwargs), _given(output)))
            counts[name] += 1

        return hook

    for name, module in body.named_modules():
        module.register_forward_hook(note(name), with_kwargs=True)
    settings = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    with warnings.catch_warnings(), torch.no_grad(), torch.device("meta"), _NoValues():
        warnings.simplefilter("ignore")  # the real pass gives them again
        body(input_ids=torch.zeros(BATCH, TOKENS, dtype=torch.long), **settings)
    return calls


def shell(model: nn.Module) -> nn.Module:
    """A copy of a module in eval mode without data, without hooks, and with its class's own forward.

    Weights and buffers are on the meta device, in bfloat16 (which every kernel takes); other attributes are
    shared.
    """
    copies: dict[int, nn.Module] = {}

    def copy(module: nn.Module) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        new = copies[id(module)] = module.__new__(type(module))
        nn.Module.__init__(new)  # its own fields start afresh, the tables of hooks among them
        # An instance's own forward (accelerate's, which moves weights) or compiled call would run the model.
        own = {*vars(new), "forward", "_compiled_call_impl"}
        vars(new).update({key: value for key, value in vars(module).items() if key not in own})
        new.training = False
        for name, weight in module._parameters.items():
            new._parameters[name] = None if weight is None else nn.Parameter(_empty(weight), requires_grad=False)
        for name, buffer in module._buffers.items():
            new._buffers[name] = None if buffer is None else _empty(buffer)
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else copy(child)
        return new

    return copy(model)


class _NoValues(TorchFunctionMode):
    """Answers with zero, or False, where a model asks for a single value, as checks of padding do."""

    _ANSWERS: ClassVar[dict[Any, Any]] = {
        Tensor.__bool__: False,
        Tensor.__contains__: False,
        Tensor.__int__: 0,
        Tensor.__index__: 0,
        Tensor.__float__: 0.0,
        torch.equal: False,
        torch.allclose: False,
    }

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.item:
            return False if args[0].dtype == torch.bool else 0
        if function in self._ANSWERS:
            return self._ANSWERS[function]
        return function(*args, **(kwargs or {}))


def _empty(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, device="meta", dtype=torch.bfloat16 if weight.is_floating_point() else None)


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (BATCH, TOKENS)


def _taken(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State | None:
    names = list(inspect.signature(module.forward).parameters)
    passed = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in sorted(passed, key=lambda name: names.index(name) if name in names else len(names)):
        if _is_state(passed[name]):
            return State(() if names[0] == name else (name,), passed[name])
    return None


def _given(output: Any) -> State | None:
    return next((State(path, tensor) for path, tensor in nested.tensors(output) if _is_state(tensor)), None)
