"""Tiny random models of every type that transformers lists, built by general rules from their configuration classes.

The rules of `ladder.py` are tried in turn until a model can be built and run; lists with an entry per layer are rebuilt
to keep each kind of layer, also in sub-configurations. The number of weights is counted on the meta device before
anything is allocated.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from ladder import LAYERS, WORDS, Rung, named, number_of, rungs
from maskhooks_transformers import decoding, samples
from torch import Tensor, nn

MOST_WEIGHTS = 40_000_000


class BuildError(Exception):
    """No rule gave a model that runs; the message says why."""


def build(model_class: type[nn.Module], config_class: type, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a tiny model in eval mode with redrawn weights, and a batch for it.

    Raises:
        BuildError: no rule gives one.
    """
    reasons: list[str] = []
    own = getattr(model_class, "config_class", None) or config_class  # text models need the text configuration alone
    for main, caches, rung in itertools.product((True, False), (True, False), list(rungs())):
        try:
            config = _config(own, rung)
            with torch.device("meta"):
                count = sum(weight.numel() for weight in _model(model_class, config).parameters())
            if count > MOST_WEIGHTS:
                raise BuildError(f"{count / 1e6:.0f} million weights")
            model = _redrawn(_model(model_class, _config(own, rung)), seed)
            batch = _batch(model, seed, main, caches)
            return _settled(model, batch), batch
        except Exception as error:  # noqa: PERF203 # whatever the model's own code raises
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    raise BuildError(" | ".join(dict.fromkeys(reasons)))


def _model(model_class: type[nn.Module], config: Any) -> nn.Module:
    build_from: Any = getattr(model_class, "_from_config", model_class)
    model: nn.Module = build_from(config)
    return model


def _redrawn(model: nn.Module, seed: int) -> nn.Module:
    """Redraw matrices so that values neither vanish nor explode, and perturb other weights slightly."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=source).to(weight.dtype)
            if name.endswith("weight") and weight.dim() > 1:
                weight.copy_(noise * 1.3 / (weight.numel() / len(weight)) ** 0.5)
            elif weight.is_floating_point():
                weight.add_(noise * 0.05)
    return model.eval()


def _settled(model: nn.Module, batch: Mapping[str, Tensor]) -> nn.Module:
    """Fit batch norms to the batch, as after training; otherwise values vanish on their way through convolutions."""
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(**batch, **decoding.without_cache(model))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return model


def _batch(model: nn.Module, seed: int, main: bool, caches: bool) -> dict[str, Tensor]:
    """The first sample call, with random values, that runs and gives finite outputs.

    Args:
        main: only calls with the model's main input.
        caches: whether the model may write a key-value cache, as by default; a few cannot without extra arguments.

    Raises:
        Exception: the last call's error.
    """
    last: Exception | None = None
    settings = {} if caches else decoding.without_cache(model)
    for shapes in samples.calls(model):
        if main and not {getattr(model, "main_input_name", None), "input_ids"} & set(shapes):
            continue
        batch = _filled(model, shapes, torch.Generator().manual_seed(seed + 1))
        try:
            with torch.no_grad():
                outputs = model(**batch, **settings)
        except Exception as error:  # whatever the model's own code raises
            last = error
            continue
        tensors = [value for value in outputs.values() if isinstance(value, Tensor)]
        if tensors and all(bool(tensor.isfinite().all()) for tensor in tensors[:1]):
            return batch
        last = BuildError("the outputs are not finite")
    raise last or BuildError("no input is known")


def _filled(model: nn.Module, sample: Mapping[str, Tensor], source: torch.Generator) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    for name, tensor in sample.items():
        if bool(tensor.any()) and "mask" not in name:
            batch[name] = tensor
        elif "mask" in name:
            mask = torch.ones(tensor.shape, dtype=tensor.dtype)
            if mask.dim() == 2 and mask.shape[1] > 4 and not name.startswith(("pixel", "decoder")):
                mask[1, -2:] = 0
            batch[name] = mask
        elif tensor.is_floating_point():
            batch[name] = torch.randn(tensor.shape, generator=source)
        else:
            batch[name] = torch.randint(8, _words(model), tensor.shape, generator=source)
    ends = getattr(model.config, "eos_token_id", None)
    if "input_ids" in batch and "attention_mask" in batch and batch["input_ids"].shape == batch["attention_mask"].shape:
        if type(ends) is int:  # one at the end of each row, which sequence classifiers of decoders look for
            batch["input_ids"][torch.arange(len(batch["input_ids"])), batch["attention_mask"].sum(1) - 1] = ends
        parts = getattr(model.config, "sep_token_id", None)
        if type(parts) is int:  # a question, two separators, a text, and another one
            batch["input_ids"][:, 1:3] = parts
            batch["input_ids"][torch.arange(len(batch["input_ids"])), batch["attention_mask"].sum(1) - 1] = parts
        batch["input_ids"][batch["attention_mask"] == 0] = 0
    return batch


def _words(model: nn.Module) -> int:
    config: Any = model.config
    texts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    found = [getattr(text, "vocab_size", None) for text in texts]
    return min([size for size in found if isinstance(size, int) and size > 8], default=WORDS)


# Configurations


def _config(config_class: type, rung: Rung) -> Any:
    """A configuration shrunk by a rule, sub-configurations included."""
    usual: Any = config_class()
    return _shrunk(usual, rung)


def _shrunk(usual: Any, rung: Rung) -> Any:
    given: dict[str, Any] = {}
    values = _settings(usual)
    subs = {name: getattr(usual, name, None) for name in getattr(usual, "sub_configs", {})}
    for name, sub in subs.items():
        if sub is not None and hasattr(sub, "to_dict"):
            given[name] = _shrunk(sub, rung)
    kinds = _layer_kinds(values)
    wanted = rung("num_layers", 99, 99)
    layers = max([LAYERS, *(len(kept) for kept in kinds.values())]) if wanted == LAYERS else wanted
    declared = (
        {field.name: field.default for field in dataclasses.fields(usual)} if dataclasses.is_dataclass(usual) else {}
    )
    for name, value in values.items():
        if name in given or name.startswith("_") or name in ("num_labels", "id2label", "label2id"):
            continue
        new = rung(name, value, declared.get(name, value))
        if name in kinds and new is value:
            few = wanted == LAYERS
            given[name] = [kinds[name][min(i, len(kinds[name]) - 1)] for i in range(layers)] if few else value[:layers]
            continue
        if new == LAYERS and isinstance(new, int) and named(name, r"layers$|n_layers?$|num_layers"):
            new = layers
        flag = isinstance(value, bool) and value != declared.get(name, value)  # such as a decoder within a model
        if new is not value or flag:
            given[name] = new
    for name in [name for name in given if number_of(name) == 2 and "heads" in name]:
        heads = name.replace("key_value", "attention").replace("kv", "attention")
        if values[name] == values.get(heads):  # as many keys and values as queries
            given[name] = given.get(heads, given[name])
    given["pad_token_id"] = 0
    if getattr(usual, "is_encoder_decoder", False):
        given["decoder_start_token_id"] = 0
    given.update(_tokens(vars(usual)))
    given.update(_choices(values))
    if values.get("rope_parameters") == {} and isinstance(given.get("layer_types"), list):  # set by kind of layer
        given["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in sorted(set(given["layer_types"]))
        }
    return type(usual)(**given)


def _settings(config: Any) -> dict[str, Any]:
    """The values of a configuration, including those that differ between layers and raise as attributes."""
    declared = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    held = vars(config)
    return {name: held[name] if name in held else getattr(config, name, None) for name in declared or held}


def _layer_kinds(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The distinct entries, in order, of lists with an entry per layer."""
    counts = {value for name, value in values.items() if named(name, r"layers$|n_layers?$") and type(value) is int}
    found: dict[str, list[Any]] = {}
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and len(value) in counts and len(value) > 2:
            if all(isinstance(item, (str, float, bool)) for item in value):
                found[name] = list(dict.fromkeys(value))
            elif all(isinstance(item, int) for item in value):
                found[name] = [item if item in (0, 1) else 64 for item in dict.fromkeys(value)]
    return found


def _tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids beyond the reduced vocabulary, each replaced by a different small number."""
    given, following = {}, iter(range(1, 8))
    for name, value in values.items():
        if re.search(r"token_id$|token_index$", name) and type(value) is int and value >= 8 and name != "pad_token_id":
            given[name] = next(following, 7)
    return given


def _choices(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that must be one of several before a model runs, such as a language: the first option."""
    several = {f"default_{name[:-1]}": value for name, value in values.items() if name.endswith("s")}
    return {
        name: several[name][0]
        for name, value in values.items()
        if value is None and isinstance(several.get(name), (list, tuple)) and several[name]
    }
