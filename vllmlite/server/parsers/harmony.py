"""The format of gpt-oss (OpenAI's harmony): messages on channels for reasoning, tool calls and the answer.

``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
<|message|>{…}<|call|>``, or ``<|channel|>final<|message|>…``. Reasoning and calls share one syntax, so one parser
handles both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vllmlite.server.parsers.parts import CallArguments, CallBegin, Content, Part, Reasoning, merged, split_at

MARK = "<|"
START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START, CHANNEL)
"""Markers that end a message; START and CHANNEL also begin the next one."""
MAX_HEADER = 512
_ANALYSIS = re.compile(r"<\|channel\|>\s*analysis\b")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")


class Harmony:
    """Parser of gpt-oss's answers, in OpenAI's Harmony format. Text outside messages counts as content."""

    def __init__(self) -> None:
        self._text = ""
        self._kind: type[Content] | type[Reasoning] | type[CallArguments] | None = None
        """Type of the open message's text; None in a header."""
        self._calls = 0

    def feed(self, text: str) -> list[Part]:
        """Add ``text``; return the parts of the answer that are certain now."""
        self._text += text
        return merged(self._read(ended=False))

    def finish(self, cut: bool = False) -> list[Part]:
        """Return the remaining parts of the answer. ``cut``: a limit ended the text, not the model."""
        parts = list(self._read(ended=not cut))  # markers are tokens: a partial one is not text
        if not cut:
            parts.append(Content(self._text))
        self._text = ""
        return merged(parts)

    def _read(self, ended: bool) -> Iterator[Part]:
        while self._text:
            if self._kind is None:
                header, mark, rest = split_at(self._text, (MESSAGE,), ended)
                if not self._text.lstrip().startswith(MARK):
                    if MARK.startswith(self._text.lstrip()) and not ended:
                        return
                    self._kind = Content
                elif len(header) > MAX_HEADER:
                    self._kind = Content
                    yield Content(header)
                    self._text = self._text[len(header) :]
                elif mark:
                    self._text = rest
                    yield from self._begin(header)
                else:
                    return
            text, mark, self._text = split_at(self._text, ENDS, ended)
            yield self._part(text)
            if not mark:
                return
            self._kind = None
            if mark in (START, CHANNEL):
                self._text = mark + self._text

    def _part(self, text: str) -> Part:
        if self._kind is CallArguments:
            return CallArguments(self._calls - 1, text)
        return Reasoning(text) if self._kind is Reasoning else Content(text)

    def _begin(self, header: str) -> Iterator[Part]:
        """Begin the message with the given ``header``: a call, with a CallBegin, if the header names a recipient, else
        reasoning or content."""
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            self._kind = CallArguments
            yield CallBegin(self._calls, recipient[1])
            self._calls += 1
        else:
            self._kind = Reasoning if _ANALYSIS.search(header) else Content
