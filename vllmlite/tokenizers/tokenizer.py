"""Tokenizers: encoding, decoding, chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel

from vllmlite.chat.sources import DEFAULT, choose, read_templates
from vllmlite.chat.special_tokens import read_special_tokens
from vllmlite.errors import ModelError, ParameterError, not_installed
from vllmlite.signals import came_from_handler
from vllmlite.tokenizers.added_tokens import add_tokens
from vllmlite.tokenizers.gguf import gguf_tokenizer
from vllmlite.tokenizers.slow import SlowTokenizer
from vllmlite.weights.json_object import read_object
from vllmlite.weights.not_checkpoints import refuse_foreign_file

if TYPE_CHECKING:
    from vllmlite.chat.template import ChatTemplate
    from vllmlite.tokenizers.truncation import Truncation

MAX_IDS = 10_000_000
"""Ids must be below this; the largest known vocabularies have a quarter of a million."""
LONG_TEXT = 4096
"""Longer texts (in characters) are encoded with the GIL released."""
LEAST_TOKENS = 64
"""Minimum number of tokens of a usable tokenizer. One with fewer has only special tokens, since its vocabulary file was
missing."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""Form of a token that stands for one byte, in vocabularies with byte fallback."""


class Tokenizer:
    """A tokenizer (from ``tokenizer.json``, a GGUF file or transformers) with its configuration and chat templates."""

    def __init__(self, path: Path) -> None:
        """Read the tokenizer of directory ``path``, or of the GGUF file ``path``. Raises ModelError."""
        self._fast: FastTokenizer | SlowTokenizer
        if path.is_file():
            self._fast, self._config = gguf_tokenizer(path)
        else:
            self._config = read_object(path / "tokenizer_config.json", optional=True)
            self._fast = _load(path)
        self._path = path
        self.special_tokens = read_special_tokens(path, self._config)
        """Special tokens by name, and lists of unnamed ones; they are variables of every chat template."""
        if isinstance(self._fast, FastTokenizer):
            self._fast.no_truncation()
            self._fast.no_padding()
            if path.is_dir():
                add_tokens(self._fast, self._config, self.special_tokens, path / "tokenizer_config.json")
        self.decode(self.encode(""))  # fail now if the tokenizer does not work at all
        self.eos_token_id = self._special("eos_token")

    @property
    def fast(self) -> FastTokenizer | None:
        """The tokenizer as an object of the ``tokenizers`` library; None for a slow one of transformers."""
        return self._fast if isinstance(self._fast, FastTokenizer) else None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    @cached_property
    def max_token_length(self) -> int:
        """Number of characters of the longest token; a text of more than n times as many cannot fit into n tokens."""
        return max(map(len, self._fast.get_vocab(with_added_tokens=True)), default=1)

    def bad_word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of ``words``, at the start of a text and after a space."""
        found: list[list[int]] = []
        for word in words:
            for form in (word, " " + word.lstrip()):
                ids = self.encode(form, add_special_tokens=False)
                if ids and ids not in found:
                    found.append(ids)
        return found

    def encode(
        self, text: str, add_special_tokens: bool = True, truncation: Truncation | None = None
    ) -> list[int]:
        """Return the ids of ``text``, including the special tokens that the tokenizer adds, which ``truncation`` does
        not drop. Raises :class:`ParameterError` if ``text`` contains a lone surrogate."""
        try:
            ids = self._encoded(text, add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise ParameterError("text", text, "must not contain lone surrogates") from None
        except BaseException as error:
            raise _as_model_error(self._path, error) from None
        if truncation is None:
            return ids
        return truncation.of(ids, *(self._num_added if add_special_tokens else (0, 0)))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; an incomplete character at either end becomes U+FFFD."""
        try:
            return str(self._fast.decode(ids, skip_special_tokens=skip_special_tokens))
        except BaseException as error:
            raise _as_model_error(self._path, error) from None

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether tokens are bytes in GPT-2's alphabet, so that a text is the concatenation of its tokens' bytes."""
        return isinstance(self._fast.decoder, ByteLevel)

    def is_hidden(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Return whether decoding omits ``token_id``: a skipped special token, or an id without a token."""
        if skip_special_tokens and token_id in self._special_ids:
            return True
        return self._fast.id_to_token(token_id) is None

    def byte_of(self, token_id: int) -> int | None:
        """Return the byte of a byte-fallback token such as ``<0x0A>``; None for other tokens."""
        if not self._falls_back_to_bytes:
            return None
        match = BYTE_TOKEN.fullmatch(self._fast.id_to_token(token_id) or "")
        return int(match[1], 16) if match else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token in the middle of a text; they may be part of a character."""
        token = self._fast.id_to_token(token_id)
        if self.is_byte_level and token is not None:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:  # an added token, stored as text
                return token.encode()
        byte = self.byte_of(token_id)
        return self.token_text(token_id).encode() if byte is None else bytes((byte,))

    def shown_bytes(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """Return the bytes that each id adds to a byte-level text; empty for ids that decoding skips."""
        return self._shown_bytes[skip_special_tokens]

    def vocabulary(self, size: int) -> tuple[list[str], bool]:
        """Return the tokens of ids 0 to ``size`` - 1, and whether they are written in GPT-2's byte alphabet.

        Special and missing tokens are empty strings."""
        texts = [""] * size
        for text, token_id in self._fast.get_vocab(with_added_tokens=True).items():
            if token_id < size and token_id not in self._special_ids:
                texts[token_id] = text
        parts = (self._fast.decoder, self._fast.pre_tokenizer)
        return texts, any(part is not None and _has_part(part, "ByteLevel") for part in parts)

    def token_ids(self) -> dict[str, int]:
        """Return the ids of all tokens by their strings, special tokens included."""
        return dict(self._fast.get_vocab(with_added_tokens=True))

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise :class:`ParameterError` unless all ``ids`` are in the range of token ids (0 to 2**31 - 1)."""
        for token_id in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token_id < 2**31:
                raise ParameterError("tokens", token_id, "must be token ids: integers from 0 to 2**31 - 1")

    def token_string(self, token_id: int) -> str:
        """Return the vocabulary's string of a token, such as ``Ġdpkg`` or ``▁dpkg``; empty if there is no such
        token."""
        return self._fast.id_to_token(token_id) or ""

    def token_text(self, token_id: int) -> str:
        """Return the text of one token in the middle of a text, special tokens included; partial characters are
        U+FFFD."""
        if self.is_byte_level:
            return self.token_bytes(token_id).decode("utf-8", "replace")
        first, both = (self.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
        # Decoders may strip a space at the beginning of a text: decode the token twice and take the second one.
        return both[len(first) :] if both.startswith(first) else first

    @cached_property
    def word_id(self) -> int | None:
        """Return some token that is text, neither special nor a byte, and not only spaces; None if there is none."""
        for token_id in range(self.vocab_size):
            shown = not self.is_hidden(token_id, True) and self.byte_of(token_id) is None
            if shown and self.token_text(token_id).strip():
                return token_id
        return None

    def token_id(self, text: str) -> int | None:
        """Return the id of the token written ``text``, or None."""
        found: int | None = self._fast.token_to_id(text)
        return found

    def special_text(self, name: str) -> str:
        """Return the text of ``bos_token`` or another special token; empty if there is none."""
        text = self.special_tokens.get(name)
        return text if isinstance(text, str) else ""

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's default chat template, or None."""
        return self.chat_templates.get(DEFAULT)

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """The checkpoint's chat templates by name."""
        return read_templates(self._path, self._config)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return bool(self.chat_templates)

    def find_chat_template(self, wanted: str | None = None, *, with_tools: bool = False) -> ChatTemplate:
        """Return a chat template.

        ``wanted`` is the name of one of the checkpoint's templates or of a built-in one, or Jinja source; None selects
        the checkpoint's own, which may be another one ``with_tools``. Raises :class:`ParameterError`."""
        return self._template_of(
            choose(self.chat_templates, wanted, with_tools=with_tools, bos=self._added_bos)
        )

    def apply_chat_template(
        self,
        messages: Any,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_content_format: str = "auto",
        **variables: Any,
    ) -> str:
        """Return the prompt for ``messages`` (see :mod:`vllmlite.chat.messages`); :meth:`find_chat_template` chooses
        the template.

        ``continue_final_message`` leaves the last message open for the model to continue; ``variables`` are passed to
        the template. Raises :class:`ParameterError`."""
        from vllmlite.chat.template import PromptOptions

        options = PromptOptions(add_generation_prompt, continue_final_message, chat_template_content_format)
        template = self.find_chat_template(chat_template, with_tools=bool(tools))
        return template.prompt(messages, options, tools, variables)

    @cached_property
    def _shown_bytes(self) -> tuple[_ShownBytes, _ShownBytes]:
        return _ShownBytes(self, False), _ShownBytes(self, True)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._fast.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _falls_back_to_bytes(self) -> bool:
        return self._fast.decoder is not None and _has_part(self._fast.decoder, "ByteFallback")

    @cached_property
    def _template_of(self) -> Callable[[str], ChatTemplate]:
        """Cached function that returns the :class:`ChatTemplate` of a Jinja source."""
        from vllmlite.chat.template import ChatTemplate

        special = {"bos_token": "", "eos_token": "", **self.special_tokens}
        return lru_cache(maxsize=16)(lambda source: ChatTemplate(source, special))

    def _encoded(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > LONG_TEXT and not isinstance(self._fast, SlowTokenizer):
            # ``encode`` holds the GIL, so no other thread could run; the batch method releases it.
            (encoded,) = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoded.ids)
        return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)

    @cached_property
    def _num_added(self) -> tuple[int, int]:
        """Numbers of ids that the tokenizer adds before and after a text."""
        whole, bare = self.encode("a"), self.encode("a", add_special_tokens=False)
        spare = len(whole) - len(bare)
        before = next((n for n in range(spare + 1) if whole[n : n + len(bare)] == bare), 0)
        return before, spare - before

    @cached_property
    def _added_bos(self) -> str:
        """The bos token if the tokenizer begins every text with it, else ""."""
        bos = self.special_text("bos_token")
        return bos if bos and self.encode("")[:1] == [self.token_id(bos)] else ""

    def _special(self, name: str) -> int | None:
        text = self.special_text(name)
        try:
            return self._fast.token_to_id(text) if text else None
        except BaseException as error:
            raise _as_model_error(self._path, error) from None


class _ShownBytes(dict[int, bytes]):
    """Id → the bytes that it adds to a byte-level text, computed when they are first looked up."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens

    def __missing__(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        hidden = tokenizer.is_hidden(token_id, self._skip_special_tokens)
        found = self[token_id] = b"" if hidden else tokenizer.token_bytes(token_id)
        return found


def _load(path: Path) -> FastTokenizer | SlowTokenizer:
    file = path / "tokenizer.json"
    if file.is_file():
        _check_ids(file)
        try:
            return FastTokenizer.from_file(str(file))
        except BaseException as error:  # the library raises plain Exception
            refuse_foreign_file(file)
            raise _as_model_error(file, error) from None
    try:
        from transformers import AutoTokenizer  # SentencePiece's, and slow ones
    except ModuleNotFoundError as error:
        raise ModelError(f"{path}: no tokenizer.json, and {not_installed(str(error.name))}") from None
    try:
        loaded = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"{path}: no tokenizer.json, and transformers finds no tokenizer either: {error}"
        ) from None
    files = sorted(set(loaded.vocab_files_names.values()))
    # transformers makes an empty tokenizer of some families where there is no file to read.
    if len(loaded) < LEAST_TOKENS and files and not any((path / name).exists() for name in files):
        raise ModelError(f"{path}: has no tokenizer: none of {', '.join(files)}; name one with --tokenizer")
    if not getattr(loaded, "is_fast", False):
        return SlowTokenizer(loaded)
    fast: FastTokenizer = loaded.backend_tokenizer
    return fast


def _has_part(component: Any, kind: str) -> bool:
    """Return whether a decoder or pre-tokenizer is or contains a component of ``kind``; its pickled form is JSON."""
    return f'"type": "{kind}"' in json.dumps(json.loads(component.__getstate__()))


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's byte alphabet: printable Latin-1 characters stand for themselves, others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _check_ids(file: Path) -> None:
    """Raise ModelError for an id of :data:`MAX_IDS` or more: the library would allocate a table of that size."""
    if not re.search(rb":\s*\d{8}", file.read_bytes()):
        return
    content = read_object(file)
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    largest = max((i for i in ids if type(i) is int), default=0)
    if largest >= MAX_IDS:
        raise ModelError(f"{file}: has a token with id {largest}; accepted: ids below {MAX_IDS}")


def _as_model_error(path: Path, error: BaseException) -> BaseException:
    """Return a ModelError for an exception or panic of the library (a panic is a BaseException).

    KeyboardInterrupt and exceptions raised by signal handlers are returned unchanged."""
    if came_from_handler(error):
        return error
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return ModelError(f"{path}: not a usable tokenizer: {error}")
    return error
