"""Incremental detokenization: the text of a growing sequence of ids, and stop strings in it.

The text equals what the tokenizer makes of all ids at once, however many arrive at a time. A token may be a part of a
character, and a decoder with byte fallback (SentencePiece's) reads a run of byte tokens as UTF-8 only if the whole run
is valid; otherwise each byte becomes U+FFFD. So a character, or such a run, is added to the text once it is complete.
"""

from __future__ import annotations

from codecs import getincrementaldecoder, utf_8_decode
from collections.abc import Sequence

from vllmlite.tokenizers.tokenizer import Tokenizer

CONTEXT_TOKENS = 6
"""Number of prompt tokens that are decoded with the output, so that the space between them is right."""
MAX_CHARACTER_BYTES = 4
"""Length of the longest character in UTF-8."""
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of one growing sequence of ids, in whole characters; the part before a possible stop string is released."""

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
        """Start after ``prompt_ids``. ``stop`` strings are searched for from the ``min_tokens``-th id on."""
        self.text = ""
        self.num_released = 0
        """Number of characters that are released; later ones may still become part of a stop string."""
        decoder = _ByteLevelDecoder if tokenizer.is_byte_level else _TextDecoder
        self._decoder = decoder(tokenizer, prompt_ids, skip_special_tokens)
        self._num_ids = 0
        self._stop = list(stop)
        self._include_stop = include_stop
        self._hold_back = max((len(s) for s in self._stop), default=1) - 1 if not include_stop else 0
        self._min_tokens = min_tokens

    def extend(self, token_ids: Sequence[int], offsets: list[int] | None = None) -> tuple[int, str | None]:
        """Add ids, up to the first that completes a stop string, at which ``text`` is cut.

        Returns how many were added, and the stop string, if any. Appends the :attr:`position` of each to ``offsets``.
        """
        if not self._stop and offsets is None:
            self.text += self._decoder.feed(token_ids)
            self.num_released = len(self.text)
            return len(token_ids), None
        for count, token_id in enumerate(token_ids, start=1):
            if offsets is not None:
                offsets.append(self.position)
            self._num_ids += 1
            stop = self._add(self._decoder.feed((token_id,)))
            if stop is not None:
                return count, stop
        return len(token_ids), None

    def finish(self) -> str | None:
        """Release all text, an incomplete character as U+FFFD. Returns the stop string, if any, that this completes."""
        stop = self._add(self._decoder.finish())
        self.num_released = len(self.text)
        return stop

    @property
    def position(self) -> int:
        """Index of the next id's first character: the number of whole characters so far, released or not."""
        return len(self.text) + self._decoder.num_held

    def _add(self, new: str) -> str | None:
        """Append ``new`` to the text; returns the stop string that this completes, at which the text is cut."""
        start = len(self.text)
        self.text += new
        if new and self._stop and self._num_ids >= self._min_tokens:
            found = []
            for stop in self._stop:
                at = self.text.find(stop, max(0, start - len(stop) + 1))
                if at >= 0:
                    found.append((at, stop))
            if found:
                at, stop = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
                self.text = self.text[: at + len(stop) if self._include_stop else at]
                self.num_released = len(self.text)
                return stop
        self.num_released = max(len(self.text) - self._hold_back, 0)
        return None


class _ByteLevelDecoder:
    """Decodes tokens that are bytes of UTF-8 text, one after another."""

    num_held = 0
    """Number of whole characters that are not in the text yet: always 0 here."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special: bool) -> None:
        """Start after the prompt, which may end in the middle of a character."""
        self._bytes_of = tokenizer.shown_bytes(skip_special)
        self._incomplete = b""
        """First bytes of a character whose other bytes have not arrived."""
        self._prompt_is_open = False
        end = b""
        for token_id in reversed(prompt_ids):
            end = self._bytes_of[token_id] + end
            if len(end) >= MAX_CHARACTER_BYTES:
                break
        self._incomplete = end[utf_8_decode(end, "replace", False)[1] :]
        self._prompt_is_open = bool(self._incomplete)

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the characters that ``token_ids`` complete."""
        data = self._incomplete + b"".join([self._bytes_of[token_id] for token_id in token_ids])
        text, used = utf_8_decode(data, "replace", False)
        self._incomplete = data[used:]
        return self._after_prompt(text) if self._prompt_is_open else text

    def finish(self) -> str:
        """Return U+FFFD if the output ends in the middle of a character."""
        text = self._incomplete.decode(errors="replace")
        self._incomplete = b""
        return self._after_prompt(text) if self._prompt_is_open else text

    def _after_prompt(self, text: str) -> str:
        """Return ``text`` without the U+FFFD of the prompt's last character, which is part of the prompt's text."""
        if text:
            self._prompt_is_open = False
        return text.removeprefix(REPLACEMENT)


class _TextDecoder:
    """Decodes tokens of any other kind: decodes the new tokens after a few tokens of context, and removes the context's
    text."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special: bool) -> None:
        """Start after ``prompt_ids``.

        The context consists of the prompt's last tokens before the byte tokens at its end, and of the bytes of an
        incomplete character, which the output may complete. The bytes of whole characters are left out, since they
        would join a run of bytes in the output. Hidden ids are left out too, since the tokenizer skips them."""
        self.num_held = 0
        """Number of complete characters at the end of the text whose run of byte tokens may continue."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = getincrementaldecoder("utf-8")("replace")
        run: list[int] = []
        before: list[int] = []
        for token_id in reversed(prompt_ids):
            if tokenizer.is_hidden(token_id, skip_special):
                continue
            is_in_run = not before and tokenizer.byte_of(token_id) is not None
            (run if is_in_run else before).append(token_id)
            if len(before) == CONTEXT_TOKENS:
                break
        before.reverse()
        run.reverse()
        self._utf8.decode(
            bytes(byte for token_id in run if (byte := tokenizer.byte_of(token_id)) is not None)
        )
        self._num_open = len(self._utf8.getstate()[0])
        if not before and len(run) > self._num_open and tokenizer.word_id is not None:
            before = [tokenizer.word_id]  # the output does not begin the text: decoders strip spaces there
        self._ids = [*before, *run[len(run) - self._num_open :]]
        self._read = len(before)
        """Number of ids whose text has been returned; they are the context of later ones."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that ``token_ids`` complete."""
        return "".join([self._feed(token_id) for token_id in token_ids])

    def _feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        if self._tokenizer.is_hidden(token_id, self._skip_special):
            return ""
        byte = self._tokenizer.byte_of(token_id)
        if byte is not None:
            self.num_held += len(self._utf8.decode(bytes((byte,))))
            return ""
        before, after = self._texts()
        whole = after.rstrip(REPLACEMENT)
        self.num_held = max(len(whole) - len(before), 0)
        if len(after) <= len(before) or len(whole) < len(after):
            return ""
        return self._give(before, after)

    def finish(self) -> str:
        """Return the text that has not been returned yet."""
        return self._give(*self._texts())

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        context = decode(self._ids[: self._read], self._skip_special) if self._read else ""
        return context, decode(self._ids, self._skip_special)

    def _give(self, before: str, after: str) -> str:
        new = after[len(before) :]
        if self._num_open and new.startswith(
            REPLACEMENT * self._num_open
        ):  # the prompt's own text shows these
            new = new[self._num_open :]
        self._num_open = self.num_held = 0
        self._utf8.reset()
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return new
