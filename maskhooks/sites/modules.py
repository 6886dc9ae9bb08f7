"""Modules: a model's modules by name, including those that `named_modules` misses."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import nn

from maskhooks.errors import CompiledModelError

_places: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


class Modules(Mapping[str, nn.Module]):
    """The modules of a model by name.

    Iteration lists the names of `named_modules`, including aliases. Lookup also finds names that follow attributes
    from module to module, such as TransformerLens's `blocks.0.hook_resid_post`, and the places of adapters, see
    `places`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @functools.cached_property
    def _listed(self) -> dict[str, nn.Module]:
        return dict(self._model.named_modules(remove_duplicate=False))

    def __getitem__(self, name: str) -> nn.Module:
        if name in self._listed:
            return self._listed[name]
        parent, _, child = name.rpartition(".")
        if parent in self._listed and child in _places.get(self._listed[parent], {}):
            return _places[self._listed[parent]][child]
        try:
            found: nn.Module = self._model.get_submodule(name)
        except (AttributeError, RuntimeError):  # RuntimeError: a scripted model
            raise KeyError(name) from None
        return found

    def computing(self, name: str) -> nn.Module:
        """Return the module that computes the value at this name: itself, or the one that it is a place within."""
        module, parent = self[name], self.get(name.rpartition(".")[0])
        return (
            parent
            if parent is not None and any(module is place for place in _places.get(parent, {}).values())
            else module
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)


def places(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name that adapters define for values inside a module's own computation.

    They are not part of the model, and live as long as the module. In addresses they are its children:
    `rnn.h_l0:output`. While such a site is tapped, its adapter opens the module, so that values pass through them.
    """
    return _places.setdefault(module, {})


def running(model: nn.Module) -> list[nn.Module]:
    """Return a model's modules, and those of models it holds as plain attributes, which `named_modules` misses."""
    held = [part for part in vars(model).values() if isinstance(part, nn.Module)]
    return list({id(module): module for part in (model, *held) for module in part.modules()}.values())


def compiled(module: nn.Module) -> bool:
    """Whether a module is compiled or scripted."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    optimized: tuple[type, ...] = (dynamo.OptimizedModule,) if dynamo else ()
    return isinstance(module, (*optimized, torch.jit.ScriptModule)) or (
        getattr(module, "_compiled_call_impl", None) is not None
    )


def check_compiled(site: object, name: str, modules: Mapping[str, nn.Module], passed: set[str] | None = None) -> None:
    """Refuse a site whose module, or one around it, is compiled or scripted.

    Args:
        site: the site to name in messages; None to name none.
        name: the name of its module.
        modules: the modules by name.
        passed: names already found to be neither; new ones are added.

    Raises:
        CompiledModelError: hooks added now would be ignored.
    """
    steps = name.split(".") if name else []
    for end in range(len(steps) + 1):
        outer = ".".join(steps[:end])
        if passed is not None and outer in passed:
            continue
        module = modules.get(outer)
        if module is not None and compiled(module):
            what = f"module {outer!r}" if outer else "the model"
            in_place = vars(module).get("_compiled_call_impl") is not None
            way = (
                ", or undo `module.compile()`: `module._compiled_call_impl = None`"
                if in_place
                else ": torch.compile keeps it as `compiled._orig_mod`"
            )
            where = "" if site is None else f"site {site}: "
            raise CompiledModelError(
                f"{where}{what} is compiled or scripted; hooks added now would be ignored. Wrap the model before "
                f"compiling it{way}.",
                module=outer,
            )
        if passed is not None:
            passed.add(outer)
