"""What every explainer gives: fit, explain, and an Explanation with its provenance."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from maskhooks.errors import EmptyLoaderError
from maskhooks.explanation import Explanation, Scores
from maskhooks.fingerprint import fingerprint
from maskhooks.hooked import Hooked
from maskhooks.progress import track
from maskhooks.replay import Replay
from maskhooks.seeds import forked
from maskhooks.site import Site
from maskhooks.step import Clean, clean_pass, real_positions
from maskhooks.task import device_of, move


class Explainer(ABC):
    """Says for each gated position of a batch how much the model's prediction needs it.

    Args:
        hooked: the wrapped model.
        seed: of all random numbers.
    """

    name: str
    replay: Replay | None = None

    def __init__(self, hooked: Hooked, *, seed: int = 0) -> None:
        self.hooked = hooked
        self.seed = seed

    def fit(self, train: Iterable[Any], validation: Iterable[Any] | None = None, **settings: Any) -> Explainer:
        """Learns from batches; explainers that have nothing to learn return at once."""
        return self

    def check_ready(self) -> None:  # noqa: B027 # most explainers have nothing to learn
        """Raises NotFittedError where something has to be learned first."""

    @abstractmethod
    def scores(self, clean: Clean) -> list[Scores]:
        """The scores of one batch, a `Scores` for each masked site and depth."""

    @property
    @abstractmethod
    def reads(self) -> Sequence[Site]:
        """The sites whose values `scores` needs, and those it scores."""

    @property
    def onward(self) -> Sequence[Site]:
        """The sites from which `scores` runs the model again."""
        return ()

    def explain(self, batch: Any, *, first: int = 0) -> Explanation:
        """Explains a batch; the model and the random state are left as they were.

        Args:
            batch: as the loaders give it.
            first: the number of its first example in the rows.
        """
        self.check_ready()
        on_device = move(batch, device_of(self.hooked.model))
        clean = clean_pass(self.hooked, on_device, self.reads, self.onward, self.replay if self.onward else None)
        return Explanation.build(
            self.scores(clean), provenance=self.provenance(), examples=self._about(clean), first=first
        )

    def explain_all(self, batches: Iterable[Any]) -> Explanation:
        """Explains all batches, examples numbered on, with a progress bar on stderr.

        Raises:
            EmptyLoaderError: there is no batch.
        """
        parts: list[Explanation] = []
        first = 0
        with forked(self.hooked.model):
            for batch in track(batches, "explaining"):
                parts.append(self.explain(batch, first=first))
                first = int(parts[-1].columns["example"].max()) + 1
        if not parts:
            raise EmptyLoaderError("there is nothing to explain: the loader yields no batch")
        return Explanation.concat(parts)

    def site_scores(self, clean: Clean, site: Site, depth: int, values: Tensor) -> Scores:
        """The `Scores` of a site that was read, with the batch's real positions and their names.

        Args:
            clean: as `scores` gets it.
            site: the masked site.
            depth: the place of the site that was read, such as `site.depth`.
            values: in [0, 1], axes `site.pattern.gated`.
        """
        return Scores(
            site,
            depth,
            values,
            real_positions(self.hooked, clean, site),
            self.hooked.task.names(site, clean.batch),
        )

    def provenance(self) -> dict[str, Any]:
        """What made an explanation, as JSON has it."""
        return {
            "explainer": self.name,
            "seed": self.seed,
            "fingerprint": fingerprint(self.hooked.model)["digest"],
            "versions": {
                "maskhooks": version("maskhooks"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def _about(self, clean: Clean) -> list[dict[str, str]] | None:
        task = self.hooked.task
        words = {"prediction": task.predictions(clean.outputs), "target": task.targets(clean.batch)}
        known = {key: texts for key, texts in words.items() if texts is not None}
        return [dict(zip(known, texts, strict=True)) for texts in zip(*known.values(), strict=True)] if known else None
