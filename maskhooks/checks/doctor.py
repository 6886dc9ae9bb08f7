"""Doctor: run one batch and report what each site does: whether and how often it fires, shape, dtype, bypassed."""

from __future__ import annotations

import dataclasses
import html
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributions import Distribution

from maskhooks.checks.model_check import model_trouble
from maskhooks.checks.site_checks import (
    UNUSED,
    bypassed,
    foreign,
    fused,
    gradients,
    inexact,
    others,
    owners,
    silent,
)
from maskhooks.errors import (
    BypassedWarning,
    GradientError,
    NonFiniteError,
    SiteFiredTooOftenError,
    SiteNeverFiredError,
    UnfiredSiteWarning,
    UnknownDistributionError,
)
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.preserved import preserved
from maskhooks.hooks.several_parts import Parts
from maskhooks.hooks.tap import Tap
from maskhooks.hooks.time_steps import Steps
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Positions
from maskhooks.sites import nested
from maskhooks.sites import text_table as table
from maskhooks.sites.modules import Modules
from maskhooks.sites.site import Selector, Site

_PARTS = frozenset({"head", "mlp", "message", "edge"})
_BYPASSED = {True: "BYPASSED", False: "no", None: "unknown"}
_SILENT = "never fired"
_INEXACT = (
    "open gates change the output's bits: the model changes the value in place through another reference, or checks "
    "whether two values are the same object, which a copy is not; address the place before or after"
)


@dataclass(frozen=True)
class Finding:
    """What one site did in one forward pass.

    Attributes:
        calls: how often its module ran.
        trouble: why it cannot be used as addressed; empty if it can.
        bypassed: whether another input still changes the output with all its positions closed; None if no other input
            could be made.
        foreign_hooks: number of other libraries' forward hooks on its module.
        foreign: the packages of these hooks, and of a replaced forward.
    """

    site: Site
    calls: int
    shape: tuple[int, ...] | None
    dtype: str
    device: str
    bypassed: bool | None
    foreign_hooks: int
    trouble: str
    foreign: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """What `doctor` found; prints as a table."""

    findings: Sequence[Finding]
    distribution: str
    fused: float = 0.0  # the largest change of the outputs when hooks switch off a fused path
    others: Mapping[str, int] = field(default_factory=dict)  # by package, the number of modules with its hooks
    trouble: str = ""  # why the model is no function of its input; the sites are then not tried further

    @property
    def healthy(self) -> bool:
        """Whether neither model nor sites are in trouble; parts of a layer, such as heads, may be bypassed."""
        around = any(finding.bypassed and not is_part(finding.site) for finding in self.findings)
        return not (self.trouble or around or any(finding.trouble for finding in self.findings))

    def rows(self) -> list[dict[str, str]]:
        """The table as text, one dictionary for each site."""
        return [
            {
                "site": str(f.site),
                "calls": str(f.calls),
                "shape": "" if f.shape is None else str(list(f.shape)),
                "dtype": f.dtype.removeprefix("torch."),
                "device": f.device,
                "bypassed": _way(f),
                "foreign hooks": f"{f.foreign_hooks or 'forward'} of {', '.join(f.foreign)}" if f.foreign else "",
                "trouble": f.trouble,
            }
            for f in self.findings
        ]

    def __str__(self) -> str:
        sites = table.text(self.rows()) if self.findings else "no sites are listed: wrap(model, sites=...) lists some"
        return "\n".join([sites, *self.notes()])

    def notes(self) -> list[str]:
        """Return the notes on the model as a whole."""
        notes = [f"output: {self.distribution}"]
        if self.trouble:
            return [*notes, f"model: {self.trouble}"]
        if self.fused:
            notes.append(
                f"fused: hooks switch off a fused path and change the outputs by up to {self.fused:.1g}; clean and "
                "masked passes both run with hooks"
            )
        if any(f.bypassed is None and not f.trouble and not is_read(f.site) for f in self.findings):
            notes.append(
                "bypassed unknown: no other input could be made from this batch, or it does not change the output. "
                "Give wrap(model, valid=...) to say which positions are not padding and may be permuted, or "
                "wrap(model, perturb=...) to make another input"
            )
        if self.others:
            names = ", ".join(f"{name} on {count} module{'s' * (count > 1)}" for name, count in self.others.items())
            notes.append(
                f"hooks of other libraries: {names}. They keep running; a tap sees values after their changes, and a "
                "replay applies them once"
            )
        return notes

    def _repr_html_(self) -> str:
        return table.markup(self.rows()) + "".join(f"<p>{html.escape(note)}</p>" for note in self.notes())


def doctor(hooked: Hooked, batch: Any, sites: Selector | None = None) -> Report:
    """Run a batch and report on every site; the model and the random state are restored.

    Args:
        sites: which sites to check; by default all listed ones.
    """
    chosen = list(hooked.sites) if sites is None else hooked.find(sites)
    known = Modules(hooked.model)
    foreigners, model = others(hooked.model), model_trouble(hooked, batch)
    standing = {site: known.computing(site.module) for site in chosen}
    hooks = {site: (len(foreign(at)), owners(at)) for site, at in standing.items()}
    with preserved(hooked.model), torch.no_grad(), hooked.expose_sites(chosen), frozen(hooked.model):
        tap, outputs = _read(hooked, batch, chosen, known)
        try:
            described = _describe(hooked.distribution(outputs, batch))
        except (UnknownDistributionError, NonFiniteError) as error:
            described = f"unknown ({error})"
        findings = [_finding(site, tap, *hooks[site]) for site in chosen]
        found = {f.site: f.trouble for f in findings}
        found |= silent(hooked, batch, [f.site for f in findings if f.trouble == _SILENT])
        if model is not None:
            done = [dataclasses.replace(f, trouble=found[f.site]) for f in findings]
            return Report(done, described, others=foreigners, trouble=str(model))
        sound = [site for site, why in found.items() if not (why or is_read(site))]
        around, moved = bypassed(hooked, batch, sound), fused(hooked, batch, sound)
        copied, without = inexact(hooked, batch, sound), gradients(hooked, batch, sound)
        found |= {site: _INEXACT if copied[site] else without[site] for site in sound}
        done = [dataclasses.replace(f, bypassed=around.get(f.site), trouble=found[f.site]) for f in findings]
        return Report(done, described, moved, foreigners)


def check_gradients(hooked: Hooked, batch: Any, sites: Sequence[Site], seed: int = 0) -> list[Site]:
    """Refuse sites to which no gradient comes back, since no mask can be learned there.

    Returns:
        The sites that no output of the model depends on, if there are others.

    Raises:
        GradientError: no gradient comes back to a site that an output depends on, or no output depends on any site.
    """
    found = gradients(hooked, batch, sites, seed)
    unused = [site for site in sites if found[site] == UNUSED]
    for site, why in found.items():
        if why and (why != UNUSED or len(unused) == len(found)):
            way = "Leave it out" if why == UNUSED else "Mask a later site, or a copy of the model without such a module"
            raise GradientError(f"site {site}: {why}. {way}.", site=site)
    return unused


def is_part(site: Site) -> bool:
    """Whether a site is one part of a layer, such as a head: the other parts and a residual bypass it."""
    return not site.tags.isdisjoint(_PARTS)


def is_read(site: Site) -> bool:
    """Whether a site can only be read, such as the node states that messages pass between."""
    return "read" in site.tags


def warn_bypassed(hooked: Hooked, batch: Any, sites: Sequence[Site], seed: int = 0) -> None:
    """Warn of sites that information bypasses, with BypassedWarning."""
    whole = [site for site in sites if not is_part(site)]
    around = [str(site) for site, way in bypassed(hooked, batch, whole, seed).items() if way]
    if around:
        warnings.warn(
            f"with every position masked at {', '.join(around)}, another input still changes the output: "
            "information bypasses these sites, so masks there tell only part of the story. `maskhooks doctor` shows "
            "all sites.",
            BypassedWarning,
            stacklevel=4,
        )


def _read(hooked: Hooked, batch: Any, sites: Sequence[Site], known: Modules) -> tuple[Tap, Any]:
    """Return the tap that read the sites, and the outputs."""
    often: set[str] = set()
    while True:
        tap = Tap(hooked.model, [_each(site, known, str(site) in often) for site in sites])
        try:
            with warnings.catch_warnings(), tap:
                warnings.simplefilter("ignore", UnfiredSiteWarning)  # the report covers each site
                return tap, hooked(batch)
        except SiteNeverFiredError:
            return tap, tap.outputs
        except SiteFiredTooOftenError as error:  # all steps of a module that reads several sequences
            if str(error.site) in often or str(error.site) not in map(str, sites):
                raise
            often.add(str(error.site))


def _each(site: Site, known: Modules, often: bool) -> Site:
    """Address every call of a site, or all steps or portions as one value unless it fired too often for that."""
    whole = not often and isinstance(known.get(site.module), (Steps, Parts)) and site.call is None
    return dataclasses.replace(site, call=None if whole else "*", optional=True)


def _way(finding: Finding) -> str:
    if is_read(finding.site):
        return "only read"
    return "yes, a part" if finding.bypassed and is_part(finding.site) else _BYPASSED[finding.bypassed]


def _finding(site: Site, tap: Tap, hooks: int, packages: Sequence[str]) -> Finding:
    path = nested.format_path(site.path)
    values = [
        value
        for call in range(10_000)
        if (value := tap.values.get(f"{site.module}@{call}:{site.port}{path}")) is not None
    ]
    values += [value for value in [tap.values.get(str(site))] if value is not None and site.call is None]
    trouble = tap.skipped.get(f"{site.module}@*:{site.port}{path}", "")
    if not values and not trouble:
        trouble = _SILENT
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
        hooks,
        trouble,
        packages,
    )


def _describe(outputs: Any) -> str:
    if isinstance(outputs, Distribution):
        return f"{type(outputs).__name__} over batch {list(outputs.batch_shape)}"
    if isinstance(outputs, Positions):
        return f"{_describe(outputs.distribution)}, {int(outputs.chosen.sum())} positions chosen"
    return ", ".join(f"{name}: {_describe(part)}" for name, part in outputs.items())
