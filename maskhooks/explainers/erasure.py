"""Exact erasure: the smallest sets of positions that leave a prediction unchanged, found by trying all smaller ones."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maskhooks.baselines import Baseline
from maskhooks.errors import SearchLimitError, SearchLimitWarning
from maskhooks.explainers.closing import Closing, above_zero, whole
from maskhooks.explanation import Scores
from maskhooks.hooked import Hooked
from maskhooks.outputs import Divergence, kl
from maskhooks.progress import bar
from maskhooks.search.exact import Found, Search, Way, outlook
from maskhooks.search.flat import Flat
from maskhooks.search.question import Criterion, Question
from maskhooks.search.saved import Saved
from maskhooks.search.shared import tree
from maskhooks.seeds import forked
from maskhooks.site import Selector
from maskhooks.step import Clean


class Erasure(Closing):
    """The smallest sets of positions that leave the prediction unchanged when all others are erased.

    min |S| subject to criterion(y, y_S), by trying all sets of 0, 1, 2, ... positions (De Cao et al. 2020, section
    3.2). Of each example all smallest sets are found; its rows show the first of them in the order of its positions,
    1 for what is kept and 0 for what is erased. Where a recurrent module reads the positions and its last state
    decides, sets with a common beginning share its states (see `Adapter.recurrence`); any other model runs for each
    set, from the site onward. A search that a limit ends says so with a warning, and its rows keep every position.

    Args:
        hooked, sites, baseline, criterion, margin, divergence, batch_size, replay, seed: as `Closing` takes them.
        positions: the longest example that is searched.
        largest: positions that a set may have; None searches on.
        subsets: sets tried for an example; None without end.
        seconds: spent on trying sets of an example in one call, each of which comes further; None without end.
        memory: bytes for the states of a recurrence; with less it computes some of them again.

    Raises:
        SettingError: a number is out of range, or both a criterion and a margin are given.
        UnknownSiteError: no site is meant.
    """

    name = "erasure"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        baseline: str | Baseline = "zero",
        criterion: Criterion | None = None,
        margin: float | None = None,
        divergence: Divergence = kl,
        positions: int = 25,
        largest: int | None = None,
        subsets: int | None = None,
        seconds: float | None = None,
        batch_size: int = 64,
        memory: float = 2e9,
        replay: bool = True,
        seed: int = 0,
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
        above_zero(seconds=seconds, memory=memory)
        whole(positions=positions, largest=largest, subsets=subsets)
        self.positions, self.largest, self.subsets, self.seconds = positions, largest, subsets, seconds
        self.memory = memory
        self._latest: list[Found] = []

    def search(self, batch: Any, *, state: str | Path | None = None, progress: bool = True) -> list[Found]:
        """What is found out about each example, site by site; positions count as in the rows of an explanation.

        Args:
            batch: as the loaders give it.
            state: a file that keeps where the search is: written at its end, where a limit or Ctrl-C stops it, and
                every half minute. The same call later goes on from there.
            progress: whether to show a bar on stderr.

        Raises:
            SearchLimitError: an example has more positions than are searched; it says how long that would take.
            ResumeError: the file belongs to another search.
            CorruptFileError, StorageError: the file cannot be read, or not be written.

        Warns:
            SearchLimitWarning: a limit ended the search for an example.
        """
        with forked(self.hooked.model):
            return [found for _, found in self._search(self.clean(batch), state, progress)]

    def scores(self, clean: Clean) -> list[Scores]:
        pairs = self._search(clean, None, False)
        self._latest = [found for _, found in pairs]
        scores = []
        for site in self.sites:
            own = [(question.units, found.solutions) for question, found in pairs if question.site == site]
            scores.append(self.kept_scores(clean, site, [(units, sets[0] if sets else None) for units, sets in own]))
        return scores

    def provenance(self) -> dict[str, Any]:
        return {**super().provenance(), "positions": self.positions, "largest": self.largest, "subsets": self.subsets}

    def _search(self, clean: Clean, state: str | Path | None, progress: bool) -> list[tuple[Question, Found]]:
        questions = [question for site in self.sites for question in self.questions(clean, site)]
        for question in questions:
            self._check_length(question)
        searches = [Search(question.positions, question.keeps) for question in questions]
        saved = None if state is None else Saved(Path(state), self._identity(clean, questions), searches)
        try:
            with _shown(len(searches), progress) as advance:
                found = []
                for question, search in zip(questions, searches, strict=True):
                    found.append((question, self._run(question, search, saved, advance)))
        finally:
            if saved is not None:
                saved.now()
        return found

    def _run(self, question: Question, search: Search, saved: Saved | None, advance: Any) -> Found:
        def progress(at: Search) -> None:
            advance(at, 0)
            if saved is not None:
                saved.later()

        limits: dict[str, Any] = {"subsets": self.subsets, "seconds": self.seconds, "progress": progress}
        found = search.run(Flat(question), largest=1, **limits)  # which a tree takes longer to prepare for
        if found.stopped == "largest" and self.largest != 1:
            with self._way(question) as way:
                found = search.run(way, largest=self.largest, **limits)
        advance(search, 1)
        question.forget()
        numbered = tuple(tuple(question.units[unit][0] for unit in one) for one in found.solutions)
        found = dataclasses.replace(found, solutions=numbered)
        if found.stopped is not None:
            warnings.warn(
                f"{_of(question)}: {found}. An explanation keeps all of them; allow more to find out",
                SearchLimitWarning,
                stacklevel=5,
            )
        return found

    @contextlib.contextmanager
    def _way(self, question: Question) -> Iterator[Way]:
        with tree(question, memory=self.memory) as shared:
            yield Flat(question) if shared is None else shared

    def _check_length(self, question: Question) -> None:
        if question.positions > self.positions:
            with self._way(question) as way:
                text, top = outlook(way, question.positions)
            raise SearchLimitError(
                f"{_of(question)} has {question.positions} positions, and up to {self.positions} are searched: {text}. "
                f"Leave it out, or allow more: Erasure(hooked, positions={question.positions}, largest={max(top, 1)})"
            )

    def _identity(self, clean: Clean, questions: Sequence[Question]) -> dict[str, Any]:
        """What has to be the same for a search to go on."""
        units = hashlib.sha256(json.dumps([question.units for question in questions]).encode()).hexdigest()
        digest = hashlib.sha256()
        for site in self.sites:
            digest.update(clean.values[str(site)].detach().float().cpu().contiguous().numpy().tobytes())
        known = self.provenance()
        same = ("fingerprint", "sites", "baseline", "criterion", "margin")
        return {"values": digest.hexdigest(), "units": units, **{key: known[key] for key in same}}

    def _about(self, clean: Clean) -> list[dict[str, str]]:
        """What is known of each example: what the search found too."""
        count = len(clean.values[str(self.sites[0])])
        words: list[dict[str, str]] = super()._about(clean) or [{} for _ in range(count)]
        for number, about in enumerate(words):
            about["search"] = "; ".join(str(found) for found in self._latest[number::count])
        return words


def _of(question: Question) -> str:
    return f"example {question.example} at {question.site}"


@contextlib.contextmanager
def _shown(total: int, shown: bool) -> Iterator[Any]:
    """A bar that counts examples and tells where a search is."""
    progress, task = bar("searching", total)
    if not shown:
        yield lambda search, done: None
        return

    def advance(search: Search, done: int) -> None:
        text = f"sets of {search.size} of {search.positions}, {search.tried:,} tried"
        progress.update(task, advance=done, description=text)

    with progress:
        yield advance
