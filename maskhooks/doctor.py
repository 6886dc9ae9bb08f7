"""doctor: one batch through a wrapped model, and what each site does: fires, how often, shape, dtype, bypassed."""

from __future__ import annotations

import dataclasses
import html
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from maskhooks import nested, table
from maskhooks.errors import BypassedWarning, SiteNeverFiredError, UnfiredSiteWarning, UnknownDistributionError
from maskhooks.hooked import Hooked
from maskhooks.outputs import Positions
from maskhooks.seeds import forked, generator
from maskhooks.site import Selector, Site
from maskhooks.tap import Tap, frozen


@dataclass(frozen=True)
class Finding:
    """What one site did in one forward pass.

    Attributes:
        calls: how often its module ran.
        trouble: why it cannot be used as addressed, empty where it can.
        bypassed: whether, with all its positions closed, another input still changes the output; None where no other
            input could be made.
        foreign_hooks: forward hooks of others on its module.
    """

    site: Site
    calls: int
    shape: tuple[int, ...] | None
    dtype: str
    device: str
    bypassed: bool | None
    foreign_hooks: int
    trouble: str


@dataclass(frozen=True)
class Report:
    """What `examine` found; prints as a table."""

    findings: Sequence[Finding]
    distribution: str

    @property
    def healthy(self) -> bool:
        return not any(finding.trouble or finding.bypassed for finding in self.findings)

    def rows(self) -> list[dict[str, str]]:
        return [
            {
                "site": str(f.site),
                "calls": str(f.calls),
                "shape": "" if f.shape is None else str(list(f.shape)),
                "dtype": f.dtype.removeprefix("torch."),
                "device": f.device,
                "bypassed": {True: "BYPASSED", False: "no", None: "unknown"}[f.bypassed],
                "foreign hooks": str(f.foreign_hooks or ""),
                "trouble": f.trouble,
            }
            for f in self.findings
        ]

    def __str__(self) -> str:
        return f"{table.text(self.rows())}\noutput: {self.distribution}"

    def _repr_html_(self) -> str:
        return f"{table.markup(self.rows())}<p>output: {html.escape(self.distribution)}</p>"


def examine(hooked: Hooked, batch: Any, sites: Selector | None = None) -> Report:
    """Runs a batch and reports on every site; the model and the random state are left as they were.

    Args:
        sites: which to look at, by default all listed ones.
    """
    chosen = list(hooked.sites) if sites is None else hooked.find(sites)
    every = [dataclasses.replace(site, call="*", optional=True) for site in chosen]
    tap = Tap(hooked.model, every)
    with forked(hooked.model), torch.no_grad(), hooked.opened(chosen), frozen(hooked.model):
        try:
            with warnings.catch_warnings(), tap:
                warnings.simplefilter("ignore", UnfiredSiteWarning)  # the report says so of each site
                outputs = hooked(batch)
        except SiteNeverFiredError:
            outputs = tap.outputs
        try:
            described = _describe(hooked.distribution(outputs, batch))
        except UnknownDistributionError as error:
            described = f"unknown ({error})"
        findings = [_finding(hooked, site, tap) for site in chosen]
        sound = [f.site for f in findings if not f.trouble and f.site.call != "*"]
        around = bypassed(hooked, batch, sound)
        return Report([dataclasses.replace(f, bypassed=around.get(f.site)) for f in findings], described)


def bypassed(hooked: Hooked, batch: Any, sites: Iterable[Site], seed: int = 0) -> dict[Site, bool | None]:
    """Whether information goes around sites: with every position closed, another input changes the output's bits.

    Gradients cannot see this: a second embedding or a skip connection past the site leaves the gradient at the masked
    value exactly zero. Other inputs have the same shape and padding (`Task.vary`).

    Returns:
        For each site whether it is bypassed; None where no other input could be made, or where another input changes
        nothing even with open gates.
    """
    with forked(hooked.model), torch.no_grad(), frozen(hooked.model):
        usual = _outputs(hooked, batch)  # before `vary`: a batch that does not fit the model is told as such
        other = hooked.task.vary(batch, generator(seed))
        if other is None or _same(usual, _outputs(hooked, other)):
            return dict.fromkeys(sites)
        found: dict[Site, bool | None] = {}
        for site in sites:
            with hooked.tap(replace={site: torch.zeros_like}):
                found[site] = not _same(_outputs(hooked, batch), _outputs(hooked, other))
        return found


def warn_bypassed(hooked: Hooked, batch: Any, sites: Sequence[Site], seed: int = 0) -> None:
    """Warns of sites among these that information goes around, with BypassedWarning."""
    around = [str(site) for site, way in bypassed(hooked, batch, sites, seed).items() if way]
    if around:
        warnings.warn(
            f"with every position masked at {', '.join(around)}, another input still changes the output: "
            "information goes another way, and masks there tell only part of the story. `maskhooks doctor` shows "
            "all sites.",
            BypassedWarning,
            stacklevel=4,
        )


def _finding(hooked: Hooked, site: Site, tap: Tap) -> Finding:
    path = nested.format_path(site.path)
    values = [
        value
        for call in range(10_000)
        if (value := tap.values.get(f"{site.module}@{call}:{site.port}{path}")) is not None
    ]
    module = hooked.model.get_submodule(site.module)
    trouble = tap.skipped.get(f"{site.module}@*:{site.port}{path}", "")
    if not values and not trouble:
        trouble = "never fired"
    elif site.call is None and len(values) > 1:
        trouble = f"fires {len(values)} times: address one call, {site.at(0)} to {site.at(len(values) - 1)}"
    elif isinstance(site.call, int) and site.call >= len(values):
        trouble = f"fires {len(values)} times, so there is no call {site.call}"
    value = values[site.call if isinstance(site.call, int) and site.call < len(values) else 0] if values else None
    return Finding(
        site,
        len(values),
        None if value is None else tuple(value.shape),
        "" if value is None else str(value.dtype),
        "" if value is None else str(value.device),
        None,
        len(module._forward_hooks) + len(module._forward_pre_hooks),
        trouble,
    )


def _outputs(hooked: Hooked, batch: Any) -> list[Tensor]:
    outputs = hooked(batch)
    try:
        return list(_parameters(hooked.distribution(outputs, batch)))
    except UnknownDistributionError:
        return [tensor for _, tensor in nested.tensors(outputs)]


def _parameters(outputs: Any) -> Iterable[Tensor]:
    if isinstance(outputs, Distribution):
        yield from (value for value in vars(outputs).values() if isinstance(value, Tensor))
    elif isinstance(outputs, Positions):
        yield from _parameters(outputs.distribution)
    else:
        for part in outputs.values():
            yield from _parameters(part)


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal bit for bit, NaN included."""
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(_bits(a), _bits(b)) for a, b in zip(left, right, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _describe(outputs: Any) -> str:
    if isinstance(outputs, Distribution):
        return f"{type(outputs).__name__} over batch {list(outputs.batch_shape)}"
    if isinstance(outputs, Positions):
        return f"{_describe(outputs.distribution)}, {int(outputs.chosen.sum())} positions chosen"
    return ", ".join(f"{name}: {_describe(part)}" for name, part in outputs.items())
