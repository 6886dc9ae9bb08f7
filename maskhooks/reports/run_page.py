"""Run page: one page about a training run, what its masks keep, or both."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from maskhooks.atomic_write import atomic_open
from maskhooks.errors import CorruptFileError, SettingError
from maskhooks.explainers.saving import SETTINGS, settings_of
from maskhooks.explanations.analyses import kept_by
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.profile import in_a_row, profile, profile_section
from maskhooks.explanations.row_files import ABOUT, parquet_files, pieces
from maskhooks.explanations.score_labels import P_KEPT, common_label, method_note, score_label
from maskhooks.reports.findings import by_depth, by_group, by_kind, by_label, kind_of
from maskhooks.runs.history import LOG, MaskHistory, read_history, section
from maskhooks.runs.run_state import load_state, state_folder
from maskhooks.viz.page import page
from maskhooks.viz.sections import Section, Table

Explained: TypeAlias = Explanation | str | Path | Iterable[Explanation | str | Path]

TABLE = "explanation.parquet"
_ROWS = 1_000_000  # rows of a file in memory at a time
_FEW = 20
_CLASSES = ("prediction", "target")


def report(
    run: str | Path | None = None,
    explanation: Explained | None = None,
    path: str | Path | None = None,
    *,
    max_examples: int = 100,
    min_count: int = 5,
    title: str | None = None,
) -> str:
    """Return a self-contained page: how masks were trained, what they keep, and examples with a slider for the depth.

    Args:
        run: the folder that `fit(run_dir=...)` or `save` wrote; the run may still be in progress.
        explanation: an explanation, a Parquet file, a folder of Parquet files, or several of these with different
            examples, such as `Shards`. They are read several times, with one file's rows in memory at a time.
        path: also write the page to this file, in UTF-8.
        max_examples: show this many examples, from the first.
        min_count: omit the bars of tokens that occur less often.
        title: the heading.

    Raises:
        SettingError: there is neither a run nor an explanation, or the explanation has no rows.
        CorruptFileError: a file is missing or broken.
        StorageError: the page cannot be written.
    """
    if run is None and explanation is None:
        raise SettingError("there is nothing to report. Give the folder of a run, an explanation, or both")
    trained = None if run is None else Trained.of(Path(run))
    rows = None if explanation is None else Rows(explanation)
    made: dict[str, Any] = {} if trained is None else trained.provenance
    sections: list[Section] = [] if trained is None else trained.sections()
    pairs: list[tuple[str, str]] = [] if trained is None else trained.facts()
    first: Explanation | None = None
    label = P_KEPT
    if rows is not None:
        first, found, counts = rows.sections(max_examples, min_count)
        label = score_label(first.provenance) if trained is None else P_KEPT
        sections += found
        pairs += [*counts, *_mismatch(made, first.provenance)]
        made = made or first.provenance
    about = Section("What this is about", method_note(label), [Table([*pairs, *_facts(made)])])
    heading = title or "Which positions does the prediction need?"
    if first is None:
        text = page([], [], title=heading, provenance=made, sections=[about, *sections])
    else:
        text = first.to_html(title=title or "", sections=[about, *sections])
    if path is not None:
        with atomic_open(Path(path)) as file:
            file.write(text.encode("utf-8"))
    return text


@dataclass(frozen=True)
class Trained:
    """A training run, read from its folder.

    Attributes:
        saved: the saved explainer's settings; empty while the run is in progress.
        provenance: what made the masks.
        history: the training curves of each masking.
    """

    saved: Mapping[str, Any]
    provenance: dict[str, Any]
    history: list[MaskHistory]

    @classmethod
    def of(cls, folder: Path) -> Trained:
        """Read a run's folder.

        Raises:
            CorruptFileError: it does not hold a run, or the run is broken.
        """
        if not is_run(folder):
            raise CorruptFileError(
                f"{folder} holds neither {SETTINGS} nor {LOG}. Give the folder that fit wrote.", path=folder
            )
        if (folder / SETTINGS).exists():
            saved = settings_of(folder)
            return cls(saved, saved["provenance"], read_history(folder))
        state = load_state(state_folder(folder)) if state_folder(folder).exists() else None
        return cls({}, {} if state is None else dict(state["metadata"]), read_history(folder))

    def sections(self) -> list[Section]:
        margin, chosen = self.provenance.get("margin"), (self.saved.get("result") or {}).get("chosen_steps") or {}
        return [section(self.history, margin and float(margin), chosen)] if self.history else []

    def facts(self) -> list[tuple[str, str]]:
        model = (self.saved.get("fingerprint") or {}).get("model")
        stopped = (self.saved.get("result") or {}).get("stop_reason") or (
            "" if self.saved else "in progress or interrupted"
        )
        return [(name, text) for name, text in (("model", model), ("training", stopped)) if text]


class Rows:
    """The rows of explanations, in parts that fit into memory."""

    def __init__(self, explanation: Explained) -> None:
        self.explanation = explanation

    def __iter__(self) -> Iterator[Explanation]:
        one = isinstance(self.explanation, (Explanation, str, Path))
        for given in [self.explanation] if one else self.explanation:  # type: ignore[union-attr]
            yield from [given] if isinstance(given, Explanation) else _read(Path(given))  # type: ignore[arg-type]

    def sections(self, max_examples: int, min_count: int) -> tuple[Explanation, list[Section], list[tuple[str, str]]]:
        """Return the first examples, the summary sections of all rows, and the number of examples.

        Raises:
            SettingError: there are no rows.
        """
        first = next(iter(self), None)
        if first is None or not first["valid"].any():
            raise SettingError("the explanation has no rows with a valid position, so there is nothing to report")
        overview = _Overview(max_examples)
        kinds = kept_by(overview.of(self), kind_of(set(first["label"].tolist())))
        layers, label = {(row.site, row.depth) for row in kinds}, common_label(overview.labels)
        whole = profile_section(profile(self)) if in_a_row(layers, label) else by_depth(kinds, label)
        sections: list[Section | None] = [whole]
        if first.columns.keys().isdisjoint(("column", "source")):  # names of patches and edges are not tokens
            sections += [by_kind(kinds, label), by_label(self, min_count, len(layers), label)]
        sections.append(by_group(self, [name for name in _CLASSES if _groups(first, name)], label))
        many = overview.examples > overview.taken
        counts = f"{overview.examples:,} examples" + (f"; the first {overview.taken:,} are below" if many else "")
        return Explanation.concat(overview.parts), [one for one in sections if one], [("explained", counts)]


class _Overview:
    """Counts the examples of an iteration and keeps the first ones."""

    def __init__(self, max_examples: int) -> None:
        self.max_examples, self.taken, self.examples = max_examples, 0, 0
        self.parts: list[Explanation] = []
        self.labels: set[str] = set()
        self.ends: list[int] = []  # the first and the last example of each part, in order

    def of(self, parts: Iterable[Explanation]) -> Iterator[Explanation]:
        for part in parts:
            numbers = np.unique(part["example"])
            if len(numbers):
                self._check_apart(int(numbers[0]), int(numbers[-1]))
            wanted = numbers[: self.max_examples - self.taken].tolist()
            if wanted:
                self.parts.append(part.select(example=wanted))
            self.labels.add(score_label(part.provenance))
            self.taken += len(wanted)
            self.examples += len(numbers)
            yield part

    def _check_apart(self, first: int, last: int) -> None:
        place = bisect.bisect_left(self.ends, first)
        if place % 2 or (place < len(self.ends) and self.ends[place] <= last):
            raise SettingError(
                f"examples {first} to {last} come twice. Give explanations with different example indices, or make a "
                f"report for each"
            )
        self.ends[place:place] = [first, last]


def rows_at(path: Path) -> Path | None:
    """Return the path of the rows that `maskhooks explain`, `to_parquet`, `explain_to` or `save` wrote, or None."""
    if (path / TABLE).exists():
        return path / TABLE
    there = path.is_file() or (path / ABOUT).exists() or any(path.glob("*.parquet"))
    return path if there else None


def is_run(path: Path) -> bool:
    """Return whether a folder holds a training run."""
    return (path / SETTINGS).exists() or (path / LOG).exists()


def _read(path: Path) -> Iterator[Explanation]:
    """Yield the explanation at a path file by file, and a long file in pieces."""
    place = rows_at(path)
    if place is None:
        raise CorruptFileError(
            f"{path} does not hold an explanation. Give a Parquet file, a folder of Parquet files, or the folder that "
            f"explain wrote.",
            path=path,
        )
    if (place / ABOUT).exists():
        yield Explanation.load(place)
        return
    for file in parquet_files(place):
        for numbers in pieces(file, _ROWS):
            yield Explanation.from_parquet(file, example=numbers)


def _groups(explanation: Explanation, name: str) -> bool:
    """Whether this metadata groups the examples: classes do, free-text answers do not."""
    values = [about[name] for about in explanation.metadata.values() if name in about]
    return 0 < len(set(values)) <= max(len(values) / 2, _FEW)


def _facts(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What made the masks, as text."""
    sites = [str(site.get("address", site)) for site in made.get("sites") or () if isinstance(site, Mapping)]
    margin, within = made.get("margin"), made.get("within_margin")
    if margin is not None:
        kept = {True: ", met by all masks", False: ", exceeded by some masks", None: ", not checked"}[within]
    read = [str(site.get("address", site)) for site in made.get("conditioned_on") or () if isinstance(site, Mapping)]
    named = {key: made.get(key) for key in ("explainer", "recipe", "gate", "baseline", "beta", "seed")}
    known = {
        "masked": _span(sites),
        "read from": _span(read),
        "margin": f"{margin:g} nats on average{kept}" if margin is not None else "",
        **{key: str(one["name"] if isinstance(one, Mapping) else one) for key, one in named.items() if one is not None},
        "score": str(made.get("score_label", "")),
        "versions": ", ".join(f"{name} {number}" for name, number in (made.get("versions") or {}).items()),
    }
    return [(name, text) for name, text in known.items() if text]


def _span(sites: list[str]) -> str:
    return ", ".join(sites) if len(sites) < 3 else f"{len(sites)} sites, from {sites[0]} to {sites[-1]}"


def _mismatch(run: Mapping[str, Any], explanation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A warning if other masks than those of the run made the explanation."""
    differ = [key for key in {**run, **explanation} if run.get(key) != explanation.get(key) and key != "versions"]
    if not run or not differ:
        return []
    return [("warning", f"this run did not make the explanation; they differ in {', '.join(differ)}")]
