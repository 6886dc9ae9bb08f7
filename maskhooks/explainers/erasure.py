"""Exact erasure: the smallest sets of positions that leave a prediction unchanged, found by trying all smaller ones."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskhooks.errors import SearchLimitError, SearchLimitWarning
from maskhooks.explainers.smallest_sets import SmallestSets
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import KEPT_OR_ERASED
from maskhooks.hooks.preserved import preserved
from maskhooks.masks.baselines import BaselineSetting
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DivergenceSetting, parameters
from maskhooks.passes.clean import Clean, with_dependencies
from maskhooks.progress import Bar
from maskhooks.search.batched import RowQuestion
from maskhooks.search.exact import Search, SearchResult, Strategy, estimate_time
from maskhooks.search.flat import Flat
from maskhooks.search.question import Criterion, Question
from maskhooks.search.repeated import Repeated
from maskhooks.search.saved import Saved
from maskhooks.search.scheduler import SearchSteps
from maskhooks.search.shared import tree
from maskhooks.settings.schema import checked
from maskhooks.settings.types import Count, Folder, Positive, Seed
from maskhooks.sites.site import Selector

_NO_TREE = contextlib.nullcontext(None)


class Erasure(SmallestSets):
    """Finds all smallest sets of positions that leave the prediction unchanged when the others are erased.

    min `|S|` subject to criterion(y, y_S), by trying all sets of 0, 1, 2, ... positions (De Cao et al. 2020, section
    3.2). An example's rows show its first smallest set in the order of positions: 1 for kept, 0 for erased. If a
    recurrent module reads the positions and its last state decides, sets with a common beginning share its states (see
    `Adapter.recurrence`). Any other model runs once for each set, from the site onward. If each example has its own
    rows, such as the edges of a graph, one pass tries a set of each example. If a limit ends the search, a warning says
    so, and the rows keep every position.

    Args:
        hooked, sites, baseline, criterion, margin, divergence, batch_size, replay, seed: as `SmallestSets` takes
            them.
        max_positions: the most positions of an example that is searched.
        max_set_size: the most positions of a set; None for no limit.
        max_sets: the most sets tried for an example; None for no limit.
        time_limit: seconds spent on an example in one call; None for no limit. Examples whose sets are tried in the
            same passes share it.
        memory_limit: bytes for the states of a recurrence; states that do not fit are computed again.

    Raises:
        SettingError: a number is out of range, or both a criterion and a margin are given.
        UnknownSiteError: no site matches.
    """

    name = "erasure"
    score_label = KEPT_OR_ERASED

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        baseline: BaselineSetting = "zero",
        criterion: Criterion | None = None,
        margin: Positive | None = None,
        divergence: DivergenceSetting = "kl",
        max_positions: Count = 25,
        max_set_size: Count | None = None,
        max_sets: Count | None = None,
        time_limit: Positive | None = None,
        batch_size: Count = 64,
        memory_limit: Positive = 2e9,
        replay: bool = True,
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            hooked,
            sites,
            baseline=baseline,
            criterion=criterion,
            margin=margin,
            divergence=divergence,
            batch_size=batch_size,
            replay=replay,
            seed=seed,
        )
        self.max_positions, self.max_set_size, self.max_sets, self.time_limit = (
            max_positions,
            max_set_size,
            max_sets,
            time_limit,
        )
        self.memory_limit = memory_limit
        self._latest: list[SearchResult] = []

    @checked
    def search(self, batch: Any, *, state: Folder | None = None, progress: bool = True) -> list[SearchResult]:
        """Return the search result of each example, site by site; positions are numbered as in an explanation's rows.

        Args:
            batch: a batch, as the loaders yield it.
            state: a file for the state of the search, written every half minute, at the end, and when a limit or
                Ctrl-C stops the search. The same call later resumes from it.
            progress: whether to show progress on stderr.

        Raises:
            SearchLimitError: an example has more than `max_positions`; the message says how long it would take.
            ResumeError: the file belongs to another search.
            CorruptFileError, StorageError: the file cannot be read or written.

        Warns:
            SearchLimitWarning: a limit ended the search for an example.
        """
        with preserved(self.hooked.model):
            return [one for _, found in self._search(self.clean(batch), state, progress) for one in found]

    def scores(self, clean: Clean) -> list[Scores]:
        self._latest, scores = [], []
        for questions, found in self._search(clean, None, False):
            self._latest += found
            kept = [_kept(question, one) for question, one in zip(questions, found, strict=True)]
            scores.append(self.spread_scores(clean, questions, kept, rest=1.0))
        return scores

    def _search(
        self, clean: Clean, state: str | Path | None, progress: bool
    ) -> list[tuple[Sequence[Question], list[SearchResult]]]:
        """Return for each site its questions and their search results."""
        sites = [self.questions(clean, site) for site in self.sites]
        every = [question for questions in sites for question in questions]
        for question in every:
            self._check_length(question)
        searches = {question: Search(question.positions) for question in every}
        saved = None if state is None else Saved(Path(state), self._identity(clean, every), [*searches.values()])
        try:
            with _shown(len(every), progress) as advance:

                def steps(question: Question) -> SearchSteps[SearchResult]:
                    return self._asking(question, searches[question], saved, advance)

                found = [self.answers(questions, steps, self.unchanged) for questions in sites]
        finally:
            if saved is not None:
                saved.now()
        for question, one in zip(every, itertools.chain(*found), strict=True):
            if one.stopped is not None:
                text = f"{_of(question)}: {one}. An explanation keeps all of them; allow more to find out"
                warnings.warn(text, SearchLimitWarning, stacklevel=4)
        return list(zip(sites, found, strict=True))

    def _asking(
        self, question: Question, search: Search, saved: Saved | None, advance: Any
    ) -> SearchSteps[SearchResult]:
        def progress(at: Search) -> None:
            advance(at, 0)
            if saved is not None:
                saved.later()

        limits: dict[str, Any] = {"max_sets": self.max_sets, "time_limit": self.time_limit, "progress": progress}
        found = yield from search.steps(Flat(question.positions, question.rows), max_set_size=1, **limits)
        if found.stopped == "max_set_size" and self.max_set_size != 1:  # a tree takes longer to prepare
            with self._way(question) as way:
                found = yield from search.steps(way, max_set_size=self.max_set_size, **limits)
        advance(search, 1)
        numbered = tuple(tuple(question.units[unit][0] for unit in one) for one in found.solutions)
        return dataclasses.replace(found, solutions=numbered)

    @contextlib.contextmanager
    def _way(self, question: Question) -> Iterator[Strategy]:
        """Yield the strategy that tries the sets of an example."""
        with (
            tree(question, self.unchanged, memory=self.memory_limit)
            if isinstance(question, Repeated)
            else _NO_TREE as shared
        ):
            yield Flat(question.positions, question.rows) if shared is None else shared

    def _check_length(self, question: Question) -> None:
        if question.positions > self.max_positions:
            with self._way(question) as way:
                text, top = estimate_time(way, question.positions, lambda sets: question.measured(sets, self.unchanged))
            raise SearchLimitError(
                f"{_of(question)} has {question.positions} positions, more than max_positions={self.max_positions}: "
                f"{text}. Leave it out, or allow more: Erasure(hooked, max_positions={question.positions}, "
                f"max_set_size={max(top, 1)})"
            )

    def _identity(self, clean: Clean, questions: Sequence[Question]) -> dict[str, Any]:
        """Return what must be the same for a search to resume."""
        units = hashlib.sha256(json.dumps([question.units for question in questions]).encode()).hexdigest()
        digest = hashlib.sha256()
        for site in with_dependencies(self.hooked, self.sites):
            digest.update(_bytes(clean.values[site]))
        if any(isinstance(question, RowQuestion) for question in questions):  # edges alone do not identify a graph
            for numbers in parameters(clean.outputs):
                digest.update(_bytes(numbers))
        known = self.provenance()
        same = ("fingerprint", "sites", "baseline", "criterion", "margin")
        return {"values": digest.hexdigest(), "units": units, **{key: known[key] for key in same}}

    def _about(self, clean: Clean) -> list[dict[str, str]]:
        """Return the metadata of each example, with its search result."""
        count = len(self._latest) // len(self.sites)
        words: list[dict[str, str]] = super()._about(clean) or [{} for _ in range(count)]
        for number, about in enumerate(words):
            about["search"] = "; ".join(str(found) for found in self._latest[number::count])
        return words


def _bytes(values: Tensor) -> bytes:
    return bytes(values.detach().float().cpu().contiguous().numpy().tobytes())


def _kept(question: Question, found: SearchResult) -> Tensor:
    """Return 1 for the positions of the first solution, 0 for the others; without a solution all are kept."""
    kept = [unit[0] in found.solutions[0] if found.solutions else True for unit in question.units]
    return torch.tensor(kept, dtype=torch.float32)


def _of(question: Question) -> str:
    return f"example {question.example} at {question.site}"


@contextlib.contextmanager
def _shown(total: int, shown: bool) -> Iterator[Any]:
    """Count examples on stderr and say how far the search is."""
    with Bar("searching", total, shown=shown) as bar:

        def advance(search: Search, done: int) -> None:
            bar.update(bar.done + done, f"sets of {search.size} of {search.positions}, {search.tried:,} tried")

        yield advance
