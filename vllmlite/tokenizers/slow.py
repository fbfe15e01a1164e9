"""Adapter for transformers' slow tokenizers, with the subset of the ``tokenizers`` interface that is used here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True, slots=True)
class SlowTokenizer:
    """A ``PreTrainedTokenizer`` with the methods of a ``tokenizers.Tokenizer``."""

    inner: Any
    decoder: None = None
    pre_tokenizer: None = None
    """Always None, like the decoder: neither can be inspected."""

    def encode(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        """Encode ``text``; the ids are in the result's ``ids``."""
        text.encode()  # raises UnicodeEncodeError for a lone surrogate, as the library does
        return SimpleNamespace(ids=self.inner.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``."""
        text: str = self.inner.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Return ids by token, added tokens included."""
        vocab: dict[str, int] = self.inner.get_vocab()
        return vocab

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """Return the number of ids."""
        return len(self.inner)

    def get_added_tokens_decoder(self) -> dict[int, SimpleNamespace]:
        """Return added tokens by id, each with its ``special`` flag."""
        special = set(self.inner.all_special_ids)
        return {
            i: SimpleNamespace(special=i in special) for i in {*self.inner.added_tokens_decoder, *special}
        }

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token with that id, or None."""
        try:
            token: str | None = self.inner.convert_ids_to_tokens(token_id)
        except (LookupError, ValueError):  # id outside the vocabulary; the exception depends on the class
            return None
        return token

    def token_to_id(self, token: str) -> int | None:
        """Return the id of ``token``, or None."""
        return self.get_vocab().get(token)
