"""The outputs of transformers' task heads, as distributions and as words.

Distributions are computed in float32 and not validated, so that training can detect a NaN itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal

from maskhooks.errors import BatchError, UnknownDistributionError
from maskhooks.model import outputs as distributions
from maskhooks.model.outputs import Outputs, Positions
from maskhooks_transformers.inputs import IGNORED, as_mapping, labels, token_ids, valid_targets
from maskhooks_transformers.words import Words

PADDING_LOGIT = -1e4  # finite, since -inf gives NaN in differences; exp(-1e4) is 0
_ANSWERS = "question_answering_score"  # the output of models that choose an answer to a question about an image
Valid = Callable[[], Bool[Tensor, "batch token"]]


class Head(ABC):
    """The meaning of the outputs of one kind of model.

    Args:
        config: the model's configuration.
        words: the model's tokens.
    """

    name: str
    recipe = "language"  # the recipe that masks of such models are trained with by default

    def __init__(self, config: Any, words: Words) -> None:
        self.config = config
        self.words = words

    @abstractmethod
    def distribution(self, outputs: Any, batch: Any, valid: Valid) -> Outputs:
        """The prediction.

        Args:
            outputs: the model's outputs.
            batch: its batch, labels included.
            valid: returns which tokens are not padding.

        Raises:
            UnknownDistributionError: the outputs have no logits of this kind.
        """

    def predictions(self, result: Outputs) -> Sequence[str] | None:
        """The prediction in words, one text per example; None if there is no single one."""
        return distributions.predictions(result)

    def targets(self, batch: Any) -> Sequence[str] | None:
        """The labels in words, one text per example; None if the batch has none."""
        return None

    def masked(self, batch: Any, tokens: Bool[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
        """Which of the valid tokens may be masked; by default all."""
        return tokens

    def _word(self, label: Any) -> str:
        names: Mapping[int, str] = getattr(self.config, "id2label", None) or {}
        return names.get(int(label), str(int(label)))


class SequenceClassification(Head):
    """One label per example (Categorical), any of several (Bernoulli), or numbers (Normal of scale 1).

    `config.problem_type` says which; if it is not set, the rules of transformers' own losses apply: one output is a
    number, floating-point labels are multi-label, and anything else is single-label.
    """

    name = "sequence classification"

    def distribution(self, outputs: Any, batch: Any, valid: Valid) -> Outputs:
        logits = self._logits(outputs)
        problem = self._problem(logits.shape[-1], labels(batch))
        if problem == "regression":
            mean = logits.squeeze(-1) if logits.shape[-1] == 1 else logits
            return Normal(mean, torch.ones_like(mean), validate_args=False)
        if problem == "multi_label_classification":
            return Bernoulli(logits=logits, validate_args=False)
        return Categorical(logits=logits, validate_args=False)

    def predictions(self, result: Outputs) -> Sequence[str] | None:
        if isinstance(result, Categorical):
            return [self._word(label) for label in result.logits.argmax(-1)]
        if isinstance(result, Bernoulli):
            return self._several(result.probs)
        return super().predictions(result)

    def targets(self, batch: Any) -> Sequence[str] | None:
        given = labels(batch)
        if given is None:
            return None
        problem = self._problem(getattr(self.config, "num_labels", 2), given)
        if problem == "regression":
            return [" ".join(f"{number:g}" for number in row) for row in given.reshape(len(given), -1).tolist()]
        if problem == "multi_label_classification":
            return self._several(given)
        return [self._word(label) for label in given.flatten()]

    def _logits(self, outputs: Any) -> Tensor:
        return field(outputs, "logits", 0)

    def _several(self, probable: Tensor) -> list[str]:
        return [", ".join(self._word(i) for i in row.nonzero().flatten()) for row in probable > 0.5]

    def _problem(self, size: int, given: Tensor | None) -> str:
        problem = getattr(self.config, "problem_type", None)
        if problem is not None:
            return str(problem)
        if size == 1:
            return "regression"
        several = given is not None and given.is_floating_point() and given.dim() == 2
        return "multi_label_classification" if several else "single_label_classification"


class TokenClassification(Head):
    """One label at each valid token."""

    name = "token classification"

    def distribution(self, outputs: Any, batch: Any, valid: Valid) -> Outputs:
        logits = field(outputs, "logits", 0)
        chosen = places(logits, batch, valid())
        return Positions(Categorical(logits=logits, validate_args=False), chosen.to(logits.device))

    def targets(self, batch: Any) -> Sequence[str] | None:
        given = labels(batch)
        return None if given is None else [" ".join(self._word(i) for i in row[row != IGNORED]) for row in given]


class QuestionAnswering(Head):
    """Where the answer starts and ends, among the valid tokens; or which of the known answers it is."""

    name = "question answering"

    def distribution(self, outputs: Any, batch: Any, valid: Valid) -> Outputs:
        if isinstance(getattr(outputs, _ANSWERS, None), Tensor):
            return Categorical(logits=field(outputs, _ANSWERS, 0), validate_args=False)
        logits = {"start": field(outputs, "start_logits", 0), "end": field(outputs, "end_logits", 1)}
        padding = ~places(logits["start"], batch, valid()).to(logits["start"].device)
        return {
            name: Categorical(logits=part.masked_fill(padding, PADDING_LOGIT), validate_args=False)
            for name, part in logits.items()
        }

    def targets(self, batch: Any) -> Sequence[str] | None:
        ends = [as_mapping(batch).get(key) for key in ("start_positions", "end_positions")]
        if any(end is None for end in ends):
            return None
        return [
            f"start: {start}, end: {end}"
            for start, end in zip(*(torch.as_tensor(end).tolist() for end in ends), strict=True)
        ]


class MaskedLanguageModel(Head):
    """The token at each position that counts.

    Those are the positions with a label, else those with the mask token, else all valid ones. This is decided for each
    example alone, so the rest of the batch does not matter.
    """

    name = "masked language model"

    def distribution(self, outputs: Any, batch: Any, valid: Valid) -> Outputs:
        ids, given = token_ids(batch), labels(batch)
        chosen = valid()
        if ids is not None and self.words.mask_token is not None:
            chosen = _where_any(ids == self.words.mask_token, chosen)
        if given is not None and given.shape == chosen.shape:
            chosen = _where_any(given != IGNORED, chosen)
        return at_positions(field(outputs, "logits", 0), chosen)


class _Writer(Head):
    """A head that predicts tokens: one, or those at chosen positions."""

    def predictions(self, result: Outputs) -> Sequence[str] | None:
        if isinstance(result, Categorical):
            return self.words.tokens(result.logits.argmax(-1).tolist())
        if isinstance(result, Positions) and isinstance(result.distribution, Categorical):
            best = result.distribution.logits.argmax(-1)
            return [self.words.text(row[own].tolist()) for row, own in zip(best, result.chosen, strict=True)]
        return super().predictions(result)

    def targets(self, batch: Any) -> Sequence[str] | None:
        given = labels(batch)
        if given is None or given.dim() != 2:
            return None
        return [self.words.text(row[row != IGNORED].tolist()) for row in given]


class CausalLanguageModel(_Writer):
    """The tokens that count, each predicted from those before it.

    By default those with a label, in transformers' format: a copy of the token ids, with -100 for tokens that do not
    count. They are the continuation; the prompt before it may be masked. Without labels, the token after the last
    valid one counts. `positions` changes this: "last" is that token, labels or not; "all" is the tokens after each
    valid one but the last; a function of the batch returns the tokens, as bool (batch, token), after which the next
    one counts.
    """

    name = "causal language model"
    positions: str | Callable[[Any], Tensor] | None = None

    def distribution(self, outputs: Any, batch: Any, valid: Valid) -> Outputs:
        logits = field(outputs, "logits", 0)
        tokens = valid().to(logits.device)
        continued = self._continuation(batch)
        if callable(self.positions):
            return at_positions(logits, self._named(self.positions(batch), tokens))
        if self.positions == "all" or continued is not None:
            following = tokens if continued is None else continued.to(tokens.device)
            return at_positions(logits, tokens & nn.functional.pad(following[:, 1:], (0, 1), value=False))
        last = (tokens * torch.arange(tokens.shape[1], device=tokens.device)).argmax(1)
        rows = torch.arange(len(logits), device=logits.device)
        return Categorical(logits=logits[rows, last], validate_args=False)

    def masked(self, batch: Any, tokens: Bool[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
        """The tokens without a label that one with a label follows; all if there are no labels.

        Raises:
            BatchError: an example has none.
        """
        continued = self._continuation(batch)
        if continued is None:
            return tokens
        continued = continued.to(tokens.device)
        follows = continued.flip(1).cummax(1).values.flip(1)
        prompt = tokens & ~continued & follows
        if not bool(prompt.any(1).all()):
            number = int((~prompt.any(1)).nonzero()[0])
            raise BatchError(
                f"example {number} has no prompt: no token precedes those with a label. Give labels to the "
                f"continuation alone, and {IGNORED} to the prompt; or say which tokens count, labels or not: "
                "wrap(model, positions='last') or 'all'"
            )
        return prompt

    def _continuation(self, batch: Any) -> Bool[Tensor, "batch token"] | None:
        given, ids = labels(batch), as_mapping(batch).get("input_ids")
        if self.positions is not None or given is None or not isinstance(ids, Tensor) or given.shape != ids.shape:
            return None
        return given != IGNORED

    def _named(self, chosen: Any, tokens: Bool[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
        found = torch.as_tensor(chosen)
        if found.shape != tokens.shape or found.dtype != torch.bool:
            raise BatchError(
                f"positions= returned {found.dtype} of shape {list(found.shape)}, and the batch has tokens of shape "
                f"{list(tokens.shape)}. Return bool (batch, token): True at each token after which the next one counts"
            )
        return found.to(tokens.device) & tokens


class ImageClassification(SequenceClassification):
    """Classification of an image. Some models call their logits the last hidden state."""

    name = "image classification"
    recipe = "stable"

    def _logits(self, outputs: Any) -> Tensor:
        last = getattr(outputs, "last_hidden_state", None)
        scores = isinstance(last, Tensor) and last.dim() == 2 and not hasattr(outputs, "logits")
        return field(outputs, "last_hidden_state" if scores else "logits", 0)


class AudioClassification(SequenceClassification):
    """Classification of a recording."""

    name = "audio classification"
    recipe = "stable"


class Translation(_Writer):
    """The next token at each position of the target that counts: those with a label, else all valid ones."""

    name = "sequence to sequence language model"

    def distribution(self, outputs: Any, batch: Any, valid: Valid) -> Outputs:
        logits, given = field(outputs, "logits", 0), labels(batch)
        chosen = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        mask = as_mapping(batch).get("decoder_attention_mask")
        if isinstance(mask, Tensor) and mask.shape == chosen.shape:
            chosen = mask.to(chosen.device).bool()
        if given is not None and given.shape == chosen.shape:
            chosen = _where_any(given != IGNORED, chosen)
        return at_positions(logits, chosen)


# Model classes are listed in transformers' own tables; the first table with a class's name decides its head.
# Encoder-decoders come first, since they are also listed as masked language models.
_TABLES: dict[str, type[Head]] = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": Translation,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": SequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": TokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": QuestionAnswering,
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": MaskedLanguageModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": CausalLanguageModel,
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": ImageClassification,
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": AudioClassification,
}


def head_of(model: nn.Module, words: Words) -> Head | None:
    """The head of a model, by the name of its class or of a base class; None if none is known."""
    from transformers.models.auto import modeling_auto

    tables = {table: _names(getattr(modeling_auto, table, {})) for table in _TABLES}
    for ancestor in type(model).__mro__:
        for table, names in tables.items():
            if ancestor.__name__ in names:
                return _TABLES[table](model.config, words)
    return None


def field(outputs: Any, name: str, index: int) -> Float[Tensor, "..."]:
    """One part of a model's outputs in float32, by name or, with `return_dict=False`, by index.

    Raises:
        UnknownDistributionError: the outputs do not have it.
    """
    found = outputs[index] if isinstance(outputs, tuple) and index < len(outputs) else getattr(outputs, name, None)
    if not isinstance(found, Tensor):
        keys = ", ".join(map(str, outputs)) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise UnknownDistributionError(
            f"the model's outputs have no {name}, only: {keys}. Say what it predicts: "
            f"wrap(model, output=lambda outputs: torch.distributions.Categorical(logits=outputs.{name}))"
        )
    return found.float()


def places(
    logits: Tensor, batch: Any, tokens: Bool[Tensor, "batch token"]
) -> Bool[Tensor, "batch token"] | Bool[Tensor, "batch target"]:
    """Which positions of the logits are valid: those of the tokens, or of a decoder with other tokens."""
    ids = as_mapping(batch).get("decoder_input_ids")
    if not isinstance(ids, Tensor) or not ids.shape == logits.shape[:2] != tokens.shape:
        return tokens
    mask = valid_targets(batch)
    return torch.ones(ids.shape, dtype=torch.bool, device=ids.device) if mask is None else mask


def at_positions(logits: Float[Tensor, "batch token word"], chosen: Bool[Tensor, "batch token"]) -> Positions:
    """One Categorical at each chosen position; other logits are dropped, because a vocabulary is large."""
    chosen = chosen.to(logits.device)
    count = int(chosen.sum(1).max())
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    picked = logits.gather(1, order[..., None].expand(-1, -1, logits.shape[-1]))
    return Positions(Categorical(logits=picked, validate_args=False), chosen.gather(1, order))


def _where_any(wanted: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(wanted.any(1, keepdim=True).to(otherwise.device), wanted.to(otherwise.device), otherwise)


def _names(table: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    return {name for value in table.values() for name in ((value,) if isinstance(value, str) else value)}
