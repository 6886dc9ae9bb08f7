"""Evidence: the scores that a metric judges, and what it compares them with."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.layers import Layers
from maskhooks.explanations.scores import FIXED, Column, Columns
from maskhooks.explanations.tokens import token_kind
from maskhooks.metrics.explaining import ExplainedBy, check_explainer
from maskhooks.model.fingerprint import fingerprint
from maskhooks.model.hooked import Hooked

#: A float64 for each position of an example, or each example.
Floats = npt.NDArray[np.float64]

#: For each example, by its index: a weight for each position, or such a row for each of several minimal sets.
Truth = Sequence[Any] | Mapping[int, Any] | Tensor | npt.NDArray[Any]


def not_special(label: str) -> bool:
    """Whether a position counts by default: all but special tokens, such as `[CLS]`; see `token_kind`."""
    return token_kind(label) != "special"


@dataclass(frozen=True, eq=False)
class Evidence:
    """The scores of an explanation at one masked site and depth, and what they are compared with.

    Attributes:
        site: the masked site's address.
        depth: the depth that was read.
        columns: the rows of valid positions, in order of example, position and other axes.
        examples: the indices of the examples, ascending.
        counts: which labels count.
        hooked: the model, or None.
        batches: the batches that were explained, in order.
        start_index: the index of the first example of the first batch.
        truth: what each example's prediction needs, or None.
        others: the rows of other explanations, in the same order.
        predictions: what the model predicted for some examples when they were explained, as text.
        explainer: what made the explanation, or None.
        memory: what metrics keep for other sites and depths of the explanation, by any key of theirs.
    """

    site: str
    depth: int
    columns: Columns
    examples: npt.NDArray[np.int64]
    counts: Callable[[str], bool] = not_special
    hooked: Hooked | None = None
    batches: Sequence[Any] = ()
    start_index: int = 0
    truth: Truth | None = None
    others: Sequence[Columns] = ()
    predictions: Mapping[int, str] = field(default_factory=dict)
    explainer: ExplainedBy | None = None
    memory: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        explanation: Explanation,
        *,
        hooked: Hooked | None = None,
        batches: Sequence[Any] = (),
        start_index: int = 0,
        truth: Truth | None = None,
        others: Sequence[Explanation] = (),
        explainer: ExplainedBy | None = None,
        counts: Callable[[str], bool] = not_special,
    ) -> Iterator[Evidence]:
        """Yield the evidence of each masked site and depth of an explanation, in order of depth.

        Args:
            explanation: what is judged.
            hooked, batches, start_index, truth, explainer, counts: as in `judge`.
            others: other explanations of the same examples. Each must have the site; of several depths, the same one.

        Raises:
            SettingError: the explanation has no rows, a score that is not finite, or an example without a position that
                counts; it is of another model or explainer; or another explanation does not fit.
        """
        if hooked is not None:
            _check_model(explanation, hooked)
        if explainer is not None:
            check_explainer(explainer, explanation, hooked)
        layers = Layers(explanation.columns, explanation.sites)
        if not layers.pairs:
            raise SettingError("this explanation has no rows, so there is nothing to judge")
        examples = np.unique([*np.unique(explanation["example"]).tolist(), *explanation.metadata]).astype(np.int64)
        known = {number: about["prediction"] for number, about in explanation.metadata.items() if "prediction" in about}
        memory: dict[Hashable, Any] = {}
        for site, depth in layers.pairs:
            columns = _rows(explanation, site, depth)
            plain = cls(
                *(site, depth, columns, examples, counts, hooked, batches, start_index, truth, (), known),
                explainer=explainer,
                memory=memory,
            )
            plain.check()
            yield plain.against(others)

    def against(self, others: Sequence[Explanation]) -> Evidence:
        """Return the same with these as the other explanations.

        Raises:
            SettingError: one does not fit.
        """
        return replace(self, others=[_matching(other, self, number) for number, other in enumerate(others)])

    def check(self) -> None:
        """Raise SettingError for a score that is not finite, or an example without a position that counts."""
        wrong = np.flatnonzero(~np.isfinite(self.columns["score"]))
        if len(wrong):
            example, position = (int(self.columns[name][wrong[0]]) for name in ("example", "position"))
            raise SettingError(
                f"{len(wrong)} scores at {self.site} are NaN or infinite, first at position {position} of example "
                f"{example}. Scores must be numbers: look for NaN in the explainer, or leave examples out: "
                "explanation.select(example=...)"
            )
        empty = [int(number) for number, rows in zip(self.examples, self.groups, strict=True) if not len(rows)]
        if empty:
            raise SettingError(
                f"example {', '.join(map(str, empty[:5]))} has no position that counts at {self.site}; padding and "
                "special tokens do not. Leave such examples out, explanation.select(example=...), or say which labels "
                "count: judge(..., counts=lambda label: ...)"
            )

    def check_reached(self, stop: int) -> None:
        """Raise SettingError for an example that the batches do not hold.

        Args:
            stop: the index after the last example of the batches.
        """
        left = self.examples[(self.examples < self.start_index) | (self.examples >= stop)]
        if len(left):
            raise SettingError(
                f"the batches hold the examples {self.start_index} to {stop - 1}, but the explanation has example "
                f"{int(left[0])}. Give the batches that were explained, all of them, and start_index=... if the first "
                "example has another index than 0"
            )

    @functools.cached_property
    def counted(self) -> npt.NDArray[np.bool_]:
        """Which rows count."""
        labels, which = np.unique(self.columns["label"].astype(str), return_inverse=True)
        return np.array([bool(self.counts(str(label))) for label in labels], bool)[which]

    @functools.cached_property
    def groups(self) -> list[npt.NDArray[np.intp]]:
        """The rows of each example that count."""
        rows = np.flatnonzero(self.counted)
        starts = np.searchsorted(self.columns["example"][rows], [*self.examples, self.examples[-1] + 1])
        return [rows[start:stop] for start, stop in itertools.pairwise(starts)]

    def scores(self, *, absolute: bool = False) -> list[Floats]:
        """Return each example's scores at the positions that count.

        Args:
            absolute: whether to take absolute values.
        """
        return split(self.columns, self.groups, absolute=absolute)

    def other_scores(self, *, absolute: bool = False) -> list[list[Floats]]:
        """Return the same of each other explanation."""
        return [split(columns, self.groups, absolute=absolute) for columns in self.others]

    def kept(self) -> list[npt.NDArray[np.bool_]]:
        """Return which positions that count each example keeps: those with a score above the threshold."""
        return [self.columns["kept"][rows] for rows in self.groups]

    def truths(self) -> list[Floats]:
        """Return the truth of each example at the positions that count: a row for each of its minimal sets.

        Raises:
            SettingError: an example has no truth, or one that does not fit its positions.
        """
        assert self.truth is not None
        return [
            self._truth(int(number), self.columns["position"][rows])
            for number, rows in zip(self.examples, self.groups, strict=True)
        ]

    def _truth(self, example: int, positions: Column) -> Floats:
        given: Any = self.truth
        try:
            found = np.atleast_2d(np.asarray(given[example], dtype=np.float64))
        except (LookupError, TypeError, ValueError) as error:
            raise SettingError(
                f"there is no truth for example {example} ({type(error).__name__}: {error}). Give for each example a "
                "list with a number for each position, or several of these: truth[example][position]"
            ) from error
        if found.ndim != 2 or found.shape[1] <= positions.max(initial=-1) or not bool((found >= 0).all()):
            raise SettingError(
                f"the truth of example {example} has shape {list(found.shape)}, but there is a position "
                f"{int(positions.max(initial=-1))} at {self.site}. Give a number from 0 for each position, special "
                "tokens included: truth[example][position]"
            )
        return found[:, positions]


def split(columns: Columns, groups: Sequence[Column], *, absolute: bool = False) -> list[Floats]:
    """Return the scores of some rows of each example."""
    scores = columns["score"].astype(np.float64)
    scores = np.abs(scores) if absolute else scores
    return [scores[rows] for rows in groups]


def in_order(columns: Columns) -> npt.NDArray[np.intp]:
    """Return the order of rows by example, position and other axes."""
    order: npt.NDArray[np.intp] = np.lexsort([columns[name] for name in reversed(_keys(columns))])
    return order


def difference(first: Columns, other: Columns) -> str:
    """Return the first difference between the positions of two sets of ordered rows; "" if there is none."""
    if _keys(first) != _keys(other):
        return f"the columns are {', '.join(_keys(first))} here and {', '.join(_keys(other))} there"
    for name in (*_keys(first), "label"):
        one, two = first[name], other[name]
        if len(one) != len(two):
            return f"there are {len(one)} valid positions here and {len(two)} there"
        unlike = np.flatnonzero(one != two)
        if len(unlike):
            at = unlike[0]
            return f"example {first['example'][at]} has the {name} {one[at]!s} here and {two[at]!s} there"
    return ""


def _keys(columns: Columns) -> list[str]:
    """Return the columns that identify a row at one site and depth."""
    more = sorted(name for name in columns if name not in FIXED and bool((columns[name] != -1).any()))
    return ["example", "position", *more]


def _rows(explanation: Explanation, site: str, depth: int) -> Columns:
    """Return the valid rows of a site and depth, ordered."""
    here = explanation["valid"] & (explanation["site"] == site) & (explanation["depth"] == depth)
    columns = {name: column[here] for name, column in explanation.columns.items()}
    order = in_order(columns)
    return {name: column[order] for name, column in columns.items()}


def _matching(other: Explanation, evidence: Evidence, number: int) -> Columns:
    """Return the rows of another explanation at the site of the evidence."""
    depths = sorted(depth for site, depth in Layers(other.columns, other.sites).pairs if site == evidence.site)
    if not depths or (len(depths) > 1 and evidence.depth not in depths):
        there = f"there it has the depths {', '.join(map(str, depths))}" if depths else f"it has {other.sites}"
        raise SettingError(
            f"explanation {number} of the others has no scores of {evidence.site} at depth {evidence.depth}; {there}. "
            "Explain the same sites with each"
        )
    columns = _rows(other, evidence.site, evidence.depth if evidence.depth in depths else depths[0])
    known = np.isin(columns["example"], evidence.examples)
    columns = {name: column[known] for name, column in columns.items()}
    unlike = difference(evidence.columns, columns)
    if unlike:
        raise SettingError(
            f"explanation {number} of the others has other positions at {evidence.site}: {unlike}. Explain the same "
            "batches in the same order with each"
        )
    replace(evidence, columns=columns).check()
    return columns


def _check_model(explanation: Explanation, hooked: Hooked) -> None:
    made = explanation.provenance.get("of", [explanation.provenance])
    digests = {one["fingerprint"] for one in made if "fingerprint" in one}
    if digests - {fingerprint(hooked.model)["digest"]}:
        raise SettingError(
            f"the explanation is of another model than this {type(hooked.model).__name__}: their fingerprints differ. "
            "Explain the model that you give, with the weights that it has now"
        )
