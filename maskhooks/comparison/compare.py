"""`compare`: explain data by several methods, judge them all, and measure what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskhooks.comparison.comparison import Comparison
from maskhooks.comparison.digest import digest
from maskhooks.comparison.judging import Depths, Judging, default_metrics, labelled
from maskhooks.comparison.known_metric import told
from maskhooks.comparison.methods import Method, about, check_same_sites, default_methods, methods_of
from maskhooks.comparison.store import Explained, Store
from maskhooks.errors import EmptyLoaderError, NotFittedError
from maskhooks.explainers.base import Explainer, index_after
from maskhooks.explanations.explanation import Explanation
from maskhooks.metrics.evidence import Truth, not_special
from maskhooks.metrics.intervals import Confidence, check_scipy
from maskhooks.metrics.metric import Metric
from maskhooks.model.fingerprint import fingerprint
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import count
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import clean_pass
from maskhooks.progress import Bar
from maskhooks.seeds import preserved_rng, seeded
from maskhooks.settings.schema import checked
from maskhooks.settings.types import Folder, Seed
from maskhooks.sites.site import Selector

_STREAM = 430  # the purpose of random numbers
_Metric = str | Mapping[str, Any] | Metric


@checked
def compare(
    hooked: Hooked,
    explainers: Mapping[str, Any] | Sequence[Any] | None,
    batches: Iterable[Any],
    *,
    metrics: _Metric | Sequence[_Metric] | None = None,
    sites: Selector | None = None,
    truth: Truth | None = None,
    counts: Callable[[str], bool] = not_special,
    depths: Depths = "last",
    fit_batches: Iterable[Any] | None = None,
    validation_batches: Iterable[Any] | None = None,
    folder: Folder | None = None,
    confidence: Confidence = 0.95,
    seed: Seed = 0,
    progress: bool = True,
) -> Comparison:
    """Compare methods on a model and data: which explanations are to be believed, and what do they cost?

    Each batch is explained by each method in turn and judged by each metric. The model and the random state are
    unchanged.

    Args:
        hooked: the wrapped model.
        explainers: the methods, by label or in a list: explainers; their names, or mappings of name and settings;
            folders of runs; or explanations of the same batches. None takes integrated gradients and input times
            gradient (where Captum is installed), leave-one-out, and random scores.
        batches: what is explained, in order.
        metrics: metrics by name, as mappings of name and settings, or as objects. None takes comprehensiveness,
            sufficiency, area-between and divergence where the model predicts classes, else divergence; with a truth
            also auroc and average-precision. A metric of agreement compares each method with all others.
        sites: what explainers given by name explain. None takes the sites of an explainer that is given; else the
            inputs, the messages or the hidden states, whichever the model has first.
        truth: what each example's prediction needs, as `judge` takes it.
        counts: which labels count, as `judge` takes it.
        depths: which depths are judged where the masks of one site are read from several: the "last", or "all", each in
            a row of its own.
        fit_batches: training batches for explainers that must be fitted. Copies are fitted, the given ones stay as
            they are.
        validation_batches: validation batches for them.
        folder: keeps what is done. After a kill the same call goes on, and does nothing again that is done.
        confidence: the nominal coverage of intervals.
        seed: the random seed, also of explainers given by name.
        progress: whether to show progress on stderr, with an estimate of the time left.

    Raises:
        MissingExtraError: SciPy is not installed, which intervals and tests need.
        UnknownNameError: no explainer or metric has this name; near names are listed.
        NotFittedError: an explainer must be fitted, and there are no `fit_batches`.
        EmptyLoaderError: there is no batch.
        SettingError: a metric lacks what it needs or does not fit the data; an explainer or explanation is of another
            model; methods explain different sites; scores are NaN; an example has no position that counts. The message
            begins with the method.
        ResumeError: the folder holds a comparison of something else.
        StorageError: a file cannot be written.
    """
    check_scipy()
    loaded = list(batches)
    if not loaded:
        raise EmptyLoaderError("there is nothing to explain: the loader yields no batch")
    methods = methods_of(default_methods(hooked) if explainers is None else explainers, hooked, sites, seed)
    wanted = default_metrics(hooked, loaded[0], truth) if metrics is None else metrics
    listed: list[_Metric] = [wanted] if isinstance(wanted, (str, Mapping, Metric)) else list(wanted)
    made = labelled(listed)
    if fit_batches is None:
        _check_ready(methods)
    judging = Judging(hooked, made, loaded, truth, counts, len(methods), depths)
    settings = {
        "model": {"name": type(hooked.model).__name__, "fingerprint": fingerprint(hooked.model)["digest"]},
        "methods": {method.label: method.settings() for method in methods},
        "metrics": {label: told(metric) for label, metric in made.items()},
        "batches": [digest(batch) for batch in loaded],
        "truth": None if truth is None else digest(truth),
        "counts": getattr(counts, "__qualname__", type(counts).__qualname__),
        "depths": depths,
        "seed": seed,
    }
    store = Store.open(settings, None if folder is None else Path(folder))
    work = _Work(hooked, methods, judging, loaded, store, seed, fit_batches, validation_batches, progress)
    with preserved_rng(hooked.model):
        work.run()
    return Comparison(store, confidence=confidence, counts=counts)


class _Work:
    """Explains and judges batch by batch what is missing in a store."""

    def __init__(
        self,
        hooked: Hooked,
        methods: Sequence[Method],
        judging: Judging,
        batches: Sequence[Any],
        store: Store,
        seed: int,
        train: Iterable[Any] | None,
        validation: Iterable[Any] | None,
        progress: bool,
    ) -> None:
        self.hooked, self.methods, self.judging, self.batches, self.store = hooked, methods, judging, batches, store
        self.seed, self.train, self.validation, self.progress = seed, train, validation, progress
        self._provenance: dict[str, dict[str, Any]] = {}
        # By kind of work and method: seconds of each batch, and the number of batches that are missing.
        self._spent: dict[tuple[str, str], list[float]] = {}
        kinds: dict[str, Callable[[str, int], Any]] = {"explain": store.explained, "judge": store.judged}
        self._open = {
            (kind, method.label): sum(there(method.label, number) is None for number in range(len(batches)))
            for kind, there in kinds.items()
            for method in methods
        }

    def run(self) -> None:
        """Do what is missing, with progress."""
        self._fit()
        first = 0
        with Bar("comparing", 2 * len(self.methods) * len(self.batches), shown=self.progress) as bar:
            for number, batch in enumerate(self.batches):
                explained = self._explain(number, batch, first, bar)
                if number == 0:
                    check_same_sites({label: one.explanation.sites for label, one in explained.items()})
                self._judge(number, batch, first, explained, bar)
                first = max(index_after(one.explanation, first) for one in explained.values())

    def _fit(self) -> None:
        """Fit the methods that must be, unless all they were to explain is there."""
        for method in self.methods:
            if self._open["explain", method.label] and not method.ready:
                assert self.train is not None
                folder = self.store.fit_folder(method.label)
                method.fit(self.train, self.validation, folder, progress=self.progress)

    def _explain(self, number: int, batch: Any, first: int, bar: Bar) -> dict[str, Explained]:
        found: dict[str, Explained] = {}
        for method in self.methods:
            there = self.store.explained(method.label, number)
            if there is None:
                bar.update(text=f"batch {number + 1}: {method.label}", left=self._left)
                begun = time.perf_counter()
                there = self._explained(method, number, batch, first)
                self.store.add_explained(method.label, number, there)
                self._done(("explain", method.label), time.perf_counter() - begun)
            found[method.label] = there
            bar.update(bar.done + 1, left=self._left)
        return found

    def _explained(self, method: Method, number: int, batch: Any, first: int) -> Explained:
        """Explain a batch, and take the time."""
        torch.manual_seed(seeded(self.seed, _STREAM, number))
        if not isinstance(method.explainer, Explainer):
            clean = clean_pass(self.hooked, move(batch, device_of(self.hooked.model)), [])
            explanation = method.explain(batch, first, {}, count(clean.outputs))
            return Explained(explanation, float("nan"), False, None)
        fresh = method.label not in self._provenance
        if fresh:
            self._provenance[method.label] = method.explainer.provenance()
        begun = time.perf_counter()
        explanation = method.explain(batch, first, self._provenance[method.label], 0)
        return Explained(explanation, time.perf_counter() - begun, fresh, method.fit_seconds)

    def _judge(self, number: int, batch: Any, first: int, explained: Mapping[str, Explained], bar: Bar) -> None:
        for method in self.methods:
            label = method.label
            if self.store.judged(label, number) is None:
                bar.update(text=f"batch {number + 1}: judging {label}", left=self._left)
                begun = time.perf_counter()
                others: list[Explanation] = [one.explanation for name, one in explained.items() if name != label]
                explainer = method.explainer if isinstance(method.explainer, Explainer) else None
                with about(label):
                    judged = self.judging(explained[label].explanation, explainer, batch, first, others)
                self.store.add_judged(label, number, judged)
                self._done(("judge", label), time.perf_counter() - begun)
            bar.update(bar.done + 1, left=self._left)

    def _done(self, work: tuple[str, str], seconds: float) -> None:
        """Note that a kind of work on a batch is done, and how long it took."""
        self._spent.setdefault(work, []).append(seconds)
        self._open[work] -= 1

    @property
    def _left(self) -> float | None:
        """The seconds that the rest will take, from the mean time of each kind of work; None before each is known."""
        if any(missing and work not in self._spent for work, missing in self._open.items()):
            return None
        means = {work: sum(spent) / len(spent) for work, spent in self._spent.items()}
        return float(sum(missing * means[work] for work, missing in self._open.items() if missing))


def _check_ready(methods: Sequence[Method]) -> None:
    for method in methods:
        if not method.ready:
            raise NotFittedError(
                f"{method.label} must be fitted before it explains. Fit it, with maskhooks fit or explainer.fit, and "
                "give its folder or the explainer; or give the batches to fit it with, compare(..., fit_batches=...)"
            )
