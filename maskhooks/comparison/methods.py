"""Methods: what is compared, each an explainer under a label."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskhooks.comparison.digest import digest
from maskhooks.errors import (
    MaskhooksError,
    MissingExtraError,
    NotFittedError,
    SettingError,
    UnknownNameError,
    close_matches,
)
from maskhooks.explainers.base import EXPLAINERS, Explainer
from maskhooks.explainers.learned import Learned
from maskhooks.explainers.saving import load
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.shards import Shards
from maskhooks.model.fingerprint import fingerprint
from maskhooks.model.hooked import Hooked
from maskhooks.plugins.registry import registry
from maskhooks.sites.site import Selector

#: A method: an explainer; its name, or a mapping of its name and settings; the folder of a run; or an explanation.
Given = Explainer | Explanation | Shards | str | Path | Mapping[str, Any]

_GRADIENTS = ("integrated-gradients", "input-x-gradient")  # where Captum is installed
_DEFAULT = (*_GRADIENTS, "leave-one-out", "random")


def default_methods(hooked: Hooked) -> list[str]:
    """Return methods that need no training: two by gradients if Captum is installed, leave-one-out, random scores."""
    chosen = [name for name in _DEFAULT if name in registry.parts(EXPLAINERS)]
    try:
        Method.of("", chosen[0], hooked, default_sites(hooked), 0)
    except MissingExtraError:
        return [name for name in chosen if name not in _GRADIENTS]
    return chosen


def default_sites(hooked: Hooked) -> Selector:
    """Return the tag of the sites that are explained if nothing else is said: inputs, else messages, else states."""
    tags = {tag for site in hooked.sites for tag in site.tags}
    return next((tag for tag in ("input", "message", "hidden") if tag in tags), "hidden")


@dataclass
class Method:
    """A method to compare.

    Attributes:
        label: what it is called.
        explainer: makes the scores; or an explanation, whose scores there are already.
        fit_seconds: how long it was trained; None if it was not, or nobody knows.
        fitted_here: whether `fit` trains it.
    """

    label: str
    explainer: Explainer | Explanation
    fit_seconds: float | None = None
    fitted_here: bool = False

    @classmethod
    def of(cls, label: str, given: Given, hooked: Hooked, sites: Selector, seed: int) -> Method:
        """Return the method for what a user gave.

        Args:
            label: what it is called; "" is the explainer's name, or that of the folder.
            sites, seed: for an explainer given by name.

        Raises:
            UnknownNameError: there is no such explainer.
            SettingError: the explainer is of another model, or a setting is wrong.
            FingerprintError: the run is of another model.
        """
        found: Any = given
        if isinstance(given, Path) or (isinstance(given, str) and Path(given).is_dir()):
            label, found = label or Path(given).name, load(given, hooked)
        elif isinstance(given, (str, Mapping)):
            found = _named(given, hooked, sites, seed)
        elif isinstance(given, Shards):
            found = Explanation.from_parquet(given.folder)
        if isinstance(found, Explanation):
            return cls(label or str(found.provenance.get("explainer", "explanation")), found)
        if not isinstance(found, Explainer):
            raise SettingError(
                f"{found!r} is not a method. Give an explainer, its name, the folder of a run, or an explanation"
            )
        label = label or found.name
        if found.hooked.model is not hooked.model and _differ(found.hooked, hooked):
            raise SettingError(
                f"{label}: this explainer is of another model than the {type(hooked.model).__name__} that is "
                "compared on: their fingerprints differ. Make it, or load it, with the same wrapped model"
            )
        seconds = getattr(getattr(found, "result", None), "seconds", None)
        return cls(label, found, seconds or None)

    @property
    def sites(self) -> set[str]:
        """The addresses of the sites that it scores, as far as they are known before it explains."""
        if isinstance(self.explainer, Explanation):
            return set(self.explainer.sites)
        return {str(site) for site in getattr(self.explainer, "sites", ())}

    @property
    def ready(self) -> bool:
        """Whether it can explain without being fitted."""
        try:
            if isinstance(self.explainer, Explainer):
                self.explainer.check_ready()
        except NotFittedError:
            return False
        return True

    def settings(self) -> dict[str, Any]:
        """Return what identifies it, JSON-serialisable."""
        if isinstance(self.explainer, Explanation):
            columns = {name: self.explainer[name].tolist() for name in ("example", "site", "depth", "score")}
            return {"explanation": digest(columns), **self.explainer.provenance}
        weights = self.explainer.weights_digest() if self.ready else "fitted with these data"
        return {**self.explainer.provenance(), "weights": weights}

    def fit(
        self, train: Iterable[Any], validation: Iterable[Any] | None, folder: Path | None, *, progress: bool
    ) -> None:
        """Fit a copy of the explainer, unless it is ready; in a folder, masks resume where a stopped fit was.

        The given explainer is not changed.
        """
        if self.ready or isinstance(self.explainer, Explanation):
            return
        explainer, begun = copy.copy(self.explainer), time.perf_counter()
        with about(self.label):
            if isinstance(explainer, Learned):
                resume = folder is not None and folder.exists() and any(folder.iterdir())
                explainer.fit(train, validation, run_dir=folder, resume=resume, progress=progress)
            else:
                explainer.fit(train, validation)
        seconds = getattr(getattr(explainer, "result", None), "seconds", None)
        self.explainer, self.fitted_here = explainer, True
        self.fit_seconds = seconds or time.perf_counter() - begun

    def explain(self, batch: Any, first: int, provenance: Mapping[str, Any], count: int) -> Explanation:
        """Return the scores of a batch.

        Args:
            first: the index of its first example.
            provenance: that of the explainer.
            count: the number of examples, for an explanation that there is already.
        """
        with about(self.label):
            if isinstance(self.explainer, Explainer):
                return self.explainer.explained(batch, first, provenance)
            return self.explainer.select(example=range(first, first + count), valid=None)


def methods_of(
    given: Mapping[str, Any] | Sequence[Any], hooked: Hooked, sites: Selector | None, seed: int
) -> list[Method]:
    """Return the methods for what a user gave, each with a label of its own.

    Args:
        given: each a `Given`, by label, or in a sequence, labelled by their names.
        sites: for explainers given by name; None takes those of an explainer that is given, else `default_sites`.

    Raises:
        SettingError: there is no method, two have one label, or two have no site in common.
        UnknownNameError, FingerprintError: see `Method.of`.
    """
    listed = [given] if isinstance(given, str) else given
    pairs = list(listed.items()) if isinstance(listed, Mapping) else [("", one) for one in listed]
    if not pairs:
        raise SettingError("there is no method to compare. Give explainers, by label or in a list")
    named = [isinstance(one, Mapping) or (isinstance(one, str) and not Path(one).is_dir()) for _, one in pairs]
    found: list[Method | None] = [
        None if later else Method.of(label, one, hooked, "hidden", seed)
        for (label, one), later in zip(pairs, named, strict=True)
    ]
    if sites is None:
        known = next((method.sites for method in found if method is not None and method.sites), None)
        sites = sorted(known) if known else default_sites(hooked)
    methods = [
        method or Method.of(label, one, hooked, sites, seed) for method, (label, one) in zip(found, pairs, strict=True)
    ]
    labels = [method.label for method in methods]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise SettingError(
            f"several methods are called {twice[0]!r}. Give each a label of its own: {{'first': ..., 'second': ...}}"
        )
    _check_overlap(methods)
    return methods


def check_same_sites(sites: Mapping[str, Sequence[str]]) -> None:
    """Raise SettingError if methods explained different sites.

    Args:
        sites: the addresses that each method explained, by label.
    """
    labels = list(sites)
    for label in labels[1:]:
        if set(sites[label]) != set(sites[labels[0]]):
            _raise_apart({one: set(sites[one]) for one in (labels[0], label)})


@contextlib.contextmanager
def about(label: str) -> Iterator[None]:
    """Begin the message of an error with the method that it is about."""
    try:
        yield
    except MaskhooksError as error:
        error.args = (f"{label}: {error.args[0] if error.args else ''}", *error.args[1:])
        raise


def _named(given: str | Mapping[str, Any], hooked: Hooked, sites: Selector, seed: int) -> Any:
    name = given if isinstance(given, str) else given.get("name")
    known = registry.parts(EXPLAINERS)
    if isinstance(name, str) and name not in known:
        raise UnknownNameError(
            f"{name!r} is neither the folder of a run nor the name of an explainer. The explainers are "
            f"{', '.join(sorted(known))}.",
            near=close_matches(name, known),
        )
    return registry.make(EXPLAINERS, given, {"hooked": hooked, "sites": sites, "seed": seed})


def _differ(one: Hooked, other: Hooked) -> bool:
    return bool(fingerprint(one.model)["digest"] != fingerprint(other.model)["digest"])


def _check_overlap(methods: Sequence[Method]) -> None:
    known = [method for method in methods if method.sites]
    for method in known[1:]:
        if not method.sites & known[0].sites:
            _raise_apart({one.label: one.sites for one in (known[0], method)})


def _raise_apart(sites: Mapping[str, set[str]]) -> None:
    told = "; ".join(f"{label} explains {_listed(here)}" for label, here in sites.items())
    raise SettingError(
        f"the methods explain different sites: {told}. Scores can be compared only at the same sites: give each "
        "explainer the same ones"
    )


def _listed(addresses: set[str]) -> str:
    names = sorted(addresses)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
