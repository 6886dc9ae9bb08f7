"""The tokens behind token ids, and which of them are special."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

from maskhooks.errors import MaskhooksWarning, SettingError
from maskhooks.explanations.tokens import words


class Words:
    """The tokens of one model.

    Args:
        config: the model's configuration, which names some special tokens and where the model was loaded from.
        tokenizer: the user's tokenizer. Default: the one saved with the model, in its folder or the local cache,
            loaded when first needed; without any, ids serve as tokens.
    """

    def __init__(self, config: Any, tokenizer: Any = None) -> None:
        self.config = config
        self._given = tokenizer
        self._tokens: dict[int, str] = {}  # filled on demand

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, or None. Nothing is downloaded, and no remote code is run."""
        if self._given is not None:
            return self._given
        place = getattr(self.config, "_name_or_path", "")
        if not place:
            return None
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):  # raised by transformers if there is none
            return None
        except Exception as error:  # the files may hold anything; names are optional, and ids will do
            warnings.warn(
                f"the tokenizer saved with the model in {place} cannot be loaded ({type(error).__name__}: {error}), so "
                "tokens are shown as ids. Give it: wrap(model, tokenizer=tokenizer)",
                MaskhooksWarning,
                stacklevel=2,
            )
            return None
        # If no tokenizer was saved, transformers makes one with special tokens only.
        return found if len(found) > len(found.all_special_ids) else None

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokenizer's tokens of these ids, word pieces unchanged; an id without a token as a number."""
        if self.tokenizer is None:
            return [str(index) for index in ids]
        new = [index for index in set(ids) if index not in self._tokens]
        if new:
            found = self.tokenizer.convert_ids_to_tokens(new)
            named = zip(new, found, strict=True)
            self._tokens.update({index: str(index) if token is None else str(token) for index, token in named})
        return [self._tokens[index] for index in ids]

    def pieces(self, ids: Sequence[int]) -> list[int]:
        """The index of the word that each id's token is a piece of.

        Raises:
            SettingError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise SettingError(
                "units='words' needs a tokenizer, and none was saved with the model. "
                "Give it: wrap(model, tokenizer=tokenizer, units='words')"
            )
        return words(self.tokens(ids), marks_word_starts=self._starts_marked)

    @functools.cached_property
    def _starts_marked(self) -> bool:
        return any(token.startswith(("Ġ", "▁")) for token in self.tokenizer.tokenize("a a"))

    def text(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens included; the ids themselves without a tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    @property
    def mask_token(self) -> int | None:
        """The id of the mask token, if one is known."""
        found = getattr(self.tokenizer, "mask_token_id", None)
        return found if found is not None else getattr(self.config, "mask_token_id", None)

    @property
    def special(self) -> set[int]:
        """The ids of special tokens: the tokenizer's, and every `..._token_id` of the configuration."""
        found: list[Any] = list(getattr(self.tokenizer, "all_special_ids", []))
        for key, value in vars(self.config).items():
            if key.endswith("_token_id"):
                found += value if isinstance(value, (list, tuple)) else [value]
        return {index for index in found if isinstance(index, int)}
