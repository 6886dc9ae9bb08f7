"""The work of `maskhooks explain` in one process: explain all data, or one shard, into a folder."""

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
    """What to explain, in values that can be sent to another process.

    Args:
        run: the folder of the trained masks, or the name of an explainer that needs no training.
        model: what the user wrote for MODEL.
        rows: the folder to write to.
        data: what the user wrote for --data.
        limit: the maximum number of records.
        columns: the table's columns of texts and labels.
        batch_size: examples in a batch.
        max_length: the maximum number of tokens of a text.
        settings: settings of a named explainer.
        units: which positions are gated together, such as "words"; None uses those of the trained masks.
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
        """Return the number of examples; None if batches come with the model."""
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
        """Explain what is missing.

        Args:
            device: where the model runs; None takes a CUDA GPU if there is one.
            shard: index of the shard, and number of shards.
            total: number of examples.
            overwrite: whether to replace the rows in the folder.
            progress: see `explain_to`.
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
        """Whether `run` names an explainer instead of a folder of trained masks.

        Raises:
            UnknownNameError: `run` is neither.
        """
        if self.run.exists():
            return False
        name, known = str(self.run), registry.parts(EXPLAINERS)
        if name not in known:
            raise UnknownNameError(
                f"{name!r} is neither the folder of a run nor the name of an explainer. The explainers are "
                f"{', '.join(sorted(known))}.",
                near=close_matches(name, known),
            )
        return True

    def _trained_with(self) -> str | None:
        """Return the `units` that the masks were saved with; None for a function, which comes with the model."""
        found = None if self._named else settings_of(self.run)["settings"].get("units")
        return None if found == "function" else found

    def _explainer(self, hooked: Hooked) -> Any:
        """Return the loaded or named explainer.

        Raises:
            NotFittedError: the named explainer must be fitted first.
            SettingError: it does not take these settings, or settings were given for a folder.
        """
        name = str(self.run)
        if not self._named:
            if self.settings:
                raise SettingError(
                    f"--set is for a named explainer, and {name} is a folder of trained masks. Leave it out."
                )
            return load(self.run, hooked)
        kind = registry.part(EXPLAINERS, name)
        schema_of(kind).check_names(self.settings, name)
        missing = [
            one.name for one in schema_of(kind).values() if one.default is REQUIRED and one.name not in self.settings
        ]
        if missing:
            raise SettingError(f"{name} needs {', '.join(missing)}. Give each as --set {missing[0]}=VALUE.")
        explainer: Explainer = kind(hooked, **self.settings)
        explainer.check_ready()
        return explainer
