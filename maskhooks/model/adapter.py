"""Adapters: find the sites of the module types that they claim."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from maskhooks.errors import AdapterConflictError
from maskhooks.hooks.recurrence import Recurrence
from maskhooks.model.task import Task
from maskhooks.plugins.kind import declare
from maskhooks.sites.modules import places
from maskhooks.sites.site import Site


class Adapter(ABC):
    """Finds the sites of certain module types, wherever they are in a model.

    Attributes:
        name: the adapter's name in lists and errors.
        claims_model: whether it claims the whole of a model that contains a module of its types, for sites that span
            several of them; modules that other adapters claim stay theirs.
    """

    name: str
    claims_model = False

    @abstractmethod
    def types(self) -> tuple[type[nn.Module], ...]:
        """Return the claimed module types; called at each wrap. Look in `sys.modules` before importing a library."""

    @abstractmethod
    def sites(self, name: str, module: nn.Module) -> Iterable[Site]:
        """Return the sites of a claimed module, in order of computation.

        Args:
            name: the module's name in the whole model, the prefix of addresses; empty for the model itself.
            module: the claimed module.
        """

    def places(self, module: nn.Module) -> Mapping[str, nn.Module]:
        """Return modules that stand for values inside a claimed one, by their name in addresses.

        They return their input, and are not part of the model. `expose_sites` routes values through them: `nn.Identity`
        for a whole value, `maskhooks.hooks.time_steps.Steps` for states that come one after another,
        `maskhooks.hooks.several_parts.Parts` for values that come in portions.
        """
        return {}

    def complete_sites(self, sites: Sequence[Site], fired: Sequence[Site] = ()) -> Sequence[Site]:
        """Return all of the adapter's sites in a model, completed with what no single module knows, such as depths.

        Args:
            sites: in the order of modules.
            fired: the sites that fired, in order, if an example was run.
        """
        return sites

    def task(self, model: nn.Module) -> Task | None:
        """Return the task of a model with such modules, used if no plugin claims the model's own type."""
        return None

    def expose_sites(
        self, name: str, module: nn.Module, sites: Sequence[Site]
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the given sites exist, if fused kernels hide them; must restore everything."""
        return contextlib.nullcontext()

    def while_tapped(self, name: str, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a context for while any site is tapped, for kernels without gradients; must restore everything."""
        return contextlib.nullcontext()

    def recurrence(self, name: str, module: nn.Module) -> Recurrence | None:
        """Return how a search can share the states of common prefixes, if the module reads positions one by one.

        With None, a search runs each set of positions through the whole model.
        """
        return None


@dataclass(frozen=True)
class Claim:
    """An adapter's claim on one module."""

    adapter: Adapter
    name: str
    module: nn.Module

    def covers(self, module: str) -> bool:
        """Whether a module, by name, is the claimed one or stands inside it."""
        return not self.name or module == self.name or module.startswith(self.name + ".")

    def register_places(self) -> None:
        """Register the adapter's places in the module."""
        for child, place in self.adapter.places(self.module).items():
            places(self.module).setdefault(child, place)


def claims(model: nn.Module, adapters: Sequence[Adapter]) -> list[Claim]:
    """Return which adapter claims which module: the more derived claim wins; a claim covers what is below it.

    Raises:
        AdapterConflictError: two adapters claim one module by the same type.
    """
    types = [(adapter, adapter.types()) for adapter in adapters]
    found: list[Claim] = []
    for name, module in model.named_modules():
        ancestry = type(module).__mro__
        ranked = sorted(
            (
                (min(ancestry.index(t) for t in claimed if t in ancestry), adapter)
                for adapter, claimed in types
                if any(t in ancestry for t in claimed)
            ),
            key=lambda pair: pair[0],
        )
        if not ranked:
            continue
        if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
            first, second = ranked[0][1].name, ranked[1][1].name
            raise AdapterConflictError(
                f"adapters {first!r} and {second!r} both claim module {name!r} "
                f"({ancestry[ranked[0][0]].__name__}). "
                f"Choose one: wrap(model, adapter=...), or let one claim a more derived type.",
                plugin=first,
            )
        adapter = ranked[0][1]
        if not any(claim.adapter is adapter and claim.covers(name) for claim in found):
            found.append(Claim(adapter, "", model) if adapter.claims_model else Claim(adapter, name, module))
            found[-1].register_places()
    return found


def claimed_sites(found: Sequence[Claim]) -> list[Site]:
    """Return the sites of all claims in order; within a deeper claim, only that claim's own."""
    sites: dict[str, Site] = {}
    for claim in found:
        deeper = [c for c in found if c.name != claim.name and claim.covers(c.name)]
        for site in claim.adapter.sites(claim.name, claim.module):
            if not any(c.covers(site.module) for c in deeper):
                sites.setdefault(str(site), site)
    return complete_sites(found, list(sites.values()))


def complete_sites(found: Sequence[Claim], sites: Sequence[Site], fired: Sequence[Site] = ()) -> list[Site]:
    """Return the sites in place, with each adapter's as it completes them; see `Adapter.complete_sites`."""
    result = list(sites)
    for adapter in {id(claim.adapter): claim.adapter for claim in found}.values():
        mine = [n for n, site in enumerate(result) if _owner(found, site) is adapter]
        seen = [site for site in fired if _owner(found, site) is adapter]
        for place, site in zip(mine, adapter.complete_sites([result[n] for n in mine], seen), strict=True):
            result[place] = site
    return result


def _owner(found: Sequence[Claim], site: Site) -> Adapter | None:
    """Return the adapter with the innermost claim on a site; of two on the whole model, the one that lists the site."""
    covering = [claim for claim in found if claim.covers(site.module)]
    depth = max((len(claim.name) for claim in covering), default=0)
    inner = [claim for claim in covering if len(claim.name) == depth]
    having = (claim for claim in inner if str(site) in map(str, claim.adapter.sites(claim.name, claim.module)))
    return inner[0].adapter if len(inner) == 1 else next((claim.adapter for claim in having), None)


def join(name: str, child: str) -> str:
    """Return a child's full name: `join("", "encoder") == "encoder"`."""
    return f"{name}.{child}" if name and child else name or child


def stacks(module: nn.Module) -> list[list[str]]:
    """Return the ordered stacks of layers inside a module, largest first; nested stacks are left out.

    Each stack is a list of module names relative to `module`. A `ModuleList` is a stack, even with a single layer or
    layers of several types; a `Sequential` is one if it has two or more children, all of one type. A stack's size is
    its number of weights. Stacks inside a layer of a larger one, such as the experts of a mixture, are left out.
    """
    found: list[tuple[int, list[str]]] = []
    for name, part in module.named_modules():
        if not (isinstance(part, nn.ModuleList) or (isinstance(part, nn.Sequential) and _alike(part))):
            continue
        size = sum(weight.numel() for weight in part.parameters())
        if size:
            found.append((size, [join(name, child) for child, _ in part.named_children()]))
    found.sort(key=lambda pair: -pair[0])
    outer: list[list[str]] = []
    for _, names in found:
        if not any(name.startswith(layer + ".") for stack in outer for layer in stack for name in names):
            outer.append(names)
    return outer


def _alike(part: nn.Sequential) -> bool:
    return len(part) > 1 and len({type(child) for child in part}) == 1


ADAPTERS = declare("adapter", Adapter, listed=True)
