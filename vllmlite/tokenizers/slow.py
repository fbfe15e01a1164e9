"""Tokenizers of transformers that have no ``tokenizers`` form, behind the part of that library's face that is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True, slots=True)
class SlowTokenizer:
    """A ``PreTrainedTokenizer`` as a ``tokenizers.Tokenizer``."""

    inner: Any
    decoder: None = None
    pre_tokenizer: None = None
    """Nothing that could be told apart."""

    def encode(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        """``ids`` of ``text``."""
        text.encode()  # half a surrogate pair is an error here as it is there
        return SimpleNamespace(ids=self.inner.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``."""
        text: str = self.inner.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Ids by token, added ones included."""
        vocab: dict[str, int] = self.inner.get_vocab()
        return vocab

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """How many ids there are."""
        return len(self.inner)

    def get_added_tokens_decoder(self) -> dict[int, SimpleNamespace]:
        """Added tokens by id, each with whether it is ``special``."""
        special = set(self.inner.all_special_ids)
        return {
            i: SimpleNamespace(special=i in special) for i in {*self.inner.added_tokens_decoder, *special}
        }

    def id_to_token(self, token_id: int) -> str | None:
        """The token with that id, if there is one."""
        try:
            token: str | None = self.inner.convert_ids_to_tokens(token_id)
        except (LookupError, ValueError):  # beyond the vocabulary, which each class tells in its own way
            return None
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of ``token``, if it is one."""
        return self.get_vocab().get(token)

    def no_truncation(self) -> None:
        """Encode texts whole, as it does."""

    def no_padding(self) -> None:
        """Add nothing, as it does."""
