"""A model's reasoning before its answer, enclosed in markers."""

from __future__ import annotations

from dataclasses import dataclass

from vllmlite.server.parsers.parts import Content, Parser, Part, Reasoning, merged, split_at


@dataclass(frozen=True, slots=True)
class ThinkStyle:
    """The markers with which a model family encloses its reasoning."""

    opening: str
    closing: str
    implied: bool
    """Whether an answer begins with reasoning even without an opening marker."""
    other_openings: tuple[str, ...] = ()
    other_closings: tuple[str, ...] = ()
    """Closing markers that some models write in place of the usual one."""
    ends_before: tuple[str, ...] = ()
    """Tool-call markers that end unclosed reasoning."""

    def opened_by(self, prompt: str) -> bool | None:
        """Return whether the chat template opened (True) or closed (False) the reasoning in ``prompt``; None:
        neither."""
        prompt = prompt.rstrip()
        return True if prompt.endswith(self.opening) else False if prompt.endswith(self.closing) else None


_THINK = ("<think>", "</think>")
STYLES = {
    "deepseek_r1": ThinkStyle(*_THINK, implied=True),
    "deepseek_v3": ThinkStyle(*_THINK, implied=False),
    "glm45": ThinkStyle(*_THINK, implied=False),
    "glm47": ThinkStyle(*_THINK, implied=False),
    "granite": ThinkStyle(
        "Here is my thought process:",
        "Here is my response:",
        implied=False,
        other_openings=("Here's my thought process:",),
        other_closings=("Here's my response:",),
    ),
    "kimi_k2": ThinkStyle(*_THINK, implied=False, ends_before=("<|tool_calls_section_begin|>",)),
    "minimax_m2": ThinkStyle(*_THINK, implied=True),
    "mistral": ThinkStyle("[THINK]", "[/THINK]", implied=False),
    "olmo3": ThinkStyle(*_THINK, implied=True),
    "openai_gptoss": ThinkStyle("<|channel|>analysis<|message|>", "<|end|>", implied=False),
    "qwen3": ThinkStyle(*_THINK, implied=False),
    "seed_oss": ThinkStyle("<seed:think>", "</seed:think>", implied=False),
}
"""Styles by vLLM's names of reasoning parsers."""


class ThinkParser:
    """Parses reasoning, then content, which is passed to another parser if there is one."""

    def __init__(self, style: ThinkStyle, prompt: str, then: Parser | None = None) -> None:
        """Parse an answer to ``prompt``, in which the chat template may have opened the reasoning already, or closed
        it. ``then`` parses the content after the reasoning."""
        self._style = style
        self._then = then
        self._text = ""
        self._open = style.opened_by(prompt)
        """Whether the text is reasoning; None before that is known."""

    def feed(self, text: str) -> list[Part]:
        """Add ``text``; return the parts of the answer that are certain now."""
        return merged(self._pass_on(self._split(text, False)))

    def finish(self, cut: bool = False) -> list[Part]:
        """Return the remaining parts of the answer. ``cut``: a limit ended the text, not the model."""
        parts = self._pass_on(self._split("", True))
        return merged(parts if self._then is None else [*parts, *self._then.finish(cut)])

    def _split(self, text: str, ended: bool) -> list[Part]:
        self._text += text
        if self._open is None:
            self._open = self._opens(ended)
            if self._open is None:
                return []
        parts: list[Part] = []
        if self._open:
            style = self._style
            closings = (style.closing, *style.other_closings, *style.ends_before)
            text, mark, self._text = split_at(self._text, closings, ended)
            parts.append(Reasoning(text))
            if not mark:
                return parts
            if mark in style.ends_before:
                self._text = mark + self._text
            self._open = False
        parts.append(Content(self._text))
        self._text = ""
        return parts

    def _opens(self, ended: bool) -> bool | None:
        text = self._text.lstrip()
        openings = (self._style.opening, *self._style.other_openings)
        for opening in openings:
            if text.startswith(opening):
                self._text = text[len(opening) :]
                return True
        if any(opening.startswith(text) for opening in openings) and not ended:
            return None
        return self._style.implied

    def _pass_on(self, parts: list[Part]) -> list[Part]:
        if self._then is None:
            return parts
        found: list[Part] = []
        for part in parts:
            found += self._then.feed(part.text) if isinstance(part, Content) else [part]
        return found
