"""Explanation: which positions of which examples a prediction needs, as rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskhooks.errors import BatchError, SettingError, UnknownSiteError, close_matches
from maskhooks.explanations import row_files as rowfiles
from maskhooks.explanations.layers import Layers
from maskhooks.explanations.score_labels import (
    BITS,
    P_KEPT,
    is_fraction,
    question,
    scale_end,
    score_label,
    unit,
    zero_note,
)
from maskhooks.explanations.scores import Column, Columns, Scores, repeated, stack
from maskhooks.sites.site import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from maskhooks.explanations.pictures import Names, Node
    from maskhooks.viz.sections import Section

__all__ = ["Explanation", "Scores"]


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """The result of an explainer: one row for each gated position of each example.

    Columns: `example` (int); `site` (the masked site's address); `depth` (int, the depth of the site the mask
    reads); `position` (int); `label` (the position's name, such as a token); `valid` (False at padding);
    `score` (float32; of masks P(z != 0), the expected fraction kept; `provenance["score_label"]` says what other
    explainers give, which may have a sign or no upper end); `kept` (valid, and score above the threshold). Patches
    add `row` and `column`, edges `source`, `target` and `relation`; each other gated axis, such as `head`, adds its own
    column. These hold -1 in rows without a value, such as a class token's.

    Attributes:
        columns: numpy arrays of equal length by name; `site` holds indices into `sites`.
        sites: the addresses of the masked sites.
        provenance: what made the explanation (fingerprint, sites, parts, seed, versions); JSON-serialisable.
        metadata: metadata by example index, such as `{"prediction": ..., "target": ...}`.

    `explanation["score"]` returns a column; `explanation["site"]` returns addresses.
    """

    columns: Columns
    sites: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    metadata: dict[int, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        scores: Sequence[Scores],
        *,
        provenance: Mapping[str, Any],
        metadata: Sequence[Mapping[str, str]] | None = None,
        threshold: float = 0.5,
        start_index: int | Sequence[int] = 0,
    ) -> Explanation:
        """Build the explanation of one batch.

        Args:
            scores: one for each masked site and depth.
            provenance: what made them; JSON-serialisable.
            metadata: metadata for each example of the batch, such as its prediction and target, as text.
            threshold: a position is kept if its score is larger.
            start_index: the index of the batch's first example, or the index of each.

        Raises:
            SettingError: no scores, two for one site and depth, or a provenance that is not JSON-serialisable.
            PatternError, BatchError: scores, masks, names or examples that do not fit each other.
        """
        if not scores:
            raise SettingError("an explanation needs scores. Give them for at least one masked site")
        layers = [(str(part.site), part.depth) for part in scores]
        if len(set(layers)) < len(layers):
            raise SettingError(
                f"two scores have the same site and depth: {max(layers, key=layers.count)}. Give each its own depth"
            )
        columns, sites = stack([(part.rows(start_index, threshold), [str(part.site)]) for part in scores])
        batch = max(part.count for part in scores)
        if metadata is not None and len(metadata) != batch:
            raise BatchError(
                f"there is metadata for {len(metadata)} examples, but scores for {batch}. Give one mapping for "
                f"each, such as {{'prediction': 'positive'}}"
            )
        numbers = range(start_index, start_index + batch) if isinstance(start_index, int) else start_index
        known = {number: dict(about) for number, about in zip(numbers, metadata or (), strict=False)}
        return cls(columns, sites, _as_json(provenance), known)

    @staticmethod
    def concat(explanations: Iterable[Explanation]) -> Explanation:
        """Concatenate explanations of different examples (`build(start_index=...)`), sites or depths.

        If the parts have the same provenance, the result has it too; otherwise `"of"` lists the different ones.

        Raises:
            SettingError: there are no parts, or two hold the same site of the same example at the same depth.
        """
        found = list(explanations)
        if not found:
            raise SettingError("there is nothing to concatenate. Give at least one explanation")
        columns, sites = stack([(part.columns, part.sites) for part in found])
        if repeated(columns, [len(part) for part in found]):
            raise SettingError(
                "two of the explanations hold the same site of the same example at the same depth. Continue "
                "the example indices in later batches: Explanation.build(scores, start_index=32, ...)"
            )
        made = [part.provenance for part in found]
        different = [one for index, one in enumerate(made) if one not in made[:index]]
        provenance = different[0] if len(different) == 1 else {"of": different}
        examples = {number: about for part in found for number, about in part.metadata.items()}
        return Explanation(columns, sites, provenance, examples)

    def __len__(self) -> int:
        return len(self.columns["score"])

    def __getitem__(self, name: str) -> Column:
        if name not in self.columns:
            raise SettingError(f"there is no column {name!r}. The columns are {', '.join(self.columns)}")
        column = self.columns[name]
        return np.array(self.sites, dtype=object)[column] if name == "site" else column

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Explanation):
            return NotImplemented
        return (
            self.columns.keys() == other.columns.keys()
            and all(np.array_equal(self[n], other[n], equal_nan=n == "score") for n in self.columns)
            and (self.provenance, self.metadata) == (other.provenance, other.metadata)
        )

    def __repr__(self) -> str:
        layers = self._layers()
        means = [f"{label}: {mean:.2f}" for label, mean in zip(layers.labels, layers.means(), strict=True)]
        if len(means) > 8:
            means[4:-3] = ["..."]
        return f"Explanation({self._counts()}; mean {self._mean_of()} by depth: {', '.join(means)})"

    def _repr_html_(self) -> str:
        from maskhooks.viz.table import table

        layers = self._layers()
        rows = [f"{label} ({mean:.2f})" for label, mean in zip(layers.labels, layers.means(), strict=True)]
        caption = f"Explanation of {self._counts()}."
        for number, chosen in self._each():
            scores, labels = layers.grid(chosen)
            caption += f" Example {number} by depth; in brackets, the mean {self._mean_of()} over all examples:"
            return table(scores, rows, labels, caption, top=scale_end(score_label(self.provenance), scores))
        return table(np.empty((0, 0)), [], [], caption)

    def select(
        self,
        example: int | Iterable[int] | None = None,
        site: str | Site | Iterable[str | Site] | None = None,
        depth: int | Iterable[int] | None = None,
        valid: bool | None = True,
    ) -> Explanation:
        """Return the rows of some examples, sites and depths; None selects all.

        Args:
            example: one or more example indices.
            site: one or more sites or addresses.
            depth: one or more depths.
            valid: True drops padding, False keeps only padding, None keeps both.

        Raises:
            UnknownSiteError: the explanation does not hold such a site; the error lists similar names.
            SettingError: the explanation does not hold such an example or depth.
        """
        chosen = np.ones(len(self), bool) if valid is None else self["valid"] == valid
        for name, wanted in (("example", example), ("depth", depth)):
            if wanted is not None:
                numbers = [wanted] if isinstance(wanted, (int, np.integer)) else list(wanted)
                chosen &= np.isin(self[name], self._known(name, numbers))
        if site is not None:
            addresses = [str(one) for one in ([site] if isinstance(site, (str, Site)) else site)]
            for address in set(addresses) - set(self.sites):
                raise UnknownSiteError(
                    f"there are no scores of site {address!r}. The sites are {', '.join(self.sites)}.",
                    site=address,
                    near=close_matches(address, self.sites),
                )
            chosen &= np.isin(self.columns["site"], [self.sites.index(address) for address in addresses])
        columns, sites = stack([({name: column[chosen] for name, column in self.columns.items()}, self.sites)])
        left = set(np.unique(columns["example"]).tolist())
        examples = {number: known for number, known in self.metadata.items() if number in left}
        return Explanation(columns, sites, self.provenance, examples)

    def matrix(self, example: int | None = None) -> tuple[npt.NDArray[np.float32], list[str], list[str]]:
        """Return one example's scores at valid positions, as the pictures show them.

        Args:
            example: its index; None is the first.

        Returns:
            scores `[depth, position]`, lowest depth first, NaN where there is none, averaged over other axes
            such as heads; names of the depths (with the site if several share a depth, unless each has its own
            edge types); names of the positions.

        Raises:
            SettingError: the explanation does not hold this example.
        """
        part = self._one(example)
        layers = part._layers()
        scores, labels = layers.grid()
        return scores, layers.labels, labels

    def mean_kept(self) -> dict[tuple[str, int], float]:
        """Return the expected fraction kept over valid positions for each (site, depth), in order of depth."""
        layers = Layers(self.columns, self.sites)
        return dict(zip(layers.pairs, map(float, layers.means()), strict=True))

    # Tables and files

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a DataFrame; `site` is categorical."""
        import pandas as pd

        columns: dict[str, Any] = dict(self.columns)
        columns["site"] = pd.Categorical.from_codes(self.columns["site"], categories=pd.Index(self.sites, dtype=object))
        return pd.DataFrame(columns)

    def to_parquet(self, path: str | Path) -> None:
        """Write the rows, with provenance and the metadata of examples in the file's metadata."""
        rowfiles.write_parquet(Path(path), self.columns, self._about())

    @classmethod
    def from_parquet(cls, path: str | Path, example: int | Iterable[int] | None = None) -> Explanation:
        """Read what `to_parquet` wrote, or a folder of such files from `Explainer.explain_to`.

        Args:
            path: a file or a folder.
            example: read only these examples; None reads all.

        Raises:
            CorruptFileError: a file is missing, broken, or has the wrong columns; a folder has no such file.
            SettingError: the file does not hold such an example.
        """
        wanted = None if example is None else {example} if isinstance(example, (int, np.integer)) else set(example)
        files = rowfiles.parquet_files(Path(path), wanted)
        parts = [cls._from(*rowfiles.read_parquet(file, wanted)) for file in files]
        found = parts[0] if len(parts) == 1 else cls.concat(parts)
        missing = sorted((wanted or set()) - set(np.unique(found["example"]).tolist()))
        if missing:
            raise SettingError(f"{path} has no example {', '.join(map(str, missing[:5]))}. Give indices that it holds")
        return found

    def save(self, folder: str | Path) -> None:
        """Write `explanation.safetensors` and `explanation.json` into a folder; create it if needed."""
        rowfiles.write_folder(Path(folder), self.columns, self._about())

    @classmethod
    def load(cls, folder: str | Path) -> Explanation:
        """Read what `save` wrote.

        Raises:
            CorruptFileError: a file is missing, broken or a pickle, or the two do not belong together.
        """
        return cls._from(*rowfiles.read_folder(Path(folder)))

    def _about(self) -> dict[str, Any]:
        return {"sites": list(self.sites), "provenance": self.provenance, "metadata": self.metadata}

    @classmethod
    def _from(cls, columns: Columns, about: Mapping[str, Any]) -> Explanation:
        return cls(columns, tuple(about["sites"]), about["provenance"], about["metadata"])

    # Pictures

    def plot(
        self,
        example: int | None = None,
        kind: str = "auto",
        ax: Axes | None = None,
        *,
        nodes: Names = (),
        target_node: Node | None = None,
    ) -> Figure:
        """Draw one example's scores, without pyplot and without opening a window.

        Args:
            example: its index; None is the first.
            kind: `"heatmap"`: depths by positions; `"bars"`: a bar for each position, depths side by side;
                `"image"`: patches by row and column, an image for each depth; `"graph"`: edges between nodes, a graph
                for each depth; `"profile"`: the heatmap or images, beside the total of each depth and what is lost
                between a depth and the next; `"auto"`: an image for patches, a graph for edges, bars for one depth,
                otherwise a heatmap.
            ax: Axes to draw on, from any figure; None makes a figure, which wraps long sentences.
            nodes: for a graph, the names of the nodes, such as atoms; a mapping names some of them by number, or by
                (type, number) if there are several node types.
            target_node: for a graph, the node the prediction is about, by number or (type, number).

        Returns:
            The figure; `figure.savefig("name.png")` writes it.

        Raises:
            SettingError: no such example or kind, an image without patches, a graph without edges, several depths of
                an image or graph on one `ax`, or a profile of scores that do not add up over positions, such as
                attention weights.
            MissingExtraError: a graph needs networkx, which is not installed.
        """
        part = self._one(example)
        number = int(part["example"][0])
        title = " · ".join(
            [f"example {number}", *(f"{key}: {text}" for key, text in self.metadata.get(number, {}).items())]
        )
        from maskhooks.explanations.pictures import picture

        label = score_label(self.provenance)
        return picture(part._layers(), kind, title=title, label=label, nodes=nodes, target_node=target_node, ax=ax)

    def to_html(
        self,
        path: str | Path | None = None,
        title: str = "",
        sections: Sequence[Section] | None = None,
        *,
        nodes: Mapping[int, Names] | None = None,
        target_nodes: Mapping[int, Node] | None = None,
    ) -> str:
        """Return a self-contained HTML page: positions or edges coloured by score, with a slider for the depth.

        Args:
            path: also write the page to this file, in UTF-8.
            title: the heading; by default the question that the page answers.
            sections: shown above the examples; by default, for scores in bits at several depths, their profile.
            nodes: for graphs, the node names of each example index, as `plot` takes them.
            target_nodes: for graphs, the node each example's prediction is about.
        """
        from maskhooks.explanations.pictures import example, page_note
        from maskhooks.explanations.profile import profile_sections
        from maskhooks.viz.page import page

        layers = self._layers()
        label, noun = score_label(self.provenance), "edges" if layers.connected else "positions"
        examples = [
            example(
                layers,
                rows,
                number,
                self.metadata.get(number, {}),
                (nodes or {}).get(number, ()),
                (target_nodes or {}).get(number),
                totals=label == BITS,
            )
            for number, rows in self._each()
        ]
        text = page(
            examples,
            layers.labels,
            title=title or question(label, noun),
            note=page_note(layers, self.sites),
            label=label,
            top=scale_end(label, self["score"][self["valid"]]),
            threshold=0.5 if is_fraction(label) else None,
            zero_note=zero_note(label, noun.capitalize()),
            provenance=self.provenance,
            unit=unit(label),
            sections=profile_sections(self) if sections is None else sections,
        )
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _one(self, example: int | None) -> Explanation:
        """The valid rows of one example; None is the first example."""
        if not len(self):
            raise SettingError("this explanation has no rows, so there is no example to show")
        return self.select(example=int(self["example"].min()) if example is None else example)

    def _each(self) -> Iterator[tuple[int, Column]]:
        """Yield each example's index and the indices of its valid rows."""
        rows = np.flatnonzero(self["valid"])
        rows = rows[np.argsort(self["example"][rows], kind="stable")]
        numbers, starts = np.unique(self["example"][rows], return_index=True)
        for number, start, stop in zip(numbers, starts, [*starts[1:], len(rows)], strict=False):
            yield int(number), rows[start:stop]

    def _counts(self) -> str:
        counts = {"example": len(np.unique(self["example"])), "site": len(self.sites), "row": len(self)}
        return ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for noun, count in counts.items())

    def _mean_of(self) -> str:
        label = score_label(self.provenance)
        return "kept" if label == P_KEPT else label

    def _layers(self) -> Layers:
        return Layers.shown(self.columns, self.sites, self.provenance)

    def _known(self, name: str, numbers: Sequence[int]) -> Sequence[int]:
        here = np.unique(self[name])
        for number in numbers:
            if number not in here:
                raise SettingError(
                    f"there is no {name} {number}. The explanation holds {', '.join(map(str, here[:20]))}"
                    + (", ..." if len(here) > 20 else "")
                )
        return numbers


def _as_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance as a JSON file returns it, so that saving does not change it."""
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(provenance)))
    except (TypeError, ValueError) as error:
        raise SettingError(f"the provenance is not JSON-serialisable: {error}. Give numbers, text and lists") from error
    return result
