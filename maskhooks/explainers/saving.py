"""Saving: write a fitted explainer as a folder of safetensors and JSON, never a pickle."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors
import safetensors.torch
from torch import nn
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from maskhooks.atomic_write import atomic_open
from maskhooks.errors import (
    CorruptFileError,
    FingerprintError,
    FingerprintWarning,
    NotFittedError,
    SettingError,
    UnknownNameError,
)
from maskhooks.explainers.base import EXPLAINERS
from maskhooks.explainers.stored_settings import check_given
from maskhooks.model.fingerprint import differences, fingerprint
from maskhooks.model.hooked import Hooked
from maskhooks.model.wrapping import wrap
from maskhooks.plugins.registry import registry
from maskhooks.seeds import preserved_rng
from maskhooks.settings.format import FORMAT, check_format
from maskhooks.settings.schema import checked, schema_of
from maskhooks.settings.types import Folder
from maskhooks.sites.site import Site
from maskhooks.training.run import FitResult

SETTINGS, _WEIGHTS = "explainer.json", "weights.safetensors"
_RESULT = ("within_margin", "chosen_steps", "stop_reason", "seconds")


class Saved(TypedDict):
    """The contents of `explainer.json`.

    Attributes:
        format: `FORMAT`.
        version: the version of maskhooks that saved it.
        explainer: the registered name.
        weights: SHA-256 of the weights file, which ties the file to these settings.
        settings: the explainer's settings by name, and the unit of gating.
        shapes: for each masking, the sizes of its parts.
        fingerprint: the model's fingerprint.
        provenance: the provenance of its explanations.
        result: within_margin, chosen_steps, stop_reason and seconds of the last fit.
    """

    format: int
    version: str
    explainer: str
    weights: str
    settings: dict[str, Any]
    shapes: list[dict[str, Any]]
    fingerprint: dict[str, Any]
    provenance: dict[str, Any]
    result: dict[str, Any]


@runtime_checkable
class Saveable(Protocol):
    """What an explainer needs in order to be saved, and to be loaded by its registered name."""

    name: str
    hooked: Hooked
    fitted: bool
    result: Any

    @classmethod
    def restored(cls, hooked: Hooked, settings: dict[str, Any], **given: Any) -> Saveable:
        """Return the explainer with these settings; `given` holds what could not be saved."""

    @property
    def parts(self) -> list[nn.Module]:
        """Modules whose weights are saved, always in the same order."""

    def settings(self) -> dict[str, Any]:
        """Return what rebuilds the explainer, JSON-serialisable; `sites` and `conditioned_on` hold dictionaries."""

    def shapes(self) -> list[dict[str, Any]]:
        """Return what allocates the parts, JSON-serialisable."""

    def restart(self, shapes: Sequence[Mapping[str, Any]]) -> None:
        """Allocate the parts."""

    def provenance(self) -> dict[str, Any]:
        """Return the provenance of its explanations."""


def save(explainer: Saveable, folder: Path) -> Path:
    """Write `explainer.json`, `weights.safetensors`, `log.csv` and `validation.csv` into a folder.

    Raises:
        NotFittedError: there is nothing to save yet.
        StorageError: a file cannot be written; earlier files there are untouched.
    """
    if not explainer.fitted:
        raise NotFittedError("there is nothing to save yet: call fit(train_loader) first")
    weights = safetensors.torch.save(
        {
            f"{number}.{name}": tensor.contiguous()
            for number, part in enumerate(explainer.parts)
            for name, tensor in part.state_dict().items()
        }
    )
    settings = {
        "format": FORMAT,
        "version": version("maskhooks"),
        "explainer": explainer.name,
        "weights": hashlib.sha256(weights).hexdigest(),
        "settings": explainer.settings(),
        "shapes": explainer.shapes(),
        "fingerprint": fingerprint(explainer.hooked.model),
        "provenance": explainer.provenance(),
        "result": {key: getattr(explainer.result, key, None) for key in _RESULT},
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {_WEIGHTS: weights, SETTINGS: json.dumps(settings, indent=1).encode()}
    for name in ("log", "validation"):
        rows = getattr(explainer.result, name, None)
        if rows:
            files[f"{name}.csv"] = _table(rows)
    for name, data in files.items():
        with atomic_open(folder / name) as file:
            file.write(data)
    return folder


@checked
def load(folder: Folder, model: nn.Module | Hooked | Any, *, strict: bool = True, **given: Any) -> Any:
    """Load a saved explainer, for the model it was fitted to.

    Args:
        folder: the folder that `explainer.save` wrote.
        model: the model, or the wrapped model. Functions passed to `wrap` cannot be saved, so pass them again: by name
            (`output=...`, `valid=...`), or as part of the wrapped model.
        strict: whether to refuse a model with another fingerprint; False warns with the differences.
        given: functions and options of `wrap`, and settings that could not be saved, such as a gate or a function.

    Returns:
        The explainer, of the class that saved it.

    Raises:
        CorruptFileError: a file is missing, broken, or a pickle.
        FingerprintError: it was saved for another model; the message lists the differences.
        SettingError: a part that could not be saved was not given, or positions are not gated together as in training.
        UnknownNameError: the plugin with its explainer is not installed.
    """
    folder = Path(folder)
    saved = settings_of(folder)
    try:
        kind: type[Saveable] = registry.part(EXPLAINERS, saved["explainer"])
    except UnknownNameError as error:
        raise _not_here(folder, error) from error
    own: dict[str, Any] = {key: given.pop(key) for key in set(given) & set(schema_of(kind)) - set(schema_of(wrap))}
    hooked = model if isinstance(model, Hooked) else _wrapped(model, saved["settings"], given)
    _check_units(folder, saved["settings"], hooked)
    _compare(folder, saved["fingerprint"], fingerprint(hooked.model), strict)
    explainer = _restored(folder, kind.restored, hooked, saved["settings"], own)
    with preserved_rng(hooked.model):  # parts are initialised at random before their weights are loaded
        explainer.restart(saved["shapes"])
    _load_weights(folder, explainer.parts, saved["weights"])
    kept = {key: value for key, value in saved["result"].items() if value is not None}
    explainer.result = FitResult(**kept) if kept else None
    explainer.fitted = True
    return explainer


def _restored(
    folder: Path,
    restored: Callable[..., Saveable],
    hooked: Hooked,
    settings: dict[str, Any],
    own: dict[str, Any],
) -> Saveable:
    """Return the explainer with the saved settings, which are checked like a user's."""
    check_given(settings, own)
    try:
        return restored(hooked, settings, **own)
    except UnknownNameError as error:
        raise _not_here(folder, error) from error
    except SettingError as error:
        if own:  # what is given can be wrong too
            raise
        raise CorruptFileError(
            f"{folder / SETTINGS} has a setting that cannot be used. {error} Save the explainer again.",
            path=folder / SETTINGS,
        ) from error


def _not_here(folder: Path, error: UnknownNameError) -> UnknownNameError:
    return UnknownNameError(
        f"{folder} was saved with a part that is not registered here: {error} If a plugin offers it, install that "
        "plugin; `maskhooks plugins` lists those that failed to load.",
        plugin=error.plugin,
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _wrapped(model: nn.Module, settings: dict[str, Any], given: dict[str, Any]) -> Hooked:
    """Return the wrapped model, with the adapter's sites or, if these differ, with the saved sites."""
    if settings.get("units") not in (None, "function"):
        given = {"units": settings["units"], **given}
    hooked = wrap(model, **given)
    sites = [Site.from_dict(site) for key in ("conditioned_on", "sites") for site in settings.get(key) or ()]
    if all(hooked.sites.get(str(site)) is not None for site in sites):
        return hooked
    every = sorted({str(site): site for site in sites}.values(), key=lambda site: site.depth or 0)
    return wrap(model, sites=every, **given)


def _check_units(folder: Path, settings: dict[str, Any], hooked: Hooked) -> None:
    """Raise SettingError if positions are not gated together as in training."""
    saved, present = settings.get("units"), hooked.task.unit_name
    if "units" in settings and saved != present:
        way = {None: "without units", "function": "with the function again, units=lambda batch: ..."}
        raise SettingError(
            f"{folder} was trained with {_told(saved)}, but the model is wrapped with {_told(present)}. Wrap it "
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
    """Return the contents of a saved explainer's `explainer.json`; no model is needed.

    Raises:
        CorruptFileError: the file is missing or broken.
    """
    path = folder / SETTINGS
    data = _bytes(path)
    try:
        saved = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not JSON ({error}). Save the explainer again.", path=path) from error
    if not isinstance(saved, dict) or not isinstance(saved.get("format"), int):
        raise CorruptFileError(
            f"{path} is not what save() writes: it has no format. Save the explainer again.", path=path
        )
    check_format(path, saved["format"])
    from pydantic import TypeAdapter, ValidationError  # not needed until something is loaded

    try:
        return dict(TypeAdapter(Saved).validate_python(saved, strict=True, extra="forbid"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise CorruptFileError(
            f"{path} is not what save() writes: {field}: {first['msg']}. Save the explainer again.", path=path
        ) from error


def _load_weights(folder: Path, parts: list[nn.Module], digest: str) -> None:
    path = folder / _WEIGHTS
    data = _bytes(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise CorruptFileError(
            f"{path} does not hold the weights that {SETTINGS} was saved with. The files come from different runs, or "
            "one is broken; pickles are never read. Save the explainer again.",
            path=path,
        )
    try:
        weights = safetensors.torch.load(data)
        for i, part in enumerate(parts):
            mine = {name.removeprefix(f"{i}."): t for name, t in weights.items() if name.startswith(f"{i}.")}
            part.load_state_dict(mine)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise CorruptFileError(
            f"{path} is broken or not a safetensors file ({error}); pickles are never read. Save the explainer again.",
            path=path,
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptFileError(
            f"{path} cannot be read ({error}). Is this the folder that save() wrote?", path=path
        ) from error
