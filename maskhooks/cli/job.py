"""The work of `maskhooks explain` in one process: rows of data, or of a part of them, into a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskhooks.cli.material import Material, count
from maskhooks.data.records import Columns
from maskhooks.errors import SettingError, UnknownNameError, close_matches
from maskhooks.explainers.base import EXPLAINERS, Explainer
from maskhooks.explainers.saving import load, settings_of
from maskhooks.explanations.shards import Shards
from maskhooks.model.hooked import Hooked
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import REQUIRED, schema_of


@dataclass(frozen=True)
class Job:
    """What is explained, in words and numbers that can be sent to another process.

    Args:
        run: folder of the trained masks, or the name of an explainer that learns nothing.
        settings: of a named explainer.
        model: what the user wrote for MODEL.
        rows: the folder to write to.
        data: what the user wrote for --data.
        limit: records at most.
        columns: where a table has its texts and labels.
        batch_size: examples in a batch.
        max_length: tokens of a text at most.
        units: a word for what is gated together; None is as the masks were trained.
    """

    run: Path
    model: str
    rows: Path
    data: str | None
    limit: int | None
    columns: Columns
    batch_size: int
    max_length: int
    settings: dict[str, Any] = field(default_factory=dict)
    units: str | None = None

    def total(self) -> int | None:
        """Examples in all; None where batches come with the model."""
        return None if self.data is None else count(self.data, self.columns, self.limit)

    def work(
        self,
        device: str | None,
        shard: tuple[int, int] = (0, 1),
        *,
        total: int | None = None,
        overwrite: bool = False,
        progress: bool | Callable[[int], None] = True,
    ) -> Shards:
        """Explains what is not there yet.

        Args:
            device: where the model runs; None is a CUDA GPU where there is one.
            shard: which of how many parts.
            total: examples in all.
            overwrite: begin anew.
            progress: as `explain_to` takes it.
        """
        material = Material.of(
            self.model,
            device,
            self.max_length,
            units=self.units or self._trained_with(),
            columns=self.columns,
            batch_size=self.batch_size,
        )
        explainer = self._explainer(material.hooked)
        given = material.for_explaining(self.data, self.limit)
        metadata: dict[str, Any] = {**given.metadata, "max_length": self.max_length}
        shards: Shards = explainer.explain_to(
            given.data,
            self.rows,
            shard=shard,
            total=total,
            metadata=metadata,
            overwrite=overwrite,
            progress=progress,
            **given.settings,
        )
        return shards

    @property
    def _named(self) -> bool:
        """Whether an explainer is named, instead of a folder of trained masks.

        Raises:
            UnknownNameError: it is neither.
        """
        if self.run.exists():
            return False
        name, known = str(self.run), registry.parts(EXPLAINERS)
        if name not in known:
            raise UnknownNameError(
                f"{name!r} is neither the folder of a run nor the name of an explainer. There are: "
                f"{', '.join(sorted(known))}.",
                near=close_matches(name, known),
            )
        return True

    def _trained_with(self) -> str | None:
        """The word for units that trained masks were saved with; a function comes with the model again."""
        found = None if self._named else settings_of(self.run)["settings"].get("units")
        return None if found == "function" else found

    def _explainer(self, hooked: Hooked) -> Any:
        """What explains.

        Raises:
            NotFittedError: the one that is named has to be fitted first.
            SettingError: it does not take these settings, or a folder got some.
        """
        name = str(self.run)
        if not self._named:
            if self.settings:
                raise SettingError(f"--set is for an explainer that is named, and {name} is a folder of trained masks")
            return load(self.run, hooked)
        kind = registry.part(EXPLAINERS, name)
        missing = [
            one.name for one in schema_of(kind).values() if one.default is REQUIRED and one.name not in self.settings
        ]
        if missing:
            raise SettingError(f"{name} needs {', '.join(missing)}: give each with --set {missing[0]}=VALUE")
        explainer: Explainer = kind(hooked, **self.settings)
        explainer.check_ready()
        return explainer
