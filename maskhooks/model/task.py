"""Tasks: how a batch becomes a call, which positions are real, what they are called, what outputs mean."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor, nn

from maskhooks.errors import BatchError
from maskhooks.model import outputs
from maskhooks.model.outputs import Outputs
from maskhooks.plugins.kind import declare
from maskhooks.sites import nested
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.signature import signature
from maskhooks.sites.site import Site
from maskhooks.sites.units import undirected

_known: WeakKeyDictionary[FunctionType, int] = WeakKeyDictionary()  # arguments that functions take


class Task:
    """What holds for a whole model. This class serves any model; each method may be given to `wrap`.

    Args:
        call: `(model, batch) -> outputs`. Default: a mapping is passed by keyword, a tuple or list by
            position (as many items as the model's forward takes, so that trailing labels are left out),
            anything else as it is.
        output: `outputs -> distribution` or `(outputs, batch) -> distribution`.
        valid: `batch -> bool tensor` over the sites' position axes, True where a position is no padding; or
            `(batch, site) -> ...` where sites differ. It may go on where a site has ended, with False alone, as where
            the longest packed sequence is shorter than its batch is wide. Default: all positions are real.
        names: `batch -> names`, a list per example of what its positions are called.
        perturb: `(batch, generator) -> batch`, another input of the same shape and padding, for the bypass test.
        example_index: `batch -> numbers`, or `(batch, site) -> ...`: the example index of each row, where the first
            axis of a value is not the batch axis, as with edges of many graphs.
        edges: `batch -> {"source": numbers, "target": numbers}`, or `(batch, site) -> ...`: which nodes the positions
            of a site connect, numbered within their example; with `relation` where there are several kinds.
        select: `(batch, numbers) -> batch`, the examples with these numbers, each as often as it is listed. Default:
            the rows of each tensor that has one for each example.
        units: `batch -> whole numbers` over the sites' position axes, or `(batch, site) -> ...`: positions of an
            example with the same number are gated together, as the pieces of a word. "undirected": edges between the
            same two nodes, in both directions. Default: each position alone.
    """

    name = "function"
    # What `given` takes; a subclass adds its own.
    options: tuple[str, ...] = (
        "call",
        "output",
        "valid",
        "names",
        "perturb",
        "example_index",
        "edges",
        "select",
        "units",
    )

    def __init__(
        self,
        *,
        call: Callable[[nn.Module, Any], Any] | None = None,
        output: Callable[..., Outputs] | None = None,
        valid: Callable[..., Tensor] | None = None,
        names: Callable[[Any], Sequence[Sequence[str]]] | None = None,
        perturb: Callable[[Any, Generator], Any] | None = None,
        example_index: Callable[..., Tensor] | None = None,
        edges: Callable[..., Mapping[str, Tensor]] | None = None,
        select: Callable[[Any, Sequence[int]], Any] | None = None,
        units: Callable[..., Tensor] | str | None = None,
    ) -> None:
        self._call, self._output, self._valid, self._names, self._perturb = call, output, valid, names, perturb
        self._example_index, self._edges, self._select, self._units = example_index, edges, select, units

    def types(self) -> tuple[type[nn.Module], ...]:
        """The model types that a plugin's task serves; the most derived claim wins, as with adapters."""
        return ()

    def serve(self, model: nn.Module) -> Task:
        """The task for one model of a claimed type; a plugin may return a task that knows the model."""
        return self

    def given(self, functions: Mapping[str, Any]) -> Task:
        """This task with the user's own functions in front; a plugin's task may take further `options`.

        Raises:
            BatchError: an option that this task does not have.
        """
        unknown = set(functions) - set(self.options)
        if unknown:
            raise BatchError(
                f"task {self.name!r} takes no {', '.join(sorted(unknown))}; it takes {', '.join(self.options)}"
            )
        task = copy.copy(self)
        for key, function in functions.items():
            setattr(task, f"_{key}", function)
        return task

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Runs the model on a batch.

        Raises:
            BatchError: the batch does not fit the model's forward.
        """
        if self._call is not None:
            return self._call(model, batch)
        args, kwargs = self.arguments(model, batch)
        try:
            signature(model).bind(*args, **kwargs)
        except TypeError as error:
            raise BatchError(
                f"the batch, {nested.describe(batch)}, does not fit {type(model).__name__}.forward"
                f"{signature(model)}: {error}. Say how to call it: "
                f"wrap(model, call=lambda model, batch: model(batch['x']))"
            ) from error
        return model(*args, **kwargs)

    def arguments(self, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments made from a batch."""
        if isinstance(batch, Mapping):
            return (), {str(key): value for key, value in batch.items()}
        if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
            kinds = [parameter.kind for parameter in signature(model).parameters.values()]
            takes = sum(
                kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds
            )
            return (tuple(batch) if inspect.Parameter.VAR_POSITIONAL in kinds else tuple(batch)[:takes]), {}
        return (batch,), {}

    def distribution(self, result: Any, batch: Any) -> Outputs:
        """The model's outputs as distributions.

        Raises:
            UnknownDistributionError: nothing says what they are.
        """
        return outputs.check(_apply(self._output, result, batch) if self._output is not None else result)

    def valid(self, site: Site, batch: Any, value: Tensor) -> Bool[Tensor, "*positions"]:
        """Which positions of a site are real, over the position axes of its pattern.

        Raises:
            BatchError: the mask given has another shape.
        """
        pattern = site.gating()
        sizes = pattern.shape(value, site=site)
        shape = tuple(sizes[axis] for axis in pattern.positions)
        if self._valid is None:
            return torch.ones(shape, dtype=torch.bool, device=value.device)
        return self._fit(self._mask(site, batch, value), shape, site, pattern)

    def _mask(self, site: Site, batch: Any, value: Tensor) -> Tensor:
        """What the user's function says is real, as it is."""
        return torch.as_tensor(_apply(self._valid, batch, site)).to(value.device).bool()

    def _fit(self, mask: Tensor, shape: tuple[int, ...], site: Site, pattern: Pattern) -> Tensor:
        if _ends(mask, shape):
            return mask[_within(shape)]
        if tuple(mask.shape) != shape:
            raise BatchError(
                f"the mask of real positions has shape {list(mask.shape)}, site {site} has positions "
                f"({', '.join(pattern.positions)}) of shape {list(shape)}. Give a function of (batch, site) "
                "that fits each: wrap(model, valid=lambda batch, site: ...)"
            )
        return mask

    def units(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Int[Tensor, "*positions"] | None:
        """A number for each position of a site, equal where positions of an example are gated together; None where each
        is alone.

        Args:
            values: as `example_index` gets them.

        Raises:
            BatchError: the numbers given have another shape, or are no whole numbers; or a word is given that
                this task does not know.
        """
        value = values[str(site)]
        if self._units is None:
            return None
        if isinstance(self._units, str):
            return self._named_units(site, batch, values)
        numbers = torch.as_tensor(_apply(self._units, batch, site)).to(value.device)
        sizes = site.gating().shape(value, site=site)
        shape = [sizes[axis] for axis in site.gating().positions]
        if list(numbers.shape) != shape and self._valid is not None:
            mask = self._mask(site, batch, value)
            numbers = numbers[_within(shape)] if mask.shape == numbers.shape and _ends(mask, shape) else numbers
        if list(numbers.shape) != shape or numbers.is_floating_point():
            raise BatchError(
                f"the units have shape {list(numbers.shape)} and type {str(numbers.dtype).removeprefix('torch.')}, "
                f"site {site} has positions ({', '.join(site.gating().positions)}) of shape {shape}. Give a whole "
                f"number for each, equal where positions belong together: wrap(model, units=lambda batch, site: ...)"
            )
        return numbers

    def _named_units(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Int[Tensor, " row"] | None:
        """The units that a word means."""
        if self._units != "undirected" or self._edges is None:
            raise BatchError(
                f"units={self._units!r}: the task {self.name!r} does not know which positions these are. Give a "
                f"function: wrap(model, units=lambda batch: ...), with a whole number for each position"
            )
        found = self.edges(site, batch, values)
        if found is None:
            return None
        columns = [torch.as_tensor(found[name]) for name in ("source", "target", "relation") if name in found]
        whose = self.example_index(site, batch, values)
        return undirected(*columns, *([] if whose is None else [whose.to(columns[0].device)]))

    @property
    def together(self) -> str | None:
        """What is gated together, in a word: the one given for `units`, or "function"; None where nothing is."""
        return self._units if self._units is None or isinstance(self._units, str) else "function"

    def beside(self, site: Site) -> Sequence[Site]:
        """Sites that are read wherever this one is, since `example_index` and `edges` need their values."""
        return ()

    def example_index(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Int[Tensor, " row"] | None:
        """The number of each row's example, where the first axis of a site is no batch; None where it is.

        Args:
            values: by address, of this site and those `beside` it.
        """
        return None if self._example_index is None else torch.as_tensor(_apply(self._example_index, batch, site))

    def edges(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Mapping[str, Int[Tensor, " row"]] | None:
        """What rows of an explanation tell of each edge: `source` and `target`, numbered within its example, `relation`
        where there are several kinds, or other columns; None where rows are no edges."""
        return None if self._edges is None else _apply(self._edges, batch, site)

    def names(self, site: Site, batch: Any) -> Sequence[Sequence[str]] | None:
        """What the positions are called, a list per example; None where nothing is known."""
        return self._names(batch) if self._names is not None else None

    def predictions(self, result: Outputs) -> Sequence[str] | None:
        """What the model predicts for each example, in words; None where there is no single class."""
        return outputs.predictions(result)

    def targets(self, batch: Any) -> Sequence[str] | None:
        """The examples' labels in words, where the batch holds them."""
        return None

    def select(self, batch: Any, numbers: Sequence[int], count: int) -> Any:
        """The examples of a batch with these numbers, each as often as it is listed.

        Args:
            count: how many the batch has.
        """
        if self._select is not None:
            return self._select(batch, numbers)
        chosen = batch
        for path, tensor in nested.tensors(batch):
            if tensor.dim() and len(tensor) == count:
                chosen = nested.put(chosen, path, tensor[torch.as_tensor(numbers, device=tensor.device)])
        return chosen

    def picked(self, batch: Any, numbers: Sequence[int]) -> Any | None:
        """As `select`, where rows are no batch; None where it is not known how."""
        return None if self._select is None else self._select(batch, numbers)

    def perturb(self, batch: Any, generator: Generator) -> Any | None:
        """Another input of the same shape and padding, for the bypass test; None where none can be made.

        Default: floating-point tensors and token ids are permuted among the real positions of the whole
        batch; masks, lengths and labels (bool, or one number an example) stay.
        """
        if self._perturb is not None:
            return self._perturb(batch, generator)
        valid = torch.as_tensor(_apply(self._valid, batch, None)).bool() if self._takes_batch_only() else None
        varied = batch
        for path, tensor in nested.tensors(batch):
            if tensor.is_nested or tensor.layout is not torch.strided:
                continue  # whose rows cannot be taken by number
            if tensor.dtype == torch.bool or tensor.dim() < 2 or (valid is None and not tensor.is_floating_point()):
                continue
            if valid is None:
                order = torch.randperm(len(tensor), generator=generator)
                varied = nested.put(varied, path, tensor[order.to(tensor.device)])
            elif tensor.shape[: valid.dim()] == valid.shape and not torch.equal(tensor, valid.to(tensor)):
                rows = tensor[valid.to(tensor.device)]
                order = torch.randperm(len(rows), generator=generator).to(tensor.device)
                changed = tensor.clone()
                changed[valid.to(tensor.device)] = rows[order]
                varied = nested.put(varied, path, changed)
        pairs = zip(nested.tensors(batch), nested.tensors(varied), strict=True)
        return None if all(old is new or torch.equal(old, new) for (_, old), (_, new) in pairs) else varied

    def _takes_batch_only(self) -> bool:
        return self._valid is not None and _arity(self._valid) == 1


def move(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; containers with a `to` of their own are asked."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, MutableMapping):
        moved = copy.copy(batch)
        moved.update({key: move(value, device) for key, value in batch.items()})
        return moved
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(move(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(
            batch,
            **{f.name: move(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init},
        )
    return batch


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first weight or buffer, the CPU without any."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _ends(mask: Bool[Tensor, "*positions"], shape: Sequence[int]) -> bool:
    """Whether a mask goes on after a site's last real position, with padding alone.

    So it does for a PackedSequence, which is as long as its longest example.
    """
    if mask.dim() != len(shape) or mask.dim() < 2 or len(mask) != shape[0] or list(mask.shape) == list(shape):
        return False
    here = mask[_within(shape)]
    return list(here.shape) == list(shape) and bool(here[..., -1:].any()) and int(here.sum()) == int(mask.sum())


def _within(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)


def _arity(function: Callable[..., Any]) -> int:
    """How many arguments a function of the user's takes, which is asked in every pass."""
    if not isinstance(function, FunctionType):
        return _counted(function)
    if function not in _known:
        _known[function] = _counted(function)
    return _known[function]


def _counted(function: Callable[..., Any]) -> int:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def _apply(function: Callable[..., Any] | None, first: Any, second: Any) -> Any:
    assert function is not None
    return function(first, second) if _arity(function) >= 2 else function(first)


TASKS = declare("task", Task, listed=True)
