"""Tasks: how to call a model on a batch, which positions are valid, what they are called, what outputs mean."""

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

from maskhooks.errors import BatchError, SettingError, close_matches
from maskhooks.model import outputs
from maskhooks.model.attention import Attended, Where, attended
from maskhooks.model.outputs import Outputs
from maskhooks.plugins.kind import declare
from maskhooks.sites import nested
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.signature import signature
from maskhooks.sites.site import Site
from maskhooks.sites.units import undirected

EMPTY = "the batch has no example. Leave empty batches out of the loader"
_known: WeakKeyDictionary[FunctionType, int] = WeakKeyDictionary()  # how many arguments functions take


class Task:
    """How to call a model and interpret its outputs. This class serves any model; `wrap` can override each method.

    Args:
        call: `(model, batch) -> outputs`. Default: a mapping is passed by keyword, a tuple or list by
            position (as many items as the model's forward takes, so trailing labels are left out), anything
            else as it is.
        output: `outputs -> distribution` or `(outputs, batch) -> distribution`.
        valid: `batch -> bool tensor` over the sites' position axes, False at padding; or `(batch, site) -> ...` if
            sites differ. It may be longer than a site if the rest is False, as when the longest packed sequence is
            shorter than its batch is wide. Default: all positions are valid.
        names: `batch -> names`, a list of position names per example.
        perturb: `(batch, generator) -> batch`, another input of the same shape and padding, for the bypass test.
        example_index: `batch -> numbers`, or `(batch, site) -> ...`: the example index of each row, if the first axis
            of a value is not the batch axis, as with the edges of many graphs.
        edges: `batch -> {"source": numbers, "target": numbers}`, or `(batch, site) -> ...`: which nodes the positions
            of a site connect, numbered within their example; with `relation` if there are several kinds.
        select: `(batch, numbers) -> batch`, the examples with these indices, repeated as listed. Default: index each
            tensor that has one row per example.
        units: `batch -> integers` over the sites' position axes, or `(batch, site) -> ...`: positions of an example
            with the same number are gated together, such as the pieces of a word. "undirected": edges between the
            same two nodes, in both directions. Default: each position alone.
        attention: where attention weights are, for `Attention` and `Rollout`: an address for each layer, such as
            `"layers.0.attention:output[1]"` of an `nn.MultiheadAttention` that is called with `need_weights`, or
            `(model, batch) -> weights`, a tensor `(batch, head, query, key)` for each layer.
    """

    name = "function"
    recipe = "stable"  # the recipe that masks of its models are trained with by default
    # What `with_options` accepts; a subclass adds its own.
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
        "attention",
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
        attention: Where | None = None,
    ) -> None:
        self._call, self._output, self._valid, self._names, self._perturb = call, output, valid, names, perturb
        self._example_index, self._edges, self._select, self._units = example_index, edges, select, units
        self._attention = attention

    def types(self) -> tuple[type[nn.Module], ...]:
        """Return the model types that a plugin's task serves; the most derived claim wins, as with adapters."""
        return ()

    def serve(self, model: nn.Module) -> Task:
        """Return the task for one model of a claimed type; a plugin may return a task specific to the model."""
        return self

    def with_options(self, functions: Mapping[str, Any]) -> Task:
        """Return a copy in which the user's functions take precedence; a plugin's task may accept more `options`.

        Raises:
            SettingError: this task does not have an option; near names are listed.
        """
        for name in functions:
            if name not in self.options:
                likely = close_matches(name, self.options, 3)
                raise SettingError(
                    f"wrap has no setting {name!r} for this model, whose task is {self.name!r}."
                    + (f" Did you mean {' or '.join(map(repr, likely))}?" if likely else "")
                    + f" The task's settings are {', '.join(self.options)}."
                )
        task = copy.copy(self)
        for key, function in functions.items():
            setattr(task, f"_{key}", function)
        return task

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch.

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

    def misfit(self, model: nn.Module, batch: Any) -> str | None:
        """Return why a model that failed cannot read a batch, and the way out; None if this task sees no reason."""
        tensors = [tensor for _, tensor in nested.tensors(batch)]
        if not tensors and _has_text(batch):
            return (
                "the batch is text, and the model takes tensors. Tokenise it first, as with tokenizer(texts, "
                "padding=True, return_tensors='pt'), or say how to call the model: "
                "wrap(model, call=lambda model, texts: model(**tokenizer(texts, padding=True, return_tensors='pt')))"
            )
        return EMPTY if tensors and not any(tensor.numel() for tensor in tensors) else None

    def arguments(self, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments for a batch."""
        if isinstance(batch, Mapping):
            return (), {str(key): value for key, value in batch.items()}
        if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
            kinds = [parameter.kind for parameter in signature(model).parameters.values()]
            takes = sum(
                kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds
            )
            return (tuple(batch) if inspect.Parameter.VAR_POSITIONAL in kinds else tuple(batch)[:takes]), {}
        return (batch,), {}

    def attention(self, model: nn.Module, batch: Any) -> Attended:
        """Run the model so that it computes attention weights, and return them; the model must come back as it was.

        It is called while a tap keeps the model in eval mode, without gradients.

        Raises:
            ModelError: the model has none, or it is not known where.
        """
        return attended(model, batch, self._attention, self.call)

    def distribution(self, result: Any, batch: Any) -> Outputs:
        """Return the model's outputs as distributions.

        Raises:
            UnknownDistributionError: they are not, nor is what `output` returns.
        """
        return outputs.check(_apply(self._output, result, batch) if self._output is not None else result)

    def valid(self, site: Site, batch: Any, value: Tensor) -> Bool[Tensor, "*positions"]:
        """Return which positions of a site are valid, over the position axes of its pattern.

        Raises:
            BatchError: the given mask has another shape.
        """
        pattern = site.gating()
        sizes = pattern.shape(value, site=site)
        shape = tuple(sizes[axis] for axis in pattern.positions)
        if self._valid is None:
            return torch.ones(shape, dtype=torch.bool, device=value.device)
        return self._fit(self._mask(site, batch, value), shape, site, pattern)

    def _mask(self, site: Site, batch: Any, value: Tensor) -> Tensor:
        """Return the user's mask, unchecked."""
        return as_bool(torch.as_tensor(_apply(self._valid, batch, site)).to(value.device), "valid")

    def _fit(self, mask: Tensor, shape: tuple[int, ...], site: Site, pattern: Pattern) -> Tensor:
        if _ends(mask, shape):
            return mask[_within(shape)]
        if tuple(mask.shape) != shape:
            raise BatchError(
                f"the mask of valid positions has shape {list(mask.shape)}, but site {site} has positions "
                f"({', '.join(pattern.positions)}) of shape {list(shape)}. Give a function of (batch, site) "
                "that fits each site: wrap(model, valid=lambda batch, site: ...)"
            )
        return mask

    def units(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Int[Tensor, "*positions"] | None:
        """Return a number per position, equal if positions of an example are gated together; None if each is alone.

        Args:
            values: as in `example_index`.

        Raises:
            BatchError: the numbers have another shape or are not integers, or this task does not know the given word.
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
                f"but site {site} has positions ({', '.join(site.gating().positions)}) of shape {shape}. Give a whole "
                f"number for each, equal if positions belong together: wrap(model, units=lambda batch, site: ...)"
            )
        return numbers

    def _named_units(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Int[Tensor, " row"] | None:
        """Return the units for a word such as "undirected"."""
        if self._units != "undirected" or self._edges is None:
            raise BatchError(
                f"units={self._units!r}: the task {self.name!r} does not know which positions these are. Give a "
                f"function that returns a whole number for each position: wrap(model, units=lambda batch: ...)"
            )
        found = self.edges(site, batch, values)
        if found is None:
            return None
        columns = [torch.as_tensor(found[name]) for name in ("source", "target", "relation") if name in found]
        index = self.example_index(site, batch, values)
        return undirected(*columns, *([] if index is None else [index.to(columns[0].device)]))

    @property
    def unit_name(self) -> str | None:
        """The name of the units: the word given for `units`, or "function"; None if each position is alone."""
        return self._units if self._units is None or isinstance(self._units, str) else "function"

    def dependencies(self, site: Site) -> Sequence[Site]:
        """Return sites to read along with this one, whose values `example_index` and `edges` need."""
        return ()

    def example_index(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Int[Tensor, " row"] | None:
        """Return the example index of each row; None if the first axis of the site is the batch axis.

        Args:
            values: by address, the values of this site and those from `dependencies`.
        """
        return None if self._example_index is None else torch.as_tensor(_apply(self._example_index, batch, site))

    def edges(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Mapping[str, Int[Tensor, " row"]] | None:
        """Return the columns that an explanation has for edges; None if rows are not edges.

        These are `source` and `target`, numbered within the example, `relation` if there are several kinds, or others.
        """
        return None if self._edges is None else _apply(self._edges, batch, site)

    @property
    def mask_token(self) -> int | None:
        """The id of the token that stands for a masked one, such as `[MASK]`; None if none is known."""
        return None

    def names(self, site: Site, batch: Any) -> Sequence[Sequence[str]] | None:
        """Return the position names, a list per example; None if unknown."""
        return self._names(batch) if self._names is not None else None

    def predictions(self, result: Outputs) -> Sequence[str] | None:
        """Return the predicted class of each example as text; None if there is no single class."""
        return outputs.predictions(result)

    def targets(self, batch: Any) -> Sequence[str] | None:
        """Return the examples' labels as text, if the batch holds them."""
        return None

    def select(self, batch: Any, numbers: Sequence[int], count: int) -> Any:
        """Return the examples of a batch with these indices, repeated as listed.

        Args:
            count: the number of examples in the batch.
        """
        if self._select is not None:
            return self._select(batch, numbers)
        chosen = batch
        for path, tensor in nested.tensors(batch):
            if tensor.dim() and len(tensor) == count:
                chosen = nested.put(chosen, path, tensor[torch.as_tensor(numbers, device=tensor.device)])
        return chosen

    def without_tokens(self, batch: Any, removed: Bool[Tensor, "batch token"]) -> Any | None:
        """Return the batch without some tokens, the others moved together; None if this task cannot.

        Args:
            removed: which tokens to leave out.

        Raises:
            BatchError: nothing would be left of an example.
        """
        return None

    def select_rows(self, batch: Any, numbers: Sequence[int]) -> Any | None:
        """Select examples if the first axis is not the batch axis; None if no `select` function is given."""
        return None if self._select is None else self._select(batch, numbers)

    def perturb(self, batch: Any, generator: Generator) -> Any | None:
        """Return another input of the same shape and padding, for the bypass test; None if none can be made.

        Default: permute floating-point tensors and token ids among the valid positions of the whole batch. Masks,
        lengths and labels (bool, or one number per example) stay.
        """
        if self._perturb is not None:
            return self._perturb(batch, generator)
        valid = torch.as_tensor(_apply(self._valid, batch, None)).bool() if self._takes_batch_only() else None
        varied = batch
        for path, tensor in nested.tensors(batch):
            if tensor.is_nested or tensor.layout is not torch.strided:
                continue  # rows cannot be indexed
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


def as_bool(mask: Tensor, name: str) -> Bool[Tensor, "*shape"]:
    """Return a mask of valid positions as bool.

    Raises:
        BatchError: it has other values than 0 and 1, such as the large negative ones of an additive mask.
    """
    if mask.dtype is not torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        low, high = (f"{end:g}" for end in (mask.min().item(), mask.max().item()))
        raise BatchError(
            f"{name} says which positions are no padding by True and False, or 1 and 0, but it has values from {low} "
            f"to {high}. An additive mask is 0 where a position is valid: give mask == 0"
        )
    return mask.bool()


def _has_text(batch: Any) -> bool:
    inside = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return isinstance(batch, str) or any(map(_has_text, inside))


def move(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; a container with a `to` method moves itself."""
    if hasattr(batch, "to"):  # of a copy, since that of a container changes it
        return (batch if isinstance(batch, Tensor) else copy.copy(batch)).to(device)
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
    """Return where a model takes its inputs: the device of its first weight or buffer, else the CPU."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _ends(mask: Bool[Tensor, "*positions"], shape: Sequence[int]) -> bool:
    """Whether a mask continues past a site's last valid position with padding only.

    It does for a PackedSequence, which is only as long as its longest example.
    """
    if mask.dim() != len(shape) or mask.dim() < 2 or len(mask) != shape[0] or list(mask.shape) == list(shape):
        return False
    here = mask[_within(shape)]
    return list(here.shape) == list(shape) and bool(here[..., -1:].any()) and int(here.sum()) == int(mask.sum())


def _within(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)


def _arity(function: Callable[..., Any]) -> int:
    """Return how many arguments a user's function takes; cached, since every pass needs it."""
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
