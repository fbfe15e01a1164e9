"""Text to ids and back: encoding, chat templates, incremental detokenisation, stop strings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel

from vllmlite.errors import ModelError, ParameterError
from vllmlite.gguf_tokenizer import gguf_tokenizer
from vllmlite.slow_tokenizer import SlowTokenizer
from vllmlite.weights.json_object import read_object

if TYPE_CHECKING:
    from jinja2 import Template

MAX_IDS = 10_000_000
"""Ids are below this; the largest vocabularies have a quarter of a million."""
CONTEXT_TOKENS = 6
"""Prompt tokens decoded along with the output, so that spacing across the seam is right."""


class Tokenizer:
    """A tokenizer (``tokenizer.json``, a GGUF file's, or transformers') with its configuration and chat template."""

    def __init__(self, path: Path) -> None:
        """Read ``tokenizer.json`` and ``tokenizer_config.json`` of directory ``path``, or what the GGUF file ``path``
        has in their place. Raises ModelError."""
        self._template_file = path / "chat_template.jinja"
        self._fast: FastTokenizer | SlowTokenizer
        if path.is_file():
            self._fast, self._config = gguf_tokenizer(path)
        else:
            self._config = read_object(path / "tokenizer_config.json", optional=True)
            self._fast = _load(path)
        self._path = path
        self._fast.no_truncation()
        self._fast.no_padding()
        self.decode(self.encode(""))  # what cannot work at all is found out now
        self.eos_token_id = self._special("eos_token")

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens included."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    @cached_property
    def max_token_length(self) -> int:
        """Characters of the longest token: no text of more than n times as many fits into n tokens."""
        return max(map(len, self._fast.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``, with what the tokenizer adds of itself (say, a beginning-of-text id).

        Raises :class:`ParameterError` if ``text`` is not Unicode (it holds half a surrogate pair)."""
        try:
            return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)
        except (TypeError, UnicodeEncodeError):
            raise ParameterError("text", text, "must be Unicode without halves of surrogate pairs") from None
        except BaseException as error:
            raise _told(self._path, error) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; half a character at either end becomes U+FFFD."""
        try:
            return str(self._fast.decode(ids, skip_special_tokens=skip_special_tokens))
        except BaseException as error:
            raise _told(self._path, error) from None

    @cached_property
    def is_additive(self) -> bool:
        """Whether the text of ids is the texts of its parts one after another, where these are whole characters."""
        return isinstance(self._fast.decoder, ByteLevel)

    def vocabulary(self, size: int) -> tuple[list[str], bool]:
        """Tokens of ids 0 to ``size`` - 1 as the tokenizer writes them, special and missing ones empty; whether that is
        byte by byte in GPT-2's alphabet."""
        texts = [""] * size
        special = {i for i, token in self._fast.get_added_tokens_decoder().items() if token.special}
        for text, token_id in self._fast.get_vocab(with_added_tokens=True).items():
            if token_id < size and token_id not in special:
                texts[token_id] = text
        parts = (self._fast.decoder, self._fast.pre_tokenizer)
        return texts, any(part is not None and _is_byte_level(part) for part in parts)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise :class:`ParameterError` unless all of ``ids`` can be ids."""
        for token_id in ids:
            if not 0 <= token_id < 2**31:
                raise ParameterError("tokens", token_id, "must be token ids: whole numbers from 0")

    def token_text(self, token_id: int) -> str:
        """Text of one id alone, special tokens included."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written ``text``; None if there is none."""
        found: int | None = self._fast.token_to_id(text)
        return found

    def special_text(self, name: str) -> str:
        """The text of ``bos_token`` or another special token; empty if there is none."""
        return self._config_text(name)

    @property
    def chat_template(self) -> str | None:
        """The chat template that the checkpoint brings."""
        return self._chat_template

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint brings a chat template."""
        return self._chat_template is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for ``messages`` (each with ``role`` and ``content``), by Jinja in its sandbox.

        ``continue_final_message`` leaves the last message open. Raises ParameterError on unusable messages."""
        source = chat_template or self._chat_template
        if source is None:
            raise ParameterError(
                "messages", messages, "the model has no chat template: give one, or a plain prompt"
            )
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise ParameterError("messages", message, "must be mappings with a role and content")
        if not messages:
            raise ParameterError("messages", messages, "must hold at least one message")
        if continue_final_message and add_generation_prompt:
            raise ParameterError("continue_final_message", True, "goes with add_generation_prompt=False")
        variables = {name: self._config_text(name) for name in ("bos_token", "eos_token")} | variables
        variables |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        text = _render(source, variables)
        if continue_final_message:
            final = str(messages[-1].get("content") or "").strip()
            end = text.rfind(final)
            if end < 0:
                raise ParameterError(
                    "continue_final_message", True, "the chat template does not repeat that message"
                )
            text = text[: end + len(final)]
        return text

    @cached_property
    def _chat_template(self) -> str | None:
        if self._template_file.is_file():
            try:
                return self._template_file.read_text(encoding="utf-8")
            except ValueError as error:
                raise ModelError(f"{self._template_file}: is not UTF-8: {error}") from None
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several named templates, as some checkpoints have
            named = [
                entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"
            ]
            template = named[0].get("template") if named else None
        return template if isinstance(template, str) else None

    def _config_text(self, name: str) -> str:
        token = self._config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        return token if isinstance(token, str) else ""

    def _special(self, name: str) -> int | None:
        text = self._config_text(name)
        try:
            return self._fast.token_to_id(text) if text else None
        except BaseException as error:
            raise _told(self._path, error) from None


class Detokenizer:
    """Text of one growing sequence of ids, released only in whole characters and clear of stop strings."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """Start after ``prompt_ids``; ``stop`` strings count once ``min_tokens`` ids have come."""
        self.text = ""
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._num_context = len(self._ids)
        self._skip_special = skip_special_tokens
        self._prefix = 0
        self._read = len(self._ids)
        self._stop = list(stop)
        self._include_stop = include_stop
        self._hold_back = max((len(s) for s in self._stop), default=1) - 1 if not include_stop else 0
        self._min_tokens = min_tokens
        self._sent = 0

    def extend(self, token_ids: Sequence[int]) -> tuple[int, str | None]:
        """Take in ids, up to one that completes a stop string (``text`` is cut accordingly).

        Returns how many were taken in, and the stop string, if any."""
        at_once = 1 if self._stop else len(token_ids)
        for start in range(0, len(token_ids), at_once or 1):
            self._ids += token_ids[start : start + at_once]
            stop = self._release()
            if stop is not None:
                return start + at_once, stop
        return len(token_ids), None

    def _release(self) -> str | None:
        """Add the text of the ids that have come, if it is whole characters; returns a stop string that ends it."""
        before = self._decode(self._ids[self._prefix : self._read]) if self._prefix < self._read else ""
        after = self._decode(self._ids[self._prefix :])
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return None
        self._prefix, self._read = self._read, len(self._ids)
        if self._tokenizer.is_additive:
            self._prefix = self._read
        return self._add(after[len(before) :])

    def finish(self) -> str | None:
        """Release what was held back, an incomplete character as U+FFFD; may complete a stop string too."""
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        self._prefix = self._read = len(self._ids)
        stopped = self._add(after[len(before) :])
        self._hold_back = 0
        return stopped

    @property
    def released_text(self) -> str:
        """The text so far, without an end that may yet become a stop string."""
        return self.text[: max(len(self.text) - self._hold_back, 0)] if self._hold_back else self.text

    def delta(self) -> str:
        """The part of :attr:`released_text` that is new since the last call."""
        text = self.released_text
        start, self._sent = self._sent, max(len(text), self._sent)
        return text[start:]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)

    def _add(self, new: str) -> str | None:
        start = len(self.text)
        self.text += new
        if not self._stop or len(self._ids) - self._num_context <= self._min_tokens - 1:
            return None
        found = []
        for stop in self._stop:
            at = self.text.find(stop, max(0, start - len(stop) + 1))
            if at >= 0:
                found.append((at, stop))
        if not found:
            return None
        at, stop = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        self._hold_back = 0
        return stop


def _load(path: Path) -> FastTokenizer | SlowTokenizer:
    file = path / "tokenizer.json"
    if file.is_file():
        _check_ids(file)
        try:
            return FastTokenizer.from_file(str(file))
        except BaseException as error:  # the library raises plain Exception
            raise _told(file, error) from None
    from transformers import (
        AutoTokenizer,  # only for checkpoints without a tokenizer.json: SentencePiece's, slow ones
    )

    try:
        loaded = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"{path}: no tokenizer.json, and transformers finds no tokenizer either: {error}"
        ) from None
    if not getattr(loaded, "is_fast", False):
        return SlowTokenizer(loaded)
    fast: FastTokenizer = loaded.backend_tokenizer
    return fast


def _is_byte_level(part: Any) -> bool:
    """Whether a decoder or pre-tokenizer, or one in it, is ByteLevel: what it is pickled as is its JSON."""
    return '"type": "ByteLevel"' in json.dumps(json.loads(part.__getstate__()))


def _check_ids(file: Path) -> None:
    """ModelError for an id from :data:`MAX_IDS` up, before the library makes a table with a place for each."""
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


def _told(path: Path, error: BaseException) -> BaseException:
    """An error of the library's, as ours. Where it panics, that is no Exception; what is neither stays itself."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return ModelError(f"{path}: not a usable tokenizer: {error}")
    return error


class _Refusal(Exception):
    """A chat template called ``raise_exception``."""


@lru_cache(maxsize=32)
def _compile(source: str) -> Template:
    """A chat template with what transformers offers templates, in Jinja's immutable sandbox."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise _Refusal(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    def strftime_now(form: str) -> str:
        import time

        return time.strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)


def _render(source: str, variables: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return _compile(source).render(variables)
    except _Refusal as refusal:
        raise ParameterError("messages", variables["messages"], str(refusal)) from None
    except (
        TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        raise ParameterError(
            "messages", variables["messages"], f"the chat template refuses them: {error}"
        ) from None
