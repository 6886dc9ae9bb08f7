"""The base class of explainers: fit, explain, and provenance."""

from __future__ import annotations

import dataclasses
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskhooks.checks.model_check import check_model
from maskhooks.errors import EmptyLoaderError
from maskhooks.explainers.stored_settings import stored
from maskhooks.explanations.chunks import Chunks
from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.explanations.score_labels import P_KEPT
from maskhooks.explanations.shards import Shards
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.preserved import preserved
from maskhooks.hooks.replay import Replay
from maskhooks.model.fingerprint import fingerprint
from maskhooks.model.hooked import Hooked
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.plugins.kind import declare
from maskhooks.progress import counter, track
from maskhooks.seeds import seeded
from maskhooks.settings.schema import checked
from maskhooks.settings.types import Batches, Count, Folder, Natural, Seed
from maskhooks.sites.site import Site

_STREAM = 102  # the purpose of random numbers for the order of a shuffling loader


class Explainer(ABC):
    """Scores each gated position of a batch by how much the model's prediction needs it.

    Args:
        hooked: the wrapped model.
        seed: the random seed.

    Attributes:
        name: the name in lists and in `provenance`.
        score_label: what scores are called in pictures, pages and reports.
        fitted: whether it has learned from the model as it was when `fit` ran.
    """

    name: str
    score_label: str = P_KEPT
    fitted: bool = False
    recorder: Replay | None = None  # records clean passes for `onward`
    _checked: Hooked | None = None  # the model that was checked

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Check the arguments of each explainer's own `__init__` and `fit` against their signatures."""
        super().__init_subclass__(**keywords)
        for name in ("__init__", "fit"):
            if name in vars(cls):
                setattr(cls, name, checked(vars(cls)[name]))

    def __init__(self, hooked: Hooked, *, seed: Seed = 0) -> None:
        self.hooked = hooked
        self.seed = seed

    @checked
    def fit(self, train: Batches, validation: Batches | None = None) -> Explainer:
        """Do nothing: only trained explainers override this.

        Raises:
            SettingError: a setting is given; there are none.
        """
        return self

    def settings(self) -> dict[str, Any]:
        """Return the settings, each JSON-serialisable."""
        return stored(self)

    def check_ready(self) -> None:  # noqa: B027 # most explainers have nothing to learn
        """Raise NotFittedError if the explainer must be fitted first."""

    @abstractmethod
    def scores(self, clean: Clean) -> list[Scores]:
        """Return the scores of one batch: a `Scores` for each masked site and depth."""

    @property
    @abstractmethod
    def reads(self) -> Sequence[Site]:
        """The sites whose values `scores` needs, including those it scores."""

    @property
    def onward(self) -> Sequence[Site]:
        """The sites from which `scores` runs the model again."""
        return ()

    @checked
    def explain(self, batch: Any, *, start_index: int | Sequence[int] = 0) -> Explanation:
        """Explain a batch. The model and the random state are unchanged.

        Args:
            batch: a batch, as the loaders yield it.
            start_index: the index of its first example in the rows, or the index of each example.
        """
        self.check_ready()
        with preserved(self.hooked.model):
            return self.explained(batch, start_index, self.provenance())

    @checked
    def explain_all(self, batches: Batches, *, start_index: Natural = 0) -> Explanation:
        """Explain all batches, numbering examples consecutively, with progress on stderr.

        Args:
            batches: batches, as the loaders yield them.
            start_index: the index of the first example in the rows.

        Raises:
            EmptyLoaderError: the loader yields no batch.
        """
        self.check_ready()
        parts: list[Explanation] = []
        first, provenance = start_index, self.provenance()
        with preserved(self.hooked.model):
            for batch in track(batches, "explaining"):
                parts.append(self.explained(batch, first, provenance))
                first = index_after(parts[-1], first)
        if not parts:
            raise EmptyLoaderError("there is nothing to explain: the loader yields no batch")
        return Explanation.concat(parts)

    @checked
    def explain_to(
        self,
        data: Iterable[Any],
        folder: Folder,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        batch_size: Count = 32,
        length: Callable[[Any], int] | None = None,
        batches: Count = 32,
        shard: tuple[int, int] = (0, 1),
        total: Natural | None = None,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        progress: bool | Callable[[int], None] = True,
    ) -> Shards:
        """Explain data of any size into a folder of Parquet files, with one file's rows in memory at a time.

        If a call is stopped at any moment, the same call resumes after the complete files: no row is lost or doubled,
        and the scores are those of an uninterrupted call.

        Args:
            data: batches; with `collate`, examples. Each call needs the same data in the same order, and reads it once.
                The global random state is seeded meanwhile, so a shuffling DataLoader keeps its order.
            folder: the folder of the files; it is created if missing.
            collate: makes a batch from a list of examples; called only for examples still to be explained.
            batch_size: with `collate`, the number of examples in a batch.
            length: with `collate`, the approximate length of an example. Examples of a file with similar lengths then
                share a batch, which saves padding; rows stay in the order of the data.
            batches: number of batches in a file.
            shard: `(i, n)` writes only every n-th file from the i-th on, so n processes can share the work.
            total: total number of examples, for the progress.
            metadata: what else must be the same in a resumed call, such as the name of the data; JSON-serialisable.
            overwrite: whether to start again if the folder holds other rows.
            progress: whether to show progress on stderr, or a function to call with each number of examples explained.

        Raises:
            ResumeError: the folder was started with another explainer, model, data or batches.
            StorageError: a file cannot be written, for example on a full disk; the other files stay.
            EmptyLoaderError: there is no data.
            SettingError: a number is out of range.
        """
        self.check_ready()
        chunks = Chunks(data, collate, batch_size, length, batches, shard)
        provenance = self.provenance()
        made = {
            "explainer": provenance,
            "weights": self.weights_digest(),
            **chunks.settings(),
            "metadata": dict(metadata or {}),
        }
        shards = Shards.open(folder, made, overwrite=overwrite)
        if shards.complete:
            return shards
        there = {number: shards.num_examples(number) for number in shards.existing()}
        bar = counter(
            "explaining",
            chunks.share(total),
            sum(count for number, count in there.items() if chunks.mine(number)),
            shown=progress is True,
        )
        with preserved(self.hooked.model), bar as advance:
            torch.manual_seed(seeded(self.seed, _STREAM))
            self._fill(shards, chunks, there, provenance, progress if callable(progress) else advance)
        return shards

    def site_scores(self, clean: Clean, site: Site, depth: int, values: Float[Tensor, "*gated"]) -> Scores:
        """Return the `Scores` of a site, with the batch's valid positions and their names.

        Args:
            clean: the clean pass that `scores` got.
            site: the masked site.
            depth: the depth that the mask was read from, such as `site.depth`.
            values: scores in [0, 1], axes `site.pattern.gated`.
        """
        task, here = self.hooked.task, clean.places[site]
        names, edges = task.names(site, clean.batch), task.edges(site, clean.batch, clean.values)
        return Scores(site, depth, values, here.valid, names, here.example_index, edges)

    def provenance(self) -> dict[str, Any]:
        """Return what made an explanation: explainer, settings, fingerprint and versions, JSON-serialisable."""
        return {
            "explainer": self.name,
            "score_label": self.score_label,
            **self.settings(),
            "units": self.hooked.task.unit_name,
            "fingerprint": fingerprint(self.hooked.model)["digest"],
            "versions": {
                "maskhooks": version("maskhooks"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def check_model(self, batch: Any) -> bool:
        """Check once, on the first batch, that the model is a function of its input; see `check_model`.

        Returns:
            Whether two passes of the batch were equal; True for later batches.
        """
        if self._checked is self.hooked or "model" in self.hooked.skipped_checks:
            return True
        repeats = check_model(self.hooked, batch)
        self._checked = self.hooked
        return repeats

    def _on_device(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches where the model is; the first one is checked."""
        for batch in batches:
            moved = move(batch, device_of(self.hooked.model))
            self.check_model(moved)
            yield moved

    def explained(self, batch: Any, first: int | Sequence[int], provenance: Mapping[str, Any]) -> Explanation:
        """Return what `explain` does, with a provenance that was made once for many batches."""
        with frozen(self.hooked.model):  # once for all passes
            (moved,) = self._on_device([batch])
            clean = clean_pass(self.hooked, moved, self.reads, self.onward, self.recorder if self.onward else None)
            found, metadata = self.scores(clean), self._about(clean)
        return Explanation.build(found, provenance=provenance, metadata=metadata, start_index=first)

    def _fill(
        self,
        shards: Shards,
        chunks: Chunks,
        there: Mapping[int, int],
        provenance: Mapping[str, Any],
        advance: Callable[[int], None],
    ) -> None:
        """Write this shard's missing files.

        Args:
            there: the number of examples in each existing file.
        """
        first = files = 0
        for number, items in chunks:
            count = there.get(number)
            if count is not None:
                chunks.check(items, count, shards.path(number))
            elif chunks.mine(number):
                rows = self._chunk(chunks.made(items, first), provenance, advance)
                count = int(rows.columns["example"][-1]) + 1 - first
                chunks.check(items, count)
                shards.write(number, rows)
            else:
                count = chunks.count(items)
            first, files = first + count, number + 1
        if not files:
            raise EmptyLoaderError("there is nothing to explain: the loader yields no batch")
        shards.finish(files, first)

    def _chunk(
        self,
        batches: Iterable[tuple[Any, Sequence[int] | int | None]],
        provenance: Mapping[str, Any],
        advance: Callable[[int], None],
    ) -> Explanation:
        """Return the rows of some batches, sorted by example; a batch without an index follows the previous one."""
        parts: list[Explanation] = []
        following = 0
        for batch, first in batches:
            parts.append(self.explained(batch, following if first is None else first, provenance))
            numbers = np.unique(parts[-1].columns["example"])
            following = int(numbers[-1]) + 1
            advance(len(numbers))
        together = Explanation.concat(parts)
        order = np.argsort(together.columns["example"], kind="stable")
        columns = {name: column[order] for name, column in together.columns.items()}
        examples = dict(sorted(together.metadata.items()))
        return dataclasses.replace(together, columns=columns, metadata=examples)

    def weights_digest(self) -> str | None:
        """Return a digest of the learned weights; None if there are none."""
        parts = getattr(self, "parts", None)
        return None if parts is None else fingerprint(nn.ModuleList(parts))["digest"]

    def _about(self, clean: Clean) -> list[dict[str, str]] | None:
        task = self.hooked.task
        words = {"prediction": task.predictions(clean.outputs), "target": task.targets(clean.batch)}
        known = {key: texts for key, texts in words.items() if texts is not None}
        return [dict(zip(known, texts, strict=True)) for texts in zip(*known.values(), strict=True)] if known else None


def index_after(part: Explanation, first: int) -> int:
    """Return the index after a batch's last example; a graph without edges has no row, but may have metadata."""
    return int(max(part.columns["example"].max(initial=first), max(part.metadata, default=first))) + 1


EXPLAINERS = declare("explainer", Explainer)
