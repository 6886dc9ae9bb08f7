"""The task for transformers: how to call the model on a batch, and what its positions are called."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor, nn

from maskhooks.errors import BatchError, SettingError, UnknownDistributionError
from maskhooks.model import outputs
from maskhooks.model.attention import Attended
from maskhooks.model.outputs import Outputs
from maskhooks.model.task import Task
from maskhooks.sites import nested
from maskhooks.sites.site import Site
from maskhooks_transformers import attention, decoding
from maskhooks_transformers.heads import CausalLanguageModel, Head, Translation, head_of
from maskhooks_transformers.inputs import (
    as_mapping,
    labels,
    token_ids,
    valid_targets,
    valid_tokens,
    without_tokens,
)
from maskhooks_transformers.loaded import model_types
from maskhooks_transformers.patches import Patches
from maskhooks_transformers.words import Words

# Inputs of models that also take texts.
_OTHER_INPUTS = ("pixel_values", "input_values", "input_features")


class TransformersTask(Task):
    """Knows how to call a Hugging Face model, which positions are valid, and what its outputs mean.

    A batch is a mapping (a `BatchEncoding`, a dict of tensors) or a tensor of token ids. Labels, and keys that the
    model's forward does not name, are left out of the call. No key-value cache is written (`use_cache=False`), so
    replay can skip layers. Positions count from each example's first valid token, so left padding changes nothing. The
    decoder of an encoder-decoder, if it gets no input, gets the labels, shifted, or else its start token.

    Options of wrap:
        tokenizer: names the tokens, the special ones and the mask token. Default: the one saved in the
            folder, or cached for the hub id, that the model was loaded from; nothing is downloaded, and
            without any, ids serve as tokens.
        positions: for causal language models, which tokens count: `"last"`, `"all"`, or a function of the batch.
            Default: those with a label, or the last; see `CausalLanguageModel`.
        units: "words" gives the pieces of a word one gate; or a function, see `Task`.
        call, output, valid, names, perturb, attention: functions that replace what this task does; see `Task`.
    """

    name = "transformers"
    recipe = "language"
    options = (*Task.options, "tokenizer", "positions")

    def __init__(self) -> None:
        super().__init__()
        self.served = "a model"
        self.head: Head | None = None
        self.words = Words(None)
        self.patches = Patches({})

    @property
    def writes(self) -> bool:
        """Whether the model generates text."""
        return isinstance(self.head, (CausalLanguageModel, Translation))

    @property
    def mask_token(self) -> int | None:
        return self.words.mask_token

    def types(self) -> tuple[type[nn.Module], ...]:
        return model_types()

    def serve(self, model: nn.Module) -> TransformersTask:
        task = copy.copy(self)
        task.served = type(model).__name__
        task.words = Words(model.config)
        task.patches = Patches.of(model)
        task.head = head_of(model, task.words)
        task.recipe = "language" if task.head is None else task.head.recipe
        task.name = f"transformers ({task.head.name if task.head is not None else 'no known head'})"
        return task

    def with_options(self, functions: Mapping[str, Any]) -> TransformersTask:
        """Return this task with the user's own functions and options.

        Raises:
            BatchError: this task does not have the option.
            SettingError: `positions` or `units` is invalid, the model is not a causal language model, or `tokenizer`
                is a name.
        """
        own = {key: value for key, value in functions.items() if key not in ("tokenizer", "positions")}
        task = super().with_options(own)
        assert isinstance(task, TransformersTask)
        if isinstance(task._units, str) and task._units != "words":
            raise SettingError(f"units={task._units!r} is not known. Give 'words', or a function of the batch")
        task.head = copy.copy(self.head)
        if "tokenizer" in functions:
            if isinstance(functions["tokenizer"], str):
                raise SettingError(
                    f"tokenizer={functions['tokenizer']!r} is a name. Give the tokenizer itself: "
                    f"AutoTokenizer.from_pretrained({functions['tokenizer']!r})"
                )
            task.words = Words(self.words.config, functions["tokenizer"])
            if task.head is not None:
                task.head.words = task.words
        if "positions" in functions:
            positions = functions["positions"]
            known = positions in ("last", "all") or callable(positions)
            if not known or not isinstance(task.head, CausalLanguageModel):
                raise SettingError(
                    f"positions={positions!r} does not fit {self.served}, served by the task {self.name!r}. Give "
                    "'last', 'all' or a function of the batch, for causal language models only"
                )
            task.head.positions = positions
        return task

    def arguments(self, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make the keyword arguments from a batch.

        Raises:
            BatchError: the batch has no input for the model, lists where tensors belong, or no batch axis.
        """
        mapping = as_mapping(batch)
        takes = _named(type(model))
        kwargs = {
            key: value for key, value in mapping.items() if key in takes and value is not None and not _is_label(key)
        }
        inputs = dict.fromkeys(["input_ids", "inputs_embeds", getattr(model, "main_input_name", "input_ids")])
        present = [key for key in (*inputs, *_OTHER_INPUTS) if key in kwargs]
        way_out = (
            f"{type(model).__name__} takes the output of tokenizer(texts, padding=True, return_tensors='pt'). "
            f"For other batches: wrap(model, call=lambda model, batch: model(input_ids=batch[0]), valid=...)"
        )
        if not present:
            has = f"has {', '.join(map(str, mapping))}" if mapping else f"is {nested.describe(batch)}"
            raise BatchError(f"the batch has no {' or '.join(inputs)}; it {has}. {way_out}")
        given = kwargs[present[0]]
        if not isinstance(given, Tensor):
            raise BatchError(f"{present[0]} is not a tensor but {nested.describe(given)}. {way_out}")
        if present[0] == "input_ids" and given.dim() < 2:
            raise BatchError(
                f"input_ids has shape {list(given.shape)}, without a batch axis. Give input_ids[None]. {way_out}"
            )
        if isinstance(self.head, Translation):
            kwargs.update(decoding.target(model, kwargs, given, labels(mapping)))
        if isinstance(self.head, CausalLanguageModel):
            kwargs.update(decoding.positions(model, kwargs))
        return (), {**kwargs, **decoding.without_cache(model)}

    def misfit(self, model: nn.Module, batch: Any) -> str | None:
        ids, config = token_ids(batch), getattr(model, "config", None)
        limit = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
        if ids is not None and isinstance(limit, int):
            tables = [one for one in model.modules() if isinstance(one, nn.Embedding) and one.num_embeddings == limit]
            room = limit - max((one.padding_idx + 1 for one in tables if one.padding_idx is not None), default=0)
            if ids.shape[1] > room > 0:
                return (
                    f"the longest text has {ids.shape[1]} tokens, and {type(model).__name__} has positions for {room}. "
                    f"Cut texts, as with tokenizer(texts, truncation=True, max_length={room})"
                )
        return super().misfit(model, batch)

    def attention(self, model: nn.Module, batch: Any) -> Attended:
        """Run the model with eager attention, and return the weights of self-attention.

        Raises:
            ModelError: the model has none, or an encoder-decoder's of several kinds.
        """
        if self._attention is not None:
            return super().attention(model, batch)
        with attention.returned(model):
            result = self.call(model, batch)
        return Attended(attention.weights(model, result), result)

    def distribution(self, result: Any, batch: Any) -> Outputs:
        """Read the model's outputs as its head defines them.

        Raises:
            UnknownDistributionError: transformers lists no head for this class, or the outputs do not fit it.
        """
        if self._output is not None:
            return super().distribution(result, batch)
        if self.head is None:
            raise UnknownDistributionError(
                f"what {self.served} predicts is unknown: transformers lists it neither for classification of "
                f"sequences, tokens, images or recordings, nor for question answering, nor as a masked, causal or "
                f"sequence to sequence language model. Load it with such a head (AutoModelForSequenceClassification, "
                f"...), or say what it predicts: wrap(model, output=lambda outputs: Categorical(logits=outputs.logits))"
            )
        return outputs.check(self.head.distribution(result, batch, lambda: self._valid_tokens(batch)))

    def predictions(self, result: Outputs) -> Sequence[str] | None:
        """The predicted labels as named in `config.id2label`, or the predicted token."""
        own = self.head if self._output is None else None
        return super().predictions(result) if own is None else own.predictions(result)

    def targets(self, batch: Any) -> Sequence[str] | None:
        """The labels as named in `config.id2label`."""
        return None if self.head is None else self.head.targets(batch)

    def valid(self, site: Site, batch: Any, value: Tensor) -> Bool[Tensor, "*positions"]:
        """Which positions are valid: by the attention mask, if the pattern has the axes batch and token.

        The tokens of a continuation are not valid. A decoder's positions, with the axes batch and target, are valid by
        its own mask, or all of them without one.

        Raises:
            BatchError: the mask does not fit the site.
        """
        pattern = site.gating()
        axis = "target" if "target" in pattern.positions else "token"
        mask = None
        if self._valid is None and {"batch", axis} <= set(pattern.positions):
            mask = self._maskable(batch) if axis == "token" else valid_targets(batch)
        if mask is None:
            return super().valid(site, batch, value)
        sizes = pattern.shape(value, site=site)
        others = {name: sizes[name] for name in pattern.positions if name not in ("batch", axis)}
        arrow = f"batch {axis} -> {' '.join(pattern.positions)}"
        spread = einops.repeat(mask.to(value.device), arrow, **others)
        return self._fit(spread, tuple(sizes[axis] for axis in pattern.positions), site, pattern)

    def names(self, site: Site, batch: Any) -> Sequence[Sequence[str]] | None:
        """The tokens of each example, or of its decoder; patches by row and column; None for other sites."""
        if self._names is None and site.pattern is not None and "patch" in site.pattern.positions:
            return self.patches.names(site, as_mapping(batch))
        target = site.pattern is not None and "target" in site.pattern.positions
        ids = as_mapping(batch).get("decoder_input_ids") if target else token_ids(batch)
        if (
            self._names is not None
            or ids is None
            or (site.pattern and "token" not in site.pattern.positions and not target)
        ):
            return super().names(site, batch)
        return [self.words.tokens(row) for row in ids.tolist()]

    def units(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Int[Tensor, "*positions"] | None:
        """With `units="words"`, the words that tokens are pieces of; without tokens each position is its own unit."""
        if not isinstance(self._units, str):
            return super().units(site, batch, values)
        positions = site.gating().positions
        ids = as_mapping(batch).get("decoder_input_ids") if "target" in positions else token_ids(batch)
        if ids is None or positions not in (("batch", "token"), ("batch", "target")):
            return None
        return torch.tensor([self.words.pieces(row) for row in ids.tolist()])

    def without_tokens(self, batch: Any, removed: Bool[Tensor, "batch token"]) -> Any | None:
        """The batch without some tokens; padding stays on its side. None for batches without token ids.

        Raises:
            BatchError: nothing would be left of an example.
        """
        return None if token_ids(batch) is None else without_tokens(batch, removed)

    def perturb(self, batch: Any, generator: Generator) -> Any | None:
        """Another input of the same shape and padding: valid tokens are permuted across the batch, special ones stay.

        None if that changes nothing, as for a batch of one token.
        """
        key = "inputs_embeds" if token_ids(batch) is None else "input_ids"
        tokens, mask = as_mapping(batch).get(key), valid_tokens(batch)
        if self._perturb is not None or mask is None or not isinstance(tokens, Tensor):
            return super().perturb(batch, generator)
        free = mask.to(tokens.device)
        if key == "input_ids":
            free = free & ~torch.isin(tokens, torch.tensor(sorted(self.words.special)).to(tokens))
        rows = tokens[free]
        varied = tokens.clone()
        varied[free] = rows[torch.randperm(len(rows), generator=generator).to(tokens.device)]
        if torch.equal(varied, tokens):
            varied[free] = rows.roll(1, 0)
        if torch.equal(varied, tokens):
            return None
        return varied if tokens is batch else nested.put(batch, (key,), varied)

    def _maskable(self, batch: Any) -> Bool[Tensor, "batch token"] | None:
        tokens = valid_tokens(batch)
        return tokens if tokens is None or self.head is None or self._output else self.head.masked(batch, tokens)

    def _valid_tokens(self, batch: Any) -> Bool[Tensor, "batch token"]:
        if self._valid is not None and self._takes_batch_only():
            return torch.as_tensor(self._valid(batch)).bool()
        mask = valid_tokens(batch)
        if mask is None:
            raise BatchError(
                f"it is unknown which tokens of the batch, {nested.describe(batch)}, are valid, and the task "
                f"{self.name!r} needs it. Give wrap(model, valid=lambda batch: batch[1] != 0)"
            )
        return mask


def _named(model: type[nn.Module]) -> set[str]:
    """The arguments that a class's forward names, and those of its base classes while they pass on `**kwargs`."""
    found: set[str] = set()
    for ancestor in model.__mro__:
        forward = vars(ancestor).get("forward")
        if forward is not None:
            parameters = inspect.signature(forward).parameters
            found |= set(parameters)
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return found


def _is_label(key: str) -> bool:
    """Whether an argument of forward serves the loss alone, by transformers' naming."""
    return "label" in key or key in ("start_positions", "end_positions")
