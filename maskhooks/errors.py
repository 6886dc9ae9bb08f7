"""Every error and warning of maskhooks, in one tree::

    MaskhooksError
    ├── SiteError                    .site
    │   ├── UnknownSiteError         .near
    │   ├── PatternError
    │   ├── SiteNeverFiredError      .sites
    │   ├── SiteFiredTooOftenError
    │   ├── NotATensorError
    │   ├── ReplacementError
    │   ├── GradientError
    │   └── SiteConflictError
    ├── ModelError                   .module
    │   ├── CompiledModelError
    │   └── TappedModelError
    ├── TaskError
    │   ├── UnknownDistributionError
    │   ├── BatchError
    │   └── EmptyLoaderError
    ├── TrainingError
    │   ├── SettingError
    │   ├── NonFiniteError           .site
    │   ├── NotFittedError
    │   └── SearchLimitError
    ├── PluginError                  .plugin
    │   ├── AdapterConflictError
    │   ├── NameTakenError
    │   ├── UnknownNameError         .near
    │   └── MissingExtraError
    └── StorageError                 .path
        ├── CorruptFileError
        ├── FingerprintError         .differences
        └── ResumeError              .differences

    MaskhooksWarning
    ├── UnfiredSiteWarning
    ├── BypassedWarning
    ├── MarginWarning
    ├── FingerprintWarning
    ├── ResumeWarning
    ├── SearchLimitWarning
    └── PluginWarning

Each message says what is wrong, names the thing, and gives a way out; each class has a page in docs/reference/errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def near(name: str, known: Iterable[str], count: int = 5) -> list[str]:
    """The names most like `name` among `known`, in whole or at their ends, best first."""

    def likeness(other: str) -> float:
        ends = {other, other[-len(name) :]} if name else {other}
        return max(difflib.SequenceMatcher(None, end, name).ratio() for end in ends)

    names = {other: 0.9 if name and name in other else likeness(other) for other in sorted(set(known))}
    return sorted((other for other in names if names[other] >= 0.5), key=lambda other: -names[other])[:count]


def _did_you_mean(names: Sequence[str]) -> str:
    return f" Did you mean {', '.join(repr(name) for name in names)}?" if names else ""


class MaskhooksError(Exception):
    """The root of all errors raised by maskhooks."""


class SiteError(MaskhooksError):
    """Something is wrong with one site."""

    def __init__(self, message: str, *, site: object = None) -> None:
        super().__init__(message)
        self.site = site


class UnknownSiteError(SiteError):
    """No site or module answers to this address, glob or tag."""

    def __init__(self, message: str, *, site: object = None, near: Sequence[str] = ()) -> None:
        super().__init__(message + _did_you_mean(near), site=site)
        self.near = list(near)


class PatternError(SiteError):
    """A pattern that cannot be read, or that does not fit the value at its site."""


class SiteNeverFiredError(SiteError):
    """Sites named exactly whose value was never computed while the model ran."""

    def __init__(self, message: str, *, sites: Sequence[object] = ()) -> None:
        super().__init__(message, site=sites[0] if sites else None)
        self.sites = list(sites)


class SiteFiredTooOftenError(SiteError):
    """A module ran more often in one forward pass than its site's address says."""


class NotATensorError(SiteError):
    """The value at a site's path is not a tensor, or the path leads nowhere."""


class ReplacementError(SiteError):
    """A replacement that is not a tensor of the shape, dtype and device of the value it replaces."""


class GradientError(SiteError):
    """No gradient, or no true one, would come back to what was put in place of a value."""


class SiteConflictError(SiteError):
    """Two replacements of one value within one tap."""


class ModelError(MaskhooksError):
    """Something is wrong with the model or one of its modules."""

    def __init__(self, message: str, *, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module


class CompiledModelError(ModelError):
    """A compiled or scripted module, in which hooks added now would be ignored."""


class TappedModelError(ModelError):
    """The model was copied or pickled while a tap held its hooks."""


class TaskError(MaskhooksError):
    """Something is wrong between batch, model and output."""


class UnknownDistributionError(TaskError):
    """The model's outputs are not known to be any distribution."""


class BatchError(TaskError):
    """A batch that the model or task cannot use, such as one without the expected keys."""


class EmptyLoaderError(TaskError):
    """A loader that yields no batch."""


class TrainingError(MaskhooksError):
    """Something is wrong with how an explainer is trained or asked."""


class SettingError(TrainingError, ValueError):
    """A setting outside its range, such as a margin that is not positive."""


class NonFiniteError(TrainingError):
    """Training met NaN or infinity; the last good state was kept."""

    def __init__(self, message: str, *, site: object = None) -> None:
        super().__init__(message)
        self.site = site


class NotFittedError(TrainingError):
    """An explainer was asked to explain, or to be saved, before it was fitted."""


class SearchLimitError(TrainingError):
    """An example with more positions than a search goes through."""


class PluginError(MaskhooksError):
    """Something is wrong with a plugin or with a name that a plugin should give."""

    def __init__(self, message: str, *, plugin: str | None = None) -> None:
        super().__init__(message)
        self.plugin = plugin


class AdapterConflictError(PluginError):
    """Two adapters claim one module with equal right."""


class NameTakenError(PluginError):
    """A second part was registered under a name in use."""


class UnknownNameError(PluginError):
    """No part is registered under this name."""

    def __init__(self, message: str, *, plugin: str | None = None, near: Sequence[str] = ()) -> None:
        super().__init__(message + _did_you_mean(near), plugin=plugin)
        self.near = list(near)


class MissingExtraError(PluginError):
    """An optional library is needed and not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed. Run: pip install 'maskhooks[{extra}]'",
            plugin=extra,
        )


class StorageError(MaskhooksError):
    """Something is wrong with a saved file or folder."""

    def __init__(self, message: str, *, path: object = None) -> None:
        super().__init__(message)
        self.path = path


class CorruptFileError(StorageError):
    """A saved file that is missing, broken, or of a kind that is never read (a pickle)."""


class FingerprintError(StorageError):
    """What was saved belongs to another model."""

    def __init__(self, message: str, *, path: object = None, differences: Sequence[str] = ()) -> None:
        super().__init__(message, path=path)
        self.differences = list(differences)


class ResumeError(StorageError):
    """What was begun earlier was begun with other settings, another model or other data."""

    def __init__(self, message: str, *, path: object = None, differences: Sequence[str] = ()) -> None:
        super().__init__(message, path=path)
        self.differences = list(differences)


class MaskhooksWarning(UserWarning):
    """The root of all warnings given by maskhooks."""


class UnfiredSiteWarning(MaskhooksWarning):
    """Some sites found by glob, or marked optional, never fired; or no output depends on some of those to be masked."""


class BypassedWarning(MaskhooksWarning):
    """With a site fully masked the output still depends on the input: information goes another way."""


class MarginWarning(MaskhooksWarning):
    """No checkpoint kept the divergence within the margin."""


class FingerprintWarning(MaskhooksWarning):
    """What was saved belongs to another model, and was loaded all the same."""


class ResumeWarning(MaskhooksWarning):
    """A run goes on from another place than was asked: from an earlier state, or from the start."""


class SearchLimitWarning(MaskhooksWarning):
    """A limit ended a search before a set of positions was found."""


class PluginWarning(MaskhooksWarning):
    """A plugin could not be loaded, or part of it was ignored."""
