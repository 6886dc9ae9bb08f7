"""Storage: a fitted explainer as a folder of safetensors and JSON, never a pickle."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from maskhooks.errors import (
    CorruptFileError,
    FingerprintError,
    FingerprintWarning,
    NotFittedError,
    SettingError,
)
from maskhooks.checkpoint import Fitted
from maskhooks.explainers.diffmask import DiffMask
from maskhooks.fingerprint import differences, fingerprint
from maskhooks.hooked import Hooked
from maskhooks.recipe import Recipe
from maskhooks.registry import registry
from maskhooks.site import Site

from maskhooks.wrap import wrap

FORMAT = 1
_SETTINGS, _WEIGHTS = "explainer.json", "weights.safetensors"


def save(explainer: DiffMask, folder: Path) -> Path:
    """Writes `explainer.json` and `weights.safetensors` into a folder; `log.csv` and `validation.csv` beside them.

    Raises:
        NotFittedError: there is nothing to save yet.
    """
    if not explainer.fitted:
        raise NotFittedError("there is nothing to save yet: call fit(train_loader) first")
    folder.mkdir(parents=True, exist_ok=True)
    parts = _parts(explainer)
    weights = {
        f"{i}.{name}": t.contiguous() for i, part in enumerate(parts) for name, t in part.state_dict().items()
    }
    settings = {
        "format": FORMAT,
        "explainer": explainer.name,
        "settings": explainer.settings(),
        "shapes": explainer.shapes(),
        "fingerprint": fingerprint(explainer.hooked.model),
        "provenance": explainer.provenance(),
        "result": {
            key: getattr(explainer.result, key, None) for key in ("within_margin", "chosen", "stopped")
        },
    }
    _write(folder / _WEIGHTS, safetensors.torch.save(weights))
    _write(folder / _SETTINGS, json.dumps(settings, indent=1).encode())
    for name in ("log", "validation"):
        rows = getattr(explainer.result, name, None)
        if rows:
            with (folder / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    return folder


def load(folder: str | Path, model: nn.Module | Hooked, *, strict: bool = True, **given: Any) -> DiffMask:
    """A saved explainer, for the model it was fitted to.

    Args:
        folder: what `explainer.save` wrote.
        model: the model, or it wrapped; what was passed to `wrap` as a function cannot be saved, and is passed again,
            here by name (`output=...`, `real=...`) or by giving the wrapped model.
        strict: False loads for a model whose fingerprint differs, and warns with the differences instead of refusing.
        given: functions and options of `wrap`; `gate`, `baseline` or `divergence` where they were objects.

    Raises:
        CorruptFileError: a file is missing, broken, or a pickle.
        FingerprintError: it was saved for another model; the differences are listed.
        SettingError: a part that could not be saved was not given.
    """
    folder = Path(folder)
    saved = _read_settings(folder)
    settings = dict(saved["settings"])
    own = {key: given.pop(key) for key in ("gate", "baseline", "divergence") if key in given}
    sites = [Site.from_dict(site) for site in settings.pop("sites")]
    conditions = settings.pop("given")
    conditions = None if conditions is None else [Site.from_dict(site) for site in conditions]
    hooked = model if isinstance(model, Hooked) else _wrapped(model, sites, conditions, given)
    _compare(folder, saved["fingerprint"], fingerprint(hooked.model), strict)
    for part in ("gate", "baseline", "divergence"):
        if part not in own and settings[part] is None:
            raise SettingError(
                f"the {part} was an object that cannot be saved. Pass it again: maskhooks.load({str(folder)!r}, model, {part}=...)"
            )
    gate = own.pop("gate", None) or registry.make(
        "gates", settings["gate"]["name"], **settings["gate"]["settings"]
    )
    settings.pop("gate")
    if settings["divergence"] == "kl":
        settings.pop("divergence")
    explainer = DiffMask(
        hooked,
        sites,
        given=conditions,
        gate=gate,
        **{**settings, **own, "recipe": Recipe(**settings["recipe"])},
    )
    explainer.restart(saved["shapes"])
    _load_weights(folder, _parts(explainer))
    explainer.result = Fitted(**saved["result"])
    explainer.fitted = True
    return explainer


def _wrapped(
    model: nn.Module, sites: list[Site], conditions: list[Site] | None, given: dict[str, Any]
) -> Hooked:
    hooked = wrap(model, **given)
    if all(hooked.sites.get(str(site)) is not None for site in [*sites, *(conditions or [])]):
        return hooked
    every = list({str(site): site for site in [*(conditions or []), *sites]}.values())
    every.sort(key=lambda site: site.depth or 0)
    return wrap(model, sites=every, **given)


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


def _parts(explainer: DiffMask) -> list[nn.Module]:
    return list({id(part): part for masking in explainer.maskings for part in masking.modules}.values())


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: a file that breaks half way leaves the former one."""
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(data)
    draft.replace(path)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / _SETTINGS
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
