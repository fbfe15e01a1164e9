"""What a model thinks before it answers, between marks of its own."""

from __future__ import annotations

from dataclasses import dataclass

from vllmlite.server.parsers.parts import Content, Parser, Part, Reasoning, merged, overlap


@dataclass(frozen=True, slots=True)
class ThinkStyle:
    """How a family of models marks its reasoning."""

    opening: str
    closing: str
    implied: bool
    """Whether an answer begins with reasoning even where no mark opens it."""

    def opened_by(self, prompt: str) -> bool | None:
        """Whether a chat template has opened the reasoning in ``prompt``, or closed it; None: neither."""
        prompt = prompt.rstrip()
        return True if prompt.endswith(self.opening) else False if prompt.endswith(self.closing) else None


STYLES = {
    "deepseek_r1": ThinkStyle("<think>", "</think>", implied=True),
    "mistral": ThinkStyle("[THINK]", "[/THINK]", implied=False),
    "qwen3": ThinkStyle("<think>", "</think>", implied=False),
}


class ThinkParser:
    """Reasoning, then content, which goes on to another parser if there is one."""

    def __init__(self, style: ThinkStyle, prompt: str, then: Parser | None = None) -> None:
        """``prompt``: a chat template may have opened the reasoning there, or closed it to have none."""
        self._style = style
        self._then = then
        self._text = ""
        self._open = style.opened_by(prompt)
        """Whether it reasons; None before that is known."""

    def feed(self, text: str) -> list[Part]:
        """See :class:`~vllmlite.server.parsers.parts.Parser`."""
        return merged(self._pass_on(self._split(text, False)))

    def finish(self, cut: bool = False) -> list[Part]:
        """See :class:`~vllmlite.server.parsers.parts.Parser`."""
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
            closing = self._style.closing
            at = self._text.find(closing)
            if at < 0:
                at = len(self._text) - (0 if ended else overlap(self._text, closing))
                parts.append(Reasoning(self._text[:at]))
                self._text = self._text[at:]
                return parts
            parts.append(Reasoning(self._text[:at]))
            self._text = self._text[at + len(closing) :]
            self._open = False
        parts.append(Content(self._text))
        self._text = ""
        return parts

    def _opens(self, ended: bool) -> bool | None:
        text, opening = self._text.lstrip(), self._style.opening
        if text.startswith(opening):
            self._text = text[len(opening) :]
            return True
        if opening.startswith(text) and not ended:
            return None
        return self._style.implied

    def _pass_on(self, parts: list[Part]) -> list[Part]:
        if self._then is None:
            return parts
        found: list[Part] = []
        for part in parts:
            found += self._then.feed(part.text) if isinstance(part, Content) else [part]
        return found
