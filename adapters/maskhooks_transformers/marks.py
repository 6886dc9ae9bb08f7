"""Follows attention heads and activations through the operations of one pass.

Labels follow the heads: a tensor of integers parallel to the output of attention, which undergoes the same changes of
shape. Where that output enters a module with weights, the labels give the example, position and head of each number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from maskhooks_transformers.samples import BATCH, DECODED

RADIX = 4096  # more than the heads, or the positions of a sample
_NOT, _LINEAR = -1, 0  # levels of flow; from 1 on, the time of an activation
_WEIGHTED = {"linear", "addmm"}
_CONVOLUTIONS = {"conv1d", "conv2d"}
_PRODUCTS = {"matmul", "bmm", "einsum", "baddbmm", "mm", "rmatmul", *_WEIGHTED, *_CONVOLUTIONS}
_MIXING = {"softmax", "cumsum", "gather", "scatter", "sort", "roll", "index_add", "index_copy", "masked_scatter"}
_ACTIVATIONS = {
    *("gelu", "relu", "silu", "tanh", "sigmoid", "relu6", "hardswish", "hardtanh", "leaky_relu", "elu", "selu"),
    *("mish", "softplus", "hardsigmoid", "prelu", "erf", "expm1", "square"),
}
_SHAPING = {
    *("view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("movedim", "moveaxis", "swapaxes", "swapdims", "getitem", "narrow", "chunk", "split", "tensor_split", "unbind"),
    *("expand", "select", "cat", "concat", "flip", "view_as", "reshape_as", "stack", "split_with_sizes", "clone"),
}


class Label(NamedTuple):
    """The heads of one attention.

    Attributes:
        number: the index of the attention in the pass.
        codes: `(example * RADIX + position) * RADIX + head` for each number of the tensor.
        crossed: whether it is cross-attention.
    """

    number: int
    codes: Tensor
    crossed: bool


class Marks(TorchFunctionMode):
    """Follows tensors while it is active.

    Args:
        values: whether tensors have values; if not, a model that asks for a single one (as checks of padding do) gets
            zero, or False.

    Attributes:
        attended, chosen: called when attention is computed, and when experts are chosen.
        activated: called when an activation is computed; returns the time.
        projected: called with that time when activations enter a linear map.
    """

    _ANSWERS: ClassVar[dict[Any, Any]] = {
        Tensor.__bool__: False,
        Tensor.__contains__: False,
        Tensor.__int__: 0,
        Tensor.__index__: 0,
        Tensor.__float__: 0.0,
        torch.equal: False,
        torch.allclose: False,
    }

    def __init__(self, *, values: bool) -> None:
        super().__init__()
        self.values = values
        self.attended: Callable[[], object] = lambda: None
        self.chosen: Callable[[], object] = lambda: None
        self.activated: Callable[[], int] = lambda: 1
        self.projected: Callable[[int], object] = lambda moment: None
        self._labels: Any = WeakTensorKeyDictionary()
        self._weights: Any = WeakTensorKeyDictionary()  # attention's, after softmax
        self._flow: Any = WeakTensorKeyDictionary()
        self._numbers = itertools.count()

    def heads_of(self, value: Any) -> Label | None:
        """The label of a tensor that holds attention heads side by side."""
        found: Label | None = self._labels.get(value) if isinstance(value, Tensor) else None
        return found

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.values:
            if function is Tensor.item:
                return False if args[0].dtype == torch.bool else 0
            if function in self._ANSWERS:
                return self._ANSWERS[function]
        name = getattr(function, "__name__", "").strip("_")
        result = _of_one(*args[:2]) if name == "grouped_mm" and _is_one(*args[1:2]) else function(*args, **kwargs)
        if name not in ("get", "set", "size", "dim"):
            self._follow(name, function, args, kwargs, result)
        return result

    def _follow(self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        inputs = list(_inside([*args, *kwargs.values()]))
        if name == "scaled_dot_product_attention":
            self.attended()
            query, key = (*args, kwargs.get("query"), kwargs.get("key"))[:2]
            self._label(result, tuple(range(1, result.dim() - 2)), query.shape[-2] != key.shape[-2])
        elif name == "multi_head_attention_forward":  # includes the output projection: no module takes its heads
            self.attended()
        elif name == "softmax":
            self._weights[result] = True
        elif name == "topk":
            self.chosen()
        elif name in _PRODUCTS:
            self._product(name, args, inputs, result)
        elif isinstance(result, (Tensor, tuple, list)):
            self._onward(name, function, args, kwargs, inputs, result)

    def _product(self, name: str, args: tuple[Any, ...], inputs: list[Tensor], result: Tensor) -> None:
        if not inputs:
            return
        first = self._flow.get(inputs[1] if name == "addmm" else inputs[0], _NOT)
        second = inputs[1] if len(inputs) > 1 else inputs[0]
        matrix = (name in ("matmul", "mm") and second.dim() == 2) or (name == "conv1d" and second.shape[-1] == 1)
        if name in _WEIGHTED or matrix:
            if first > _LINEAR:
                self.projected(first)
            self._flow[result] = _LINEAR
        elif name in _CONVOLUTIONS:
            self._flow[result] = min(first, _LINEAR)
        elif inputs[0] in self._weights:
            self.attended()
            heads = _einsum_heads(args[0], result) if name == "einsum" else tuple(range(1, result.dim() - 2))
            if heads is not None:
                queries, keys = inputs[0].shape[-2:]  # blocks of a sequence have more keys too, but not a decoder's
                self._label(result, heads, queries == DECODED != keys)

    def _label(self, result: Tensor, heads: tuple[int, ...], crossed: bool) -> None:
        """Label the output of attention: examples first, or examples and heads in one axis; features last.

        The axes between, except heads, are positions, in blocks if there are several.
        """
        shape = result.shape
        if result.dim() < 3 or shape[0] % BATCH:
            return
        heads = heads if shape[0] == BATCH else ()
        positions = tuple(axis for axis in range(1, result.dim() - 1) if axis not in heads)
        rows = torch.arange(shape[0], device="cpu") // (shape[0] // BATCH)
        head = torch.arange(shape[0], device="cpu") % (shape[0] // BATCH)
        codes = _along(rows * RADIX * RADIX + head, 0, result.dim())
        for axes, unit in ((positions, RADIX), (heads, 1)):
            for axis in reversed(axes):
                codes = codes + _along(torch.arange(shape[axis], device="cpu") * unit, axis, result.dim())
                unit *= shape[axis]
        self._labels[result] = Label(next(self._numbers), codes.expand(shape), crossed)

    def _onward(
        self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], result: Any
    ) -> None:
        outputs = list(_inside([result]))
        labelled = next((self._labels[one] for one in inputs if one in self._labels), None)
        if labelled is not None:
            self._relabel(name, function, args, kwargs, inputs, outputs, labelled)
        if any(one in self._weights for one in inputs) and name not in _MIXING:
            for output in outputs:
                self._weights[output] = True
        level = self._level(name, inputs, outputs)
        for output in outputs if level > _NOT else ():
            self._flow[output] = level

    def _relabel(
        self,
        name: str,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
        label: Label,
    ) -> None:
        if name in _SHAPING:
            function = Tensor.reshape if name == "view" else function  # labels have other strides
            if name in ("cat", "concat", "stack") and not all(one in self._labels for one in inputs):
                if name != "stack" and len(outputs) == 1:
                    self._beside(args, kwargs, outputs[0], label)
                return
            codes = list(_inside([function(*self._swapped(args), **self._swapped(kwargs))]))
            for output, code in zip(outputs, codes, strict=True):
                self._labels[output] = label._replace(codes=code)
        elif name not in _MIXING and len(outputs) == 1:
            like = next((one for one in inputs if one in self._labels and one.shape == outputs[0].shape), None)
            if like is not None:
                self._labels[outputs[0]] = self._labels[like]

    def _beside(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, label: Label) -> None:
        """Count what is concatenated to heads along their axis, such as ConvBERT's convolutions, as more heads."""
        axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        parts, count = [], 0
        for part in kwargs.get("tensors", args[0] if args else ()):
            found = self._labels.get(part)
            size = part.shape[axis]
            if found is not None and not _is_range(found.codes, axis):
                return
            codes = (label if found is None else found).codes.narrow(axis, 0, 1)
            parts.append(codes + _along(torch.arange(size) + count, axis % part.dim(), part.dim()))
            count += size
        self._labels[output] = label._replace(codes=torch.cat(parts, axis))

    def _swapped(self, value: Any) -> Any:
        """The same arguments with labelled tensors replaced by their labels."""
        if isinstance(value, Tensor):
            return self._labels[value].codes if value in self._labels else value
        if isinstance(value, dict):
            return {key: self._swapped(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._swapped(item) for item in value)
        return value

    def _level(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """The level of the results; not `_NOT` only if linear maps and activations alone, per position, made them."""
        levels = [self._flow.get(one, _NOT) for one in inputs]
        most = max(levels, default=_NOT)
        if most == _NOT or name in _MIXING:
            return _NOT
        if name not in _SHAPING:
            sizes = {output.numel() for output in outputs}
            if any(level == _NOT and one.numel() in sizes for one, level in zip(inputs, levels, strict=True)):
                return _NOT
        return self.activated() if name in _ACTIVATIONS else most


def _is_one(weights: Any = None) -> bool:
    """Whether weights are one expanded number (a shell on the CPU), which some kernels reject."""
    return isinstance(weights, Tensor) and weights.dim() == 3 and not any(weights.stride())


def _of_one(tokens: Tensor, weights: Tensor) -> Tensor:
    """A product of the right shape that depends on both, without the kernel for experts."""
    return tokens[:, :1] @ weights[0, :1]


def _inside(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inside(value)


def _along(values: Tensor, axis: int, dims: int) -> Tensor:
    return values.view([-1 if one == axis else 1 for one in range(dims)])


def _is_range(codes: Tensor, axis: int) -> bool:
    """Whether heads 0, 1, 2, ... lie along an axis."""
    first = codes.narrow(axis, 0, 1)
    steps = _along(torch.arange(codes.shape[axis], device="cpu"), axis % codes.dim(), codes.dim())
    return not bool((first % RADIX).any()) and torch.equal(codes, first + steps)


def _einsum_heads(equation: Any, result: Tensor) -> tuple[int, ...] | None:
    """The head axes of an `einsum` of attention weights and values: letters of both operands and the result."""
    if not isinstance(equation, str) or "->" not in equation or equation.count(",") != 1:
        return None
    whole = equation.replace(" ", "")
    whole = whole.replace("...", "ABCDEF"[: result.dim() - len(whole.split("->")[1].replace("...", ""))])
    operands, out = whole.split("->")
    shared = [axis for axis, letter in enumerate(out) if all(letter in operand for operand in operands.split(","))]
    if shared[:1] != [0] or result.shape[0] % BATCH:
        return None
    return tuple(axis for axis in shared[1:] if out[axis].islower())
