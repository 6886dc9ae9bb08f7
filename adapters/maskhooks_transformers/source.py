"""The source of Hugging Face models and their tokenizers, from a local folder or the hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from maskhooks.data.records import Label, Record
from maskhooks.errors import (
    BatchError,
    CorruptFileError,
    MissingExtraError,
    ModelError,
    SettingError,
    StorageError,
    close_matches,
)
from maskhooks.model.source import Opened, Source
from maskhooks.model.wrapping import wrap
from maskhooks_transformers.prompts import Prompts
from maskhooks_transformers.task import TransformersTask


class TransformersSource(Source):
    """Loads a Hugging Face model, as the class that its configuration names, in float32, and its tokenizer."""

    form = "a folder or hub id of a transformers model"
    _id = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

    def claims(self, model: str) -> bool:
        path = Path(model)
        return (path / "config.json").is_file() or (self._id.fullmatch(model) is not None and not path.exists())

    def open(self, model: str, *, max_length: int = 128) -> Opened:
        """Load the model in eval mode, with its tokenizer.

        Raises:
            MissingExtraError: transformers is not installed.
            StorageError: there is no such model, or its files cannot be read.
            ModelError: the configuration names no class of transformers.
            SettingError: `max_length` is below 2.
        """
        try:
            import transformers
        except ImportError as error:
            raise MissingExtraError("transformers", "transformers", f"The model {model!r}") from error
        if max_length < 2:
            raise SettingError(f"max_length is {max_length}, and a text needs at least 2 tokens. Raise it")
        with _quiet(transformers), _readable(model):
            config = transformers.AutoConfig.from_pretrained(model)
            network = _class(transformers, config, model).from_pretrained(model, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        # If no tokenizer was saved, transformers makes one with special tokens only.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise CorruptFileError(
                f"{model} holds no tokenizer, so texts cannot be read. Save it with the model: "
                "tokenizer.save_pretrained(folder)",
                path=model,
            )
        _pad(network, tokenizer, model)
        hooked, room = wrap(network.eval(), tokenizer=tokenizer), _room(tokenizer, network.config, max_length)
        if isinstance(hooked.task, TransformersTask) and hooked.task.writes:
            return Opened(hooked, Continued(Prompts(hooked, max_length=room)))
        return Opened(hooked, Batches(tokenizer, network.config, room))


class Batches:
    """Makes batches of records: tokens, attention mask and, for a text classifier, labels.

    Args:
        tokenizer: the model's tokenizer.
        config: the model's configuration.
        max_length: the maximum number of tokens of a text, or of a pair together.
    """

    def __init__(self, tokenizer: Any, config: Any, max_length: int) -> None:
        self.tokenizer, self.config, self.max_length = tokenizer, config, max_length

    def __call__(self, records: Sequence[Record]) -> Any:
        """A `BatchEncoding`.

        Raises:
            BatchError: the model does not have a label.
        """
        seconds = [record.text_pair for record in records if record.text_pair is not None]
        batch = self.tokenizer(
            [record.text for record in records],
            seconds or None,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        labels = [record.label for record in records if record.label is not None]
        if len(labels) == len(records) and "ForSequenceClassification" in str(self.config.architectures):
            batch["labels"] = torch.tensor([self._number(label) for label in labels])
        return batch

    def _number(self, label: Label) -> int | float:
        """The model's number of a label."""
        if not isinstance(label, str):
            return label
        known = {str(name): number for name, number in self.config.label2id.items()}
        if label not in known:
            likely = close_matches(label, known)
            raise BatchError(
                f"the model has no label {label!r}; it has {', '.join(known)}."
                + (f" Did you mean {likely[0]!r}?" if likely else " Name another column with --label-column.")
            )
        return int(known[label])


class Continued:
    """Makes batches of records for a model that generates text: second texts continue the first.

    Args:
        prompts: makes the model's batches.
    """

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts

    def __call__(self, records: Sequence[Record]) -> Any:
        """A batch of prompts; all of them have continuations, or none.

        Raises:
            BatchError: a text has no tokens.
        """
        seconds = [record.text_pair for record in records if record.text_pair is not None]
        return self.prompts([record.text for record in records], seconds or None)


def _class(transformers: Any, config: Any, model: str) -> Any:
    """The class that a configuration names, such as `BertForSequenceClassification`."""
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        what = (
            f"names {names[0]}, which transformers {transformers.__version__} does not have" if names else "names none"
        )
        raise ModelError(
            f"the class of {model} is unknown: its config.json {what}. Add it under "
            "'architectures', as in ['BertForSequenceClassification'], or load the model in a function "
            "and give package.module:factory."
        )
    return found


def _pad(network: Any, tokenizer: Any, model: str) -> None:
    """Pad with the end-of-text token if there is no padding token, as in GPT-2."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {model} has neither a padding token nor one that ends a text. Set one.")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(network.config, "pad_token_id", None) is None:
        network.config.pad_token_id = tokenizer.pad_token_id


def _room(tokenizer: Any, config: Any, wanted: int) -> int:
    """The maximum number of tokens: as wanted, but at most the model's number of positions."""
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    return min([wanted, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])


@contextlib.contextmanager
def _readable(model: str) -> Iterator[None]:
    """Turn the errors of transformers about files and the hub into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = str(error).strip().split("\n")[0].rstrip(".")
        raise StorageError(
            f"the model {model!r} cannot be loaded: {why}. Give a folder that save_pretrained wrote (with "
            "config.json, weights and tokenizer), or the id of a model on the hub.",
            path=model,
        ) from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the log messages and progress bars of transformers."""
    logging = transformers.utils.logging
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
