"""Wrapping: make a `Hooked` from a model."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Generator, Tensor, nn

from maskhooks.errors import ModelError, PluginError, SiteFiredTooOftenError
from maskhooks.hooks.preserved import preserved
from maskhooks.hooks.tap import Tap
from maskhooks.hooks.time_steps import Steps
from maskhooks.model.adapter import ADAPTERS, Adapter, Claim, claimed_sites, claims, complete_sites
from maskhooks.model.hooked import Check, Hooked
from maskhooks.model.outputs import Outputs
from maskhooks.model.task import TASKS, Task
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import checked
from maskhooks.sites.modules import Modules
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import ADDRESSES, Site, SiteTable


@checked
def wrap(
    model: nn.Module | Any,
    *,
    sites: Annotated[Mapping[str, str | Pattern] | Iterable[Site | str], ADDRESSES] | None = None,
    example: Any = None,
    adapter: Adapter | type[Adapter] | Sequence[Adapter | type[Adapter]] | None = None,
    task: Task | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    output: Callable[..., Outputs] | None = None,
    valid: Callable[..., Tensor] | None = None,
    names: Callable[[Any], Sequence[Sequence[str]]] | None = None,
    perturb: Callable[[Any, Generator], Any] | None = None,
    example_index: Callable[..., Tensor] | None = None,
    edges: Callable[..., Mapping[str, Tensor]] | None = None,
    units: Callable[..., Tensor] | str | None = None,
    skip_checks: Sequence[Check] = (),
    **options: Any,
) -> Hooked:
    """Find the sites of a model, and how to call it. The model is not changed.

    Args:
        model: any `nn.Module`, or nnsight's model of one.
        sites: address to pattern, as in `{"fc1:output": "batch token hidden -> batch token"}`, or a list of
            `Site` objects (or addresses, for sites that are only read), in order of computation; replaces what
            adapters find.
        example: a batch to run once, which records shapes and checks that every site fires.
        adapter: one or more adapters for this call; registered ones are used only if these claim no module.
        task: how to call the model; by default found through plugins.
        call, output, valid, names, perturb, example_index, edges, units: functions of the task; see `Task`.
        skip_checks: checks that explainers of this model leave out: "model", that it is a function of its input with
            finite outputs (two passes); "bypass", that no information goes round masked sites; "gradients", that they
            come back to these sites.
        **options: more options of the task, such as `select=`, or `tokenizer=` for Hugging Face models.

    Raises:
        ModelError: `model` is not a module.
        UnknownSiteError: a site's module is not in the model; close names are listed.
        AdapterConflictError: two adapters claim one module.
    """
    if isinstance(model, Hooked):
        raise ModelError("the model is already wrapped. Give wrap the module itself, `hooked.model`")
    model = _module(model)
    if not isinstance(model, nn.Module):
        load = ". Load the model first, for example with from_pretrained" if isinstance(model, str) else ""
        raise ModelError(f"wrap takes a torch.nn.Module, got {type(model).__name__}{load}")
    given = _adapters(adapter)
    found = claims(model, given) if given else []
    found = found or claims(model, registry.listed(ADAPTERS))
    if sites is None:
        chosen = claimed_sites(found)
    elif isinstance(sites, Mapping):
        chosen = [Site.parse(address, pattern, tags=frozenset({"hidden"})) for address, pattern in sites.items()]
    else:
        chosen = [Site.parse(site) if isinstance(site, str) else site for site in sites]
    chosen = [site if site.depth is not None else dataclasses.replace(site, depth=i) for i, site in enumerate(chosen)]
    functions: dict[str, Any] = {"call": call, "output": output, "valid": valid, "names": names, "perturb": perturb}
    functions |= {"example_index": example_index, "edges": edges, "units": units, **options}
    functions = {key: function for key, function in functions.items() if function is not None}
    chosen_task = (task or _task(model, found)).with_options(functions)
    hooked = Hooked(model, SiteTable(chosen), chosen_task, found, skip_checks)
    Tap(model, chosen)  # checks that each module exists, and that none is compiled
    return hooked if example is None else with_shapes(hooked, example, named=sites is not None)


def with_shapes(hooked: Hooked, batch: Any, *, named: bool = False) -> Hooked:
    """Return a copy with every site's shape filled in from one batch; a site that does not fire is an error.

    A site that fires several times becomes one site per call. The steps of several sequences stay one site without a
    shape, because each batch has other steps.

    Args:
        named: whether the user named the sites; if so, only optional ones may fire several times.

    Raises:
        SiteFiredTooOftenError: a named site fires several times.
        SiteNeverFiredError, NotATensorError: a site gives no tensor.
        PatternError: a pattern does not fit.
    """
    sites, values = _run(hooked, batch, named)
    shaped = []
    for site in sites:
        value = values.get(str(site))
        if value is not None and site.pattern is not None:
            site.pattern.shape(value, site=site)
        shaped.append(site if value is None else dataclasses.replace(site, shape=tuple(value.shape)))
    by_name = {str(site): site for site in shaped}
    fired = [by_name[key] for key in values if key in by_name]
    return hooked.with_(sites=SiteTable(complete_sites(hooked.claims, shaped, fired)))


def _run(hooked: Hooked, batch: Any, named: bool) -> tuple[list[Site], Mapping[str, Tensor]]:
    """Return the sites, one per call if they fire several times, and the values by address."""
    often: set[str] = set()
    while True:
        reads = [site.at("*") if str(site) in often else site for site in hooked.sites]
        try:
            with torch.no_grad(), preserved(hooked.model), hooked.tap(read=reads) as tap:
                hooked(batch)
        except SiteFiredTooOftenError as error:
            site = hooked.sites.get(str(error.site))
            if site is None or (named and not site.optional):
                raise
            often.add(str(site))
            continue
        modules = Modules(hooked.model)
        sites: list[Site] = []
        for site in hooked.sites:
            if isinstance(modules[site.module], Steps):
                sites.append(site)
                continue
            calls = (site.at(call) for call in itertools.count())
            each = itertools.takewhile(lambda one: str(one) in tap.values, calls)
            sites += each if str(site) in often else [site]
        return sites, tap.values


def _module(model: Any) -> Any:
    """Return the module that a non-module holds as `_module`, as nnsight's models do; else the object itself."""
    held = getattr(model, "__dict__", {}).get("_module")
    return held if isinstance(held, nn.Module) and not isinstance(model, nn.Module) else model


def _adapters(given: Any) -> list[Adapter]:
    found = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    adapters: list[Any] = [part() if inspect.isclass(part) else part for part in found]
    for part in adapters:
        if not isinstance(part, Adapter):
            raise PluginError(f"adapter={part!r} is not a maskhooks.model.adapter.Adapter. Derive its class from it")
    return adapters


def _task(model: nn.Module, found: Sequence[Claim]) -> Task:
    """Return the plugin's task with the most derived claim on the model, else an adapter's, else `Task`."""
    ancestry = type(model).__mro__
    ranked = [
        (ancestry.index(t), order, task)
        for order, task in enumerate(registry.listed(TASKS))
        for t in task.types()
        if t in ancestry
    ]
    if ranked:
        return min(ranked)[2].serve(model)
    adapters = {id(claim.adapter): claim.adapter for claim in found}.values()
    return next((task for adapter in adapters if (task := adapter.task(model)) is not None), None) or Task()
