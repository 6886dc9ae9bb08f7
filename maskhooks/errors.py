"""All maskhooks errors and warnings, in one tree::

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
        ├── FormatError
        ├── FingerprintError         .differences
        └── ResumeError              .differences

    MaskhooksWarning
    ├── UnfiredSiteWarning
    ├── BypassedWarning
    ├── MarginWarning
    ├── FingerprintWarning
    ├── ResumeWarning
    ├── CacheWarning
    ├── SearchLimitWarning
    └── PluginWarning

Each message says what is wrong, names the thing and gives a fix; each class has a page in docs/reference/errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def close_matches(name: str, known: Iterable[str], count: int = 5) -> list[str]:
    """Return the names in `known` most similar to `name`, as a whole or by their endings, best first."""

    def likeness(other: str) -> float:
        ends = {other, other[-len(name) :]} if name else {other}
        return max(difflib.SequenceMatcher(None, end, name).ratio() for end in ends)

    names = {other: 0.9 if name and name in other else likeness(other) for other in sorted(set(known))}
    return sorted((other for other in names if names[other] >= 0.5), key=lambda other: -names[other])[:count]


def _did_you_mean(names: Sequence[str]) -> str:
    return f" Did you mean {', '.join(repr(name) for name in names)}?" if names else ""


class MaskhooksError(Exception):
    """Base class of all maskhooks errors."""


class SiteError(MaskhooksError):
    """Something is wrong with one site."""

    def __init__(self, message: str, *, site: object = None) -> None:
        super().__init__(message)
        self.site = site


class UnknownSiteError(SiteError):
    """No site or module matches this address, glob or tag."""

    def __init__(self, message: str, *, site: object = None, near: Sequence[str] = ()) -> None:
        super().__init__(message + _did_you_mean(near), site=site)
        self.near = list(near)


class PatternError(SiteError):
    """A pattern cannot be parsed, or does not fit the value at its site."""


class SiteNeverFiredError(SiteError):
    """Sites were named exactly, but the model never computed their values."""

    def __init__(self, message: str, *, sites: Sequence[object] = ()) -> None:
        super().__init__(message, site=sites[0] if sites else None)
        self.sites = list(sites)


class SiteFiredTooOftenError(SiteError):
    """A module ran more often in one forward pass than its site's address allows."""


class NotATensorError(SiteError):
    """The value at a site's path is not a tensor, or the path does not exist."""


class ReplacementError(SiteError):
    """A replacement is not a tensor with the shape, dtype and device of the value it replaces."""


class GradientError(SiteError):
    """A replacement would get no gradient, or a wrong one."""


class SiteConflictError(SiteError):
    """One tap replaces the same value twice."""


class ModelError(MaskhooksError):
    """Something is wrong with the model or one of its modules."""

    def __init__(self, message: str, *, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module


class CompiledModelError(ModelError):
    """A compiled or scripted module would ignore hooks added now."""


class TappedModelError(ModelError):
    """The model was copied or pickled while a tap's hooks were on it."""


class TaskError(MaskhooksError):
    """The batch, the model and the output do not fit together."""


class UnknownDistributionError(TaskError):
    """The distribution of the model's outputs is unknown."""


class BatchError(TaskError):
    """The model or task cannot use the batch, for example because keys are missing."""


class EmptyLoaderError(TaskError):
    """A loader yields no batches, or can be read only once."""


class TrainingError(MaskhooksError):
    """Something is wrong with how an explainer is trained or used."""


class SettingError(TrainingError, ValueError):
    """A setting is out of range, such as a margin that is not positive."""


class NonFiniteError(TrainingError):
    """Training reached NaN or infinity; the last good state was kept."""

    def __init__(self, message: str, *, site: object = None) -> None:
        super().__init__(message)
        self.site = site


class NotFittedError(TrainingError):
    """An explainer was used or saved before it was fitted."""


class SearchLimitError(TrainingError):
    """An example has more positions than a search allows."""


class PluginError(MaskhooksError):
    """Something is wrong with a plugin, or with a name that a plugin should provide."""

    def __init__(self, message: str, *, plugin: str | None = None) -> None:
        super().__init__(message)
        self.plugin = plugin


class AdapterConflictError(PluginError):
    """Two adapters claim one module with equal priority."""


class NameTakenError(PluginError):
    """A name is already registered."""


class UnknownNameError(PluginError):
    """Nothing is registered under this name."""

    def __init__(self, message: str, *, plugin: str | None = None, near: Sequence[str] = ()) -> None:
        super().__init__(message + _did_you_mean(near), plugin=plugin)
        self.near = list(near)


class MissingExtraError(PluginError):
    """A required optional library is not installed."""

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
    """A saved file is missing, broken or a pickle, which is never read."""


class FormatError(StorageError):
    """A saved file or folder of another version's format."""


class FingerprintError(StorageError):
    """The saved files belong to another model."""

    def __init__(self, message: str, *, path: object = None, differences: Sequence[str] = ()) -> None:
        super().__init__(message, path=path)
        self.differences = list(differences)


class ResumeError(StorageError):
    """The earlier run used other settings, another model or other data."""

    def __init__(self, message: str, *, path: object = None, differences: Sequence[str] = ()) -> None:
        super().__init__(message, path=path)
        self.differences = list(differences)


class MaskhooksWarning(UserWarning):
    """Base class of all maskhooks warnings."""


class UnfiredSiteWarning(MaskhooksWarning):
    """Some sites found by a glob or marked optional never fired, or no output depends on some sites to mask."""


class BypassedWarning(MaskhooksWarning):
    """The output still depends on the input while a site is fully masked: information bypasses the site."""


class MarginWarning(MaskhooksWarning):
    """No checkpoint kept the divergence within the margin."""


class FingerprintWarning(MaskhooksWarning):
    """The saved files belong to another model and were loaded anyway."""


class ResumeWarning(MaskhooksWarning):
    """A run resumes from an earlier state than requested, or from the start."""


class CacheWarning(MaskhooksWarning):
    """Not all clean passes can be stored, so some are computed in each step."""


class SearchLimitWarning(MaskhooksWarning):
    """A limit ended a search before it found a set of positions."""


class PluginWarning(MaskhooksWarning):
    """A plugin could not be loaded, or part of it was ignored."""
