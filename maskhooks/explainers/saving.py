"""Saving: a fitted explainer as a folder of safetensors and JSON, never a pickle."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors
import safetensors.torch
from torch import nn

from maskhooks.atomic_write import draft
from maskhooks.errors import (
    CorruptFileError,
    FingerprintError,
    FingerprintWarning,
    NotFittedError,
    SettingError,
)
from maskhooks.explainers.base import EXPLAINERS
from maskhooks.model.fingerprint import differences, fingerprint
from maskhooks.model.hooked import Hooked
from maskhooks.model.wrapping import wrap
from maskhooks.plugins.registry import registry
from maskhooks.seeds import forked
from maskhooks.sites.site import Site
from maskhooks.training.run import FitResult

FORMAT = 1
SETTINGS, _WEIGHTS = "explainer.json", "weights.safetensors"


@runtime_checkable
class Saveable(Protocol):
    """What an explainer offers so that it can be saved; one that does is loaded by its registered name."""

    name: str
    hooked: Hooked
    fitted: bool
    result: Any

    @classmethod
    def restored(cls, hooked: Hooked, settings: dict[str, Any], **given: Any) -> Saveable:
        """The explainer that has these settings; `given` holds what could not be saved."""

    @property
    def parts(self) -> list[nn.Module]:
        """Modules whose weights are saved, always in the same order."""

    def settings(self) -> dict[str, Any]:
        """What rebuilds the explainer, as JSON has it; `sites` and `conditioned_on` hold sites as dictionaries."""

    def shapes(self) -> list[dict[str, Any]]:
        """What allocates the parts, as JSON has it."""

    def restart(self, shapes: Sequence[Mapping[str, Any]]) -> None:
        """Allocates the parts."""

    def provenance(self) -> dict[str, Any]:
        """What made it."""


def save(explainer: Saveable, folder: Path) -> Path:
    """Writes `explainer.json` and `weights.safetensors` into a folder; `log.csv` and `validation.csv` beside them.

    Raises:
        NotFittedError: there is nothing to save yet.
        StorageError: it cannot be written; what was saved there before is as it was.
    """
    if not explainer.fitted:
        raise NotFittedError("there is nothing to save yet: call fit(train_loader) first")
    weights = {
        f"{number}.{name}": tensor.contiguous()
        for number, part in enumerate(explainer.parts)
        for name, tensor in part.state_dict().items()
    }
    settings = {
        "format": FORMAT,
        "explainer": explainer.name,
        "settings": explainer.settings(),
        "shapes": explainer.shapes(),
        "fingerprint": fingerprint(explainer.hooked.model),
        "provenance": explainer.provenance(),
        "result": {key: getattr(explainer.result, key, None) for key in ("within_margin", "chosen", "stopped")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {_WEIGHTS: safetensors.torch.save(weights), SETTINGS: json.dumps(settings, indent=1).encode()}
    for name in ("log", "validation"):
        rows = getattr(explainer.result, name, None)
        if rows:
            files[f"{name}.csv"] = _table(rows)
    for name, data in files.items():
        with draft(folder / name) as file:
            file.write(data)
    return folder


def load(folder: str | Path, model: nn.Module | Hooked, *, strict: bool = True, **given: Any) -> Any:
    """A saved explainer, for the model it was fitted to.

    Args:
        folder: what `explainer.save` wrote.
        model: the model, or it wrapped. What was passed to `wrap` as a function cannot be saved, and is passed
            again: here by name (`output=...`, `real=...`), or by giving the wrapped model.
        strict: False loads for a model whose fingerprint differs, and warns with the differences.
        given: functions and options of `wrap`; `gate`, `baseline` or `divergence` where they were objects.

    Returns:
        The explainer, of the class that saved it.

    Raises:
        CorruptFileError: a file is missing, broken, or a pickle.
        FingerprintError: it was saved for another model; the differences are listed.
        SettingError: a part that could not be saved was not given, or other positions are gated together than when it
            was trained.
        UnknownNameError: the plugin with its explainer is not installed.
    """
    folder = Path(folder)
    saved = settings_of(folder)
    own = {key: given.pop(key) for key in ("gate", "baseline", "divergence") if key in given}
    hooked = model if isinstance(model, Hooked) else _wrapped(model, saved["settings"], given)
    _check_units(folder, saved["settings"], hooked)
    _compare(folder, saved["fingerprint"], fingerprint(hooked.model), strict)
    kind: type[Saveable] = registry.part(EXPLAINERS, saved["explainer"])
    explainer = kind.restored(hooked, saved["settings"], **own)
    with forked(hooked.model):  # parts are drawn at random before their weights are read
        explainer.restart(saved["shapes"])
    _load_weights(folder, explainer.parts)
    explainer.result = FitResult(**saved["result"])
    explainer.fitted = True
    return explainer


def _table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _wrapped(model: nn.Module, settings: dict[str, Any], given: dict[str, Any]) -> Hooked:
    """The model wrapped as an adapter finds it, or with the saved sites where it finds others."""
    if settings.get("units") not in (None, "function"):
        given = {"units": settings["units"], **given}
    hooked = wrap(model, **given)
    sites = [Site.from_dict(site) for key in ("conditioned_on", "sites") for site in settings.get(key) or ()]
    if all(hooked.sites.get(str(site)) is not None for site in sites):
        return hooked
    every = sorted({str(site): site for site in sites}.values(), key=lambda site: site.depth or 0)
    return wrap(model, sites=every, **given)


def _check_units(folder: Path, settings: dict[str, Any], hooked: Hooked) -> None:
    """Raises SettingError where other positions are gated together than those that masks were trained with."""
    saved, present = settings.get("units"), hooked.task.together
    if "units" in settings and saved != present:
        way = {None: "without units", "function": "with the function again, units=lambda batch: ..."}
        raise SettingError(
            f"{folder} was trained with {_told(saved)}, and the model is wrapped with {_told(present)}. Wrap it "
            f"{way.get(saved, f'with units={saved!r}')}."
        )


def _told(units: str | None) -> str:
    if units is None:
        return "each position by itself"
    return "units given by a function" if units == "function" else f"units={units!r}"


def _compare(folder: Path, saved: dict[str, Any], present: dict[str, Any], strict: bool) -> None:
    found = differences(saved, present)
    if not found:
        return
    text = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    message = f"{folder} was saved for another model: {text}."
    if strict:
        raise FingerprintError(
            f"{message} Load it with the model it was fitted to, or with strict=False if you know that it fits.",
            path=folder,
            differences=found,
        )
    warnings.warn(message, FingerprintWarning, stacklevel=3)


def settings_of(folder: Path) -> dict[str, Any]:
    """What is saved of an explainer but its weights, as JSON has it; no model is needed.

    Raises:
        CorruptFileError: it is missing or broken.
    """
    path = folder / SETTINGS
    data = _bytes(path)
    try:
        saved: dict[str, Any] = json.loads(data)
        version = saved["format"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{path} is not what save() writes ({error}). Save the explainer again.", path=path
        ) from error
    if version != FORMAT:
        raise CorruptFileError(
            f"{path} has format {version}, this maskhooks reads format {FORMAT}. Use the version that wrote it.",
            path=path,
        )
    return saved


def _load_weights(folder: Path, parts: list[nn.Module]) -> None:
    path = folder / _WEIGHTS
    try:
        weights = safetensors.torch.load(_bytes(path))
        for i, part in enumerate(parts):
            mine = {name.removeprefix(f"{i}."): t for name, t in weights.items() if name.startswith(f"{i}.")}
            part.load_state_dict(mine)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise CorruptFileError(
            f"{path} is broken or no safetensors file ({error}); pickles are never read. Save the explainer again.",
            path=path,
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptFileError(
            f"{path} cannot be read ({error}). Is this the folder that save() wrote?", path=path
        ) from error
