"""Words: what token ids are called, and which of them are special."""

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
        config: the model's configuration, which knows some special tokens, and where the model was loaded
            from.
        tokenizer: the user's. Default: the one saved where the model was loaded from, looked for when first
            needed, in the folder itself or among what is cached; without any, tokens are called by their ids.
    """

    def __init__(self, config: Any, tokenizer: Any = None) -> None:
        self.config = config
        self._given = tokenizer
        self._tokens: dict[int, str] = {}  # as asked for so far, at most a vocabulary

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, or None. Nothing is downloaded, and no code of a model's author is run."""
        if self._given is not None:
            return self._given
        place = getattr(self.config, "_name_or_path", "")
        if not place:
            return None
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):  # how transformers says that there is none
            return None
        except Exception as error:  # the files may hold anything; names are a courtesy, and ids do as well
            warnings.warn(
                f"the tokenizer beside the model in {place} cannot be loaded ({type(error).__name__}: {error}), so "
                "that tokens are called by their ids. Give it: wrap(model, tokenizer=tokenizer)",
                MaskhooksWarning,
                stacklevel=2,
            )
            return None
        # Where no tokenizer was saved, transformers makes one up that has special tokens only.
        return found if len(found) > len(found.all_special_ids) else None

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Ids as the tokenizer's tokens, word pieces as they are; an id without a token as its number."""
        if self.tokenizer is None:
            return [str(index) for index in ids]
        new = [index for index in set(ids) if index not in self._tokens]
        if new:
            found = self.tokenizer.convert_ids_to_tokens(new)
            named = zip(new, found, strict=True)
            self._tokens.update({index: str(index) if token is None else str(token) for index, token in named})
        return [self._tokens[index] for index in ids]

    def pieces(self, ids: Sequence[int]) -> list[int]:
        """For each id the number of the word that its token is a piece of.

        Raises:
            SettingError: no tokenizer is known.
        """
        if self.tokenizer is None:
            raise SettingError(
                "which tokens are pieces of one word is known by the tokenizer, and none was found beside the model. "
                "Give it: wrap(model, tokenizer=tokenizer, units='words')"
            )
        return words(self.tokens(ids), marks_word_starts=self._starts_marked)

    @functools.cached_property
    def _starts_marked(self) -> bool:
        return any(token.startswith(("Ġ", "▁")) for token in self.tokenizer.tokenize("a a"))

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens too; without a tokenizer the ids themselves."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    @property
    def mask_token(self) -> int | None:
        """The id of the mask token, where there is one and it is known."""
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
