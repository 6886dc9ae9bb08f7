"""Finds the hidden states that pass through a model's modules without computing anything.

A shell of the model, with its weights on torch's meta device, runs once on a small sample. Nothing is computed, no
memory is used, and the model itself and its hooks are not involved. If a model needs values during the pass, the shell
runs on the CPU with one number in place of each weight. So no table of architectures is needed.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy as duplicate
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskhooks.sites import nested
from maskhooks_transformers import samples
from maskhooks_transformers.marks import Marks
from maskhooks_transformers.samples import BATCH

META = torch.device("meta")
CPU = torch.device("cpu")


class State(NamedTuple):
    """A hidden state among a module's arguments or in its output, with its path in a site's address."""

    path: nested.Path
    tensor: Tensor


@dataclass(eq=False)
class Call:
    """One call of a module in the pass.

    Attributes:
        name: the module's name.
        index: the number of the call of this module, from 0.
        start, end: when it began and ended, on the clock of the pass.
        takes, gives: the first hidden state among the arguments, and in the output, tensors without data.
        graded: whether gradients can flow through it: not inside `torch.no_grad()`.
    """

    name: str
    index: int
    start: int
    end: int = 0
    takes: State | None = None
    gives: State | None = None
    graded: bool = True


class Heads(NamedTuple):
    """The output of attention, heads side by side, as the input of a module.

    Attributes:
        codes: the example, position and head of each number of the state; see `Marks`.
    """

    call: Call
    state: State
    codes: Tensor
    crossed: bool


@dataclass
class Pass:
    """The record of one pass.

    Attributes:
        calls: every call of a module, in the order in which they ended.
        heads: where heads enter their output projection, once per attention.
        projections: calls of modules that map activations back to states, as the last part of an MLP, and the time of
            the activation.
        attentions, choices: when attention was computed, and when experts were chosen, on the clock.
        kind: what a position of the input is: a token, a patch or a frame.
        outputs: the model's outputs.
    """

    kind: str
    outputs: Any = None
    calls: list[Call] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    projections: list[tuple[Call, int]] = field(default_factory=list)
    attentions: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)

    def nodes(self) -> set[Any]:
        """The nodes of the outputs' autograd graph; empty if no graph was kept."""
        reached: set[Any] = {tensor.grad_fn for _, tensor in nested.tensors(self.outputs)} - {None}
        waiting = list(reached)
        while waiting:
            following = {node for node, _ in waiting.pop().next_functions if node is not None} - reached
            reached |= following
            waiting += following
        return reached

    def used(self) -> Callable[[Tensor], bool]:
        """A test of whether the outputs depend on a tensor; true for all tensors if no graph was kept."""
        reached = self.nodes()
        return lambda tensor: not reached or tensor.grad_fn is None or tensor.grad_fn in reached


def trace(model: nn.Module) -> Pass:
    """Run one pass over the first sample that the model accepts.

    Raises:
        Exception: the model's last error, if it accepts none.
    """
    errors: list[Exception] = []
    for device in (META, CPU):
        body = shell(model, device)
        for call in samples.calls(model):
            try:
                return _run(body, call, device)
            # A model's own code may raise anything on a sample that does not fit, such as a TypeError at an argument
            # that is None; the next sample may fit. A bug of ours fails on every sample, so it is raised in the end.
            except Exception as error:  # noqa: PERF203
                errors.append(error)
    raise errors[-1] if errors else LookupError(f"no input of {type(model).__name__} is known")


def _run(body: nn.Module, call: Mapping[str, Tensor], device: torch.device) -> Pass:
    seen = Pass(samples.kind(dict(call)))
    settings = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    watch = _Watch(seen, Marks(values=device is not META))
    with warnings.catch_warnings(), torch.enable_grad(), torch.device(device), watch.on(body), watch.marks:
        warnings.simplefilter("ignore")  # the real pass repeats them
        seen.outputs = body(**{name: tensor.to(device) for name, tensor in call.items()}, **settings)
    return seen


class _Watch:
    """Records a pass."""

    def __init__(self, seen: Pass, marks: Marks) -> None:
        self.seen, self.marks = seen, marks
        self.clock = 0
        self.counts: Counter[str] = Counter()
        self.open: list[Call] = []
        self.known: set[int] = set()
        marks.attended = lambda: seen.attentions.append(self._tick())
        marks.chosen = lambda: seen.choices.append(self._tick())
        marks.activated = self._tick
        marks.projected = lambda moment: seen.projections.append((self.open[-1], moment))

    @contextlib.contextmanager
    def on(self, body: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in body.named_modules():
            handles.append(module.register_forward_pre_hook(self._begin(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._end, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def _begin(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(name, self.counts[name], self._tick(), graded=torch.is_grad_enabled())
            self.counts[name] += 1
            self.open.append(call)
            arguments = dict(_arguments(module, args, kwargs))
            call.takes = _first(arguments)
            if module._parameters and call.graded:
                self._heads(call, arguments)

        return hook

    def _heads(self, call: Call, arguments: Mapping[nested.Path, Any]) -> None:
        for path, value in arguments.items():
            found = self.marks.heads_of(value)
            if found is not None and found.number not in self.known:
                self.known.add(found.number)
                self.seen.heads.append(Heads(call, State(path, value), found.codes, found.crossed))

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.open.pop()
        call.gives = _first(dict(nested.tensors(output)))
        call.end = self._tick()
        self.seen.calls.append(call)


def shell(model: nn.Module, device: torch.device = META) -> nn.Module:
    """Copy a module in eval mode without data, without hooks, and with its class's own forward.

    On the meta device weights and buffers have no values and are in bfloat16 (which every kernel accepts). On the CPU
    each weight is one expanded number, and buffers are copies. Attention kernels that hide the heads are replaced by
    eager attention. Other attributes are shared.
    """
    copies: dict[int, nn.Module] = {}
    configs: dict[int, Any] = {}

    def plain(value: Any) -> Any:
        kernel = vars(value).get("_attn_implementation_internal") if hasattr(type(value), "sub_configs") else None
        if kernel in (None, "eager", "sdpa"):
            return value
        if id(value) not in configs:
            configs[id(value)] = duplicate(value)
            configs[id(value)]._attn_implementation = "eager"
        return configs[id(value)]

    def copy(module: nn.Module) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        new = copies[id(module)] = module.__new__(type(module))
        nn.Module.__init__(new)  # new empty fields, including the tables of hooks
        # An instance's own forward (accelerate's, which moves weights) or compiled call would run the model.
        own = {*vars(new), "forward", "_compiled_call_impl"}
        vars(new).update({key: plain(value) for key, value in vars(module).items() if key not in own})
        new.training = False
        for name, weight in module._parameters.items():
            new._parameters[name] = None if weight is None else _weight(weight, device)
        for name, buffer in module._buffers.items():
            new._buffers[name] = None if buffer is None else _buffer(buffer, device)
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else copy(child)
        return new

    return copy(model)


def _weight(weight: Tensor, device: torch.device) -> nn.Parameter:
    floating = weight.is_floating_point()
    if device == META:
        kind = torch.bfloat16 if floating else weight.dtype
        return nn.Parameter(torch.empty_like(weight, device=device, dtype=kind), floating)
    one = torch.full((), 0.01 if floating else 0, dtype=torch.float32 if floating else weight.dtype)
    return nn.Parameter(one.expand(weight.shape), floating)


def _buffer(buffer: Tensor, device: torch.device) -> Tensor:
    if device == META or buffer.device == META:
        return _weight(buffer, device).detach()
    return buffer.detach().to(device, torch.float32 if buffer.is_floating_point() else buffer.dtype, copy=True)


def _is_state(value: Any) -> bool:
    """Whether a value may be hidden states: floating point, with the batch axis first or second."""
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (3, 4) and BATCH in value.shape[:2]
    )


def _arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[nested.Path, Any]]:
    """A call's arguments in the order of the module's signature, with their paths in an address."""
    names = list(inspect.signature(module.forward).parameters)
    passed = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in sorted(passed, key=lambda name: names.index(name) if name in names else len(names)):
        yield () if names[:1] == [name] else (name,), passed[name]


def _first(values: Mapping[nested.Path, Any]) -> State | None:
    return next((State(path, tensor) for path, tensor in values.items() if _is_state(tensor)), None)
