"""Batches of prompts and their continuations, for language models.

prompts = Prompts(maskhooks.wrap(model, tokenizer=tokenizer))
prompts(["The capital of France is"])                # the next token
prompts(["The capital of France is"], [" Paris"])    # these tokens
prompts.written(["The capital of France is"])        # the tokens that the model generates
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from maskhooks.errors import BatchError, SettingError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.preserved import preserved
from maskhooks.model.hooked import Hooked
from maskhooks.model.task import device_of, move
from maskhooks_transformers.decoding import start_token
from maskhooks_transformers.heads import Translation
from maskhooks_transformers.inputs import IGNORED
from maskhooks_transformers.task import TransformersTask

Ids = Sequence[int] | Tensor
Chat = Sequence[Mapping[str, Any]]


class Prompts:
    """Makes batches for a causal language model or an encoder-decoder.

    A prompt is a text, token ids, or a chat (messages with `role` and `content`), which the tokenizer's chat template
    turns into a text with the beginning of an answer. A continuation is a text or token ids; nothing is inserted after
    the prompt, so a text mostly begins with a space. For an encoder-decoder it is the target in the tokenizer's format,
    with its end token.

    Batches are padded on the right. `labels` holds the continuation, and -100 everywhere else.

    Args:
        hooked: the wrapped model. Texts need its tokenizer, saved with the model or given to `wrap`.
        max_length: the maximum number of tokens of a prompt with its continuation (for an encoder-decoder, of each).
            Longer prompts lose their first tokens, except a special one in front; for an encoder-decoder, their last.
            Default: nothing is cut.

    Raises:
        SettingError: the model does not generate text, or `max_length` is below 2.
    """

    def __init__(self, hooked: Hooked, *, max_length: int | None = None) -> None:
        task = hooked.task
        if not isinstance(task, TransformersTask) or not task.writes:
            raise SettingError(
                f"prompts are for causal language models and encoder-decoders of transformers, and "
                f"{type(hooked.model).__name__} is served by the task {task.name!r}. Load the model with "
                "AutoModelForCausalLM or AutoModelForSeq2SeqLM"
            )
        if max_length is not None and max_length < 2:
            raise SettingError(f"max_length is {max_length}, and a text needs at least 2 tokens. Raise it")
        self.hooked, self.words, self.max_length = hooked, task.words, max_length
        self.encodes = isinstance(task.head, Translation)

    def __call__(
        self, prompts: Sequence[str | Ids | Chat], continuations: Sequence[str | Ids] | Tensor | None = None
    ) -> dict[str, Tensor]:
        """Make a batch: `input_ids`, `attention_mask` and, with continuations, `labels`.

        Raises:
            BatchError: a prompt or continuation is empty or longer than the model allows, the numbers of continuations
                and prompts differ, a text has no tokenizer, or a chat has no template.
        """
        if not len(prompts) or (continuations is not None and len(continuations) != len(prompts)):
            count = "no" if continuations is None else len(continuations)
            raise BatchError(
                f"got {len(prompts)} prompts and {count} continuations. Give a list of prompts, and one continuation "
                "for each or none at all"
            )
        following = [None] * len(prompts) if continuations is None else continuations
        rows = [self._pair(number, *pair) for number, pair in enumerate(zip(prompts, following, strict=True))]
        starts, ends = [row[0] for row in rows], [row[1] for row in rows]
        if self.encodes:
            return self._source(starts) if continuations is None else {**self._source(starts), **self._target(ends)}
        batch = self._source([start + end for start, end in rows])
        if continuations is not None:
            labels = [[IGNORED] * len(start) + end for start, end in rows]
            batch["labels"] = _padded(labels, IGNORED)
        return batch

    def written(self, prompts: Sequence[str | Ids | Chat], **settings: Any) -> dict[str, Tensor]:
        """Make a batch of prompts with the continuations that the model generates; model and random state are kept.

        Args:
            settings: settings of transformers' `generate`, such as `max_new_tokens`. Default: greedy decoding.

        Raises:
            BatchError: as for a call.
        """
        model = self.hooked.model
        starts = [self._pair(number, prompt, None)[0] for number, prompt in enumerate(prompts)]
        batch = move(self._source(starts, left=not self.encodes), device_of(model))
        settings = {"do_sample": False, "pad_token_id": self._pad, **settings}
        with torch.no_grad(), frozen(model), preserved(model):
            found = cast(Any, model).generate(**batch, **settings)
        ids = getattr(found, "sequences", found)
        return self(starts, ids if self.encodes else ids[:, batch["input_ids"].shape[1] :])

    def _pair(self, number: int, prompt: Any, continuation: Any) -> tuple[list[int], list[int]]:
        """The token ids of a prompt and of its continuation."""
        start = self._source_ids(prompt) if self.encodes else self._opened(*self._text(prompt))
        end = [] if continuation is None else self._end(prompt, start, continuation)
        if not start or (continuation is not None and not end):
            what = "continuation" if start else "prompt"
            raise BatchError(f"{what} {number} is empty. Give at least one token, or leave the example out")
        start = self._cut(number, start, end)
        limit = getattr(getattr(self.words.config, "get_text_config", lambda: self.words.config)(), _LIMIT, None)
        for length in (len(start), len(end)) if self.encodes else (len(start) + len(end),):
            if isinstance(limit, int) and 0 < limit < length:
                raise BatchError(
                    f"prompt {number} has {len(start)} tokens and its continuation {len(end)}, and "
                    f"{type(self.hooked.model).__name__} has positions for {limit}. Shorten it, or cut its beginning: "
                    f"Prompts(hooked, max_length={limit})"
                )
        return start, end

    def _cut(self, number: int, start: list[int], end: list[int]) -> list[int]:
        if self.max_length is None:
            return start
        room = self.max_length - (0 if self.encodes else len(end))
        if room < 1 or len(end) > self.max_length:
            raise BatchError(
                f"continuation {number} has {len(end)} tokens, and max_length is {self.max_length}, so there is no "
                "room for its prompt. Raise max_length, or shorten the continuation"
            )
        if self.encodes:
            return start if len(start) <= room else [*start[: room - 1], start[-1]]
        first = start[:1] if len(start) > room > 1 and start[0] in self.words.special else []
        return first + start[len(start) - (room - len(first)) :] if len(start) > room else start

    # From texts to token ids

    def _text(self, prompt: Any) -> tuple[Any, bool]:
        """A prompt as text or token ids, and whether it still needs special tokens in front."""
        if isinstance(prompt, (str, Tensor)) or not len(prompt) or not isinstance(prompt[0], Mapping):
            return prompt, True
        tokenizer = self._tokenizer("a chat")
        if not getattr(tokenizer, "chat_template", None):
            raise BatchError(
                "a chat needs a tokenizer with a chat template, and this one has none. Set tokenizer.chat_template, "
                "or write the prompt as a text"
            )
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False), False

    def _opened(self, text: Any, special: bool = True) -> list[int]:
        """The token ids of a text that begins a sequence: special tokens before it, none after it."""
        if not isinstance(text, str):
            return _ids(text)
        bare = self._tokens(text, add_special_tokens=False)
        full = self._tokens(text) if special else bare
        ends = [place + len(bare) for place in range(len(full)) if full[place : place + len(bare)] == bare]
        return full[: ends[0]] if bare and ends else full

    def _source_ids(self, prompt: Any) -> list[int]:
        text, special = self._text(prompt)
        return self._tokens(text, add_special_tokens=special) if isinstance(text, str) else _ids(text)

    def _end(self, prompt: Any, start: list[int], continuation: Any) -> list[int]:
        if not isinstance(continuation, str):
            return self._ended(_ids(continuation))
        if not continuation:
            return []
        if self.encodes:
            return list(self._tokenizer("a text")(text_target=continuation)["input_ids"])
        text, special = self._text(prompt)
        if isinstance(text, str):  # tokenised together, as the model would read them, if that splits at the seam
            whole = self._opened(text + continuation, special)
            if whole[: len(start)] == start and len(whole) > len(start):
                return whole[len(start) :]
        return self._tokens(continuation, add_special_tokens=False)

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids from `generate` up to the end token, without padding and a decoder's first token."""
        if self.encodes and ids[:1] == [start_token(self.hooked.model)]:
            ids = ids[1:]
        config: Any = getattr(self.hooked.model, "generation_config", self.words.config)
        ending = getattr(config, "eos_token_id", None)
        endings = set(ending) if isinstance(ending, (list, tuple)) else {ending}
        ends = [place for place, index in enumerate(ids) if index in endings]
        if ends:
            return ids[: ends[0] + 1]
        while ids and ids[-1] == self._pad:
            ids = ids[:-1]
        return ids

    def _tokens(self, text: str, **settings: Any) -> list[int]:
        return list(self._tokenizer("a text")(text, **settings)["input_ids"])

    def _tokenizer(self, what: str) -> Any:
        if self.words.tokenizer is None:
            raise BatchError(
                f"{what} needs a tokenizer, and none was saved with the model. Give one, "
                "wrap(model, tokenizer=tokenizer), or give token ids"
            )
        return self.words.tokenizer

    # From token ids to tensors

    @property
    def _pad(self) -> int:
        """The padding id; any id will do, because nothing attends to it."""
        named = (getattr(self.words.tokenizer, "pad_token_id", None), getattr(self.words.config, "pad_token_id", None))
        return next((index for index in named if isinstance(index, int) and index >= 0), 0)

    def _source(self, rows: list[list[int]], *, left: bool = False) -> dict[str, Tensor]:
        ones = [[1] * len(row) for row in rows]
        return {"input_ids": _padded(rows, self._pad, left=left), "attention_mask": _padded(ones, 0, left=left)}

    def _target(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """The labels, and the decoder's input: the labels, shifted."""
        labels = _padded(rows, IGNORED)
        model: Any = self.hooked.model
        taken = model.prepare_decoder_input_ids_from_labels(labels=labels.to(device_of(model))).cpu()
        mask = (labels != IGNORED).long()
        return {"labels": labels, "decoder_input_ids": taken, "decoder_attention_mask": mask}


_LIMIT = "max_position_embeddings"


def _ids(given: Any) -> list[int]:
    return [int(index) for index in given]


def _padded(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    both = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, padding, strict=True)]
    return torch.tensor(both, dtype=torch.long)
