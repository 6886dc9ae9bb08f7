"""Hooked: a model with its sites, its task, and the adapters that found them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from maskhooks.errors import BatchError, MaskhooksError, ModelError, NonFiniteError, SettingError, SiteConflictError
from maskhooks.hooks.port import Replacement
from maskhooks.hooks.tap import Tap
from maskhooks.hooks.time_steps import Steps, one_step
from maskhooks.model.adapter import Claim
from maskhooks.model.outputs import Outputs, count
from maskhooks.model.task import EMPTY, Task
from maskhooks.sites import nested
from maskhooks.sites.modules import Modules
from maskhooks.sites.site import Selector, Site, SiteTable, resolve

#: What an explainer checks first: "model", that it is a function of its input with finite outputs; "bypass", that no
#: information goes round the masked sites; "gradients", that they come back to these sites.
Check = Literal["model", "bypass", "gradients"]
Replacements = Mapping[str, Replacement] | Mapping[Site, Replacement] | Mapping[str | Site, Replacement]


class Hooked:
    """A model with named sites, made by `maskhooks.wrap`. It does not change the model, and is not a module.

    Attributes:
        model: the given model.
        sites: `SiteTable`, in order of computation.
        task: how batches become calls and outputs become distributions.
        skipped_checks: the checks that explainers leave out; see `wrap`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: SiteTable,
        task: Task,
        claims: Sequence[Claim] = (),
        skipped_checks: Iterable[Check] = (),
    ) -> None:
        self.model = model
        self.sites = sites
        self.task = task
        self.claims = list(claims)
        self.skipped_checks = frozenset(skipped_checks)

    def with_(self, *, sites: SiteTable | None = None, task: Task | None = None) -> Hooked:
        """Return another `Hooked` of the same model, with other sites or another task."""
        return Hooked(self.model, sites or self.sites, task or self.task, self.claims, self.skipped_checks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for claim in self.claims:  # places are stored outside the model, and not copied with it
            claim.register_places()

    def __repr__(self) -> str:
        adapters = ", ".join(sorted({claim.adapter.name for claim in self.claims})) or "none"
        what = f"{len(self.sites)} sites, task {self.task.name}, adapters {adapters}"
        return f"Hooked({type(self.model).__name__}, {what})"

    def _repr_html_(self) -> str:
        return self.sites._repr_html_()

    def __call__(self, batch: Any) -> Any:
        """Run the model on a batch through its task, and return what the model returns.

        Raises:
            BatchError: the model fails because the batch is text, is empty, or is longer than it can read.
            ModelError: the model fails because weights are on the meta device.
        """
        try:
            return self.task.call(self.model, batch)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            why = None if isinstance(error, MaskhooksError) else self._why(batch, error)
            if why is None:
                raise
            raise why from error

    def _why(self, batch: Any, error: Exception) -> MaskhooksError | None:
        """Return the error that says why the model fails on a batch; None if its own says enough."""
        empty = [name for name, weight in self.model.named_parameters() if weight.is_meta]
        if empty and "meta" in str(error):
            return ModelError(
                f"the model failed ({error}), and {len(empty)} of its weights, such as {empty[0]!r}, are on the meta "
                "device: they have shapes but no values. Load them first: with from_pretrained, or with "
                "model.to_empty(device='cpu') and model.load_state_dict(...).",
                module=empty[0].rpartition(".")[0],
            )
        reason = self.task.misfit(self.model, batch)
        return None if reason is None else BatchError(f"{reason} (the model failed with {type(error).__name__})")

    def distribution(self, outputs: Any, batch: Any) -> Outputs:
        """Return the model's outputs as `torch.distributions`.

        Raises:
            UnknownDistributionError: the task does not know which distributions they are.
            NonFiniteError: the outputs are NaN or infinite, and the distribution rejects them.
            BatchError: the batch has no example.
        """
        try:
            found = self.task.distribution(outputs, batch)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, MaskhooksError):
                raise
            tensors = [tensor for _, tensor in nested.tensors(outputs)]
            if tensors and not any(tensor.numel() for tensor in tensors):
                raise BatchError(EMPTY) from error
            if isinstance(error, RuntimeError) or _finite(outputs):
                raise
            raise NonFiniteError(
                "the model's outputs are not finite. Look for NaN or infinity in this batch and in the weights"
            ) from error
        if not count(found):
            raise BatchError(EMPTY)
        return found

    def find(self, selector: Selector) -> list[Site]:
        """Return the sites that match an address, a glob, a tag, a Site, or several of these.

        Raises:
            UnknownSiteError: nothing matches; close names are listed.
        """
        modules = Modules(self.model)
        return [self._one_step(site, modules) for site in resolve(selector, self.sites, modules)]

    def _one_step(self, site: Site, modules: Modules) -> Site:
        """Return the site; if it is one step but has the pattern of all steps, give it the pattern of one."""
        if not isinstance(site.call, int) or not isinstance(modules.get(site.module), Steps):
            return site
        every = self.sites.get(str(site.at(None)))
        whole = every is not None and site.pattern is not None and site.pattern == every.pattern
        return one_step(site, site.pattern) if whole and site.pattern is not None else site

    def required_sites(self, selector: Selector) -> list[Site]:
        """Return the matching sites, each required to fire and with a pattern for its gates.

        Raises:
            UnknownSiteError: nothing matches; close names are listed.
            SettingError: no site is given.
            PatternError: a site has no pattern.
        """
        found = [dataclasses.replace(site, optional=False) for site in self.find(selector)]
        if not found:
            raise SettingError("no site is given. Give a tag, an address, a glob, or a list of these (hooked.sites)")
        for site in found:
            site.gating()
        return found

    def same_positions(self, sites: Sequence[Site]) -> list[Site]:
        """Return the hidden states with the same positions as these sites, as far as shapes are known.

        A decoder's states do not correspond to source tokens, nor feature maps of one size to those of another.
        """
        places = {_places(site) for site in sites}
        return [site for site in self.sites.tagged("hidden") if site.pattern and _places(site) in places]

    @contextlib.contextmanager
    def tap(
        self,
        read: Selector = (),
        replace: Replacements | None = None,
    ) -> Iterator[Tap]:
        """Read and replace values inside the `with`; see `Tap`.

        Args:
            read: the sites to read.
            replace: for each address, glob, tag or Site, a function from its value to one of the same shape, dtype and
                device.

        Raises:
            UnknownSiteError: a selector matches nothing.
            SiteConflictError: two selectors replace one value.
        """
        reads, replaced = self.find(read), self._replaced(replace or {})
        tap = Tap(self.model, reads, replaced)
        with self.expose_sites([*reads, *replaced]), tap:
            yield tap

    def _replaced(self, replace: Replacements) -> dict[Site, Replacement]:
        found: dict[Site, Replacement] = {}
        for selector, function in replace.items():
            for site in self.find(selector):
                if site in found:
                    raise SiteConflictError(
                        f"two replacements for one value: {str(selector)!r} matches {site} again. Combine "
                        f"the two functions, or nest two taps: the inner one sees the outer one's value.",
                        site=site,
                    )
                found[site] = function
        return found

    def expose_sites(self, sites: Iterable[Site]) -> contextlib.ExitStack:
        """Return a context in which the sites exist: adapters open the fused kernels that hide them."""
        wanted = list(sites)
        with contextlib.ExitStack() as stack:  # closes the earlier ones if a later one raises
            for claim in self.claims:
                stack.enter_context(claim.adapter.while_tapped(claim.name, claim.module))
                inside = [site for site in wanted if claim.covers(site.module)]
                if inside:
                    stack.enter_context(claim.adapter.expose_sites(claim.name, claim.module, inside))
            return stack.pop_all()


def _finite(outputs: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for _, tensor in nested.tensors(outputs))


def _places(site: Site) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the position axes of a site, and their sizes if shapes are known."""
    pattern = site.gating()
    return pattern.positions, site.shape and pattern.mask_shape(torch.empty(site.shape, device="meta"))
