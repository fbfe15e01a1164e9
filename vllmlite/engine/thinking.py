"""A grammar that limits the tokens between the marks that open and close a model's reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from vllmlite.engine.request import Grammar, allows


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """The ids that open and close a model's reasoning."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]


class ThinkingBudget:
    """Grammar that forces the closing mark once a section of reasoning has ``budget`` tokens.

    The request may have an ``inner`` grammar as well. Nothing is forced where that restricts ids, since such text is
    not reasoning. The state depends only on the ids of prompt and output, so batching and preemption cannot
    change it."""

    def __init__(
        self,
        marks: ReasoningMarks,
        budget: int,
        prompt: Sequence[int],
        vocab_size: int,
        inner: Grammar | None = None,
    ) -> None:
        """Start at the end of ``prompt``, whose tokens count from its last opening mark on, if no closing mark
        follows."""
        self._marks = marks
        self._budget = budget
        self._vocab_size = vocab_size
        self._inner = inner
        self._thinks = False
        self._count = 0
        """Number of tokens of the open section of reasoning, without those of an incomplete closing mark."""
        self._matched = 0
        """Number of ids at the start of the next mark that the last tokens match."""
        for token_id in prompt:
            self._take(token_id)
        self._start = (self._thinks, self._count, self._matched)

    def masks(self, drafts: Sequence[int] = ()) -> list[bytes | None]:
        """Return the bitmasks of the ids that may come next, and of those after each of ``drafts`` while these are
        allowed; None allows all ids. The position does not change."""
        masks: list[bytes | None] = [None] * (len(drafts) + 1)
        if self._inner is not None:
            masks = self._inner.masks(drafts)
        before = (self._thinks, self._count, self._matched)
        for index, mask in enumerate(masks):
            if mask is None and self._thinks and self._count + self._matched >= self._budget:
                masks[index] = self._bit(self._marks.closing[self._matched])
            if index < len(drafts):
                if not allows(masks[index], drafts[index]):
                    del masks[index + 1 :]
                    break
                self._take(drafts[index])
        self._thinks, self._count, self._matched = before
        return masks

    def accept(self, token_id: int) -> bool:
        """Advance by the next id; returns whether the output is complete."""
        self._take(token_id)
        return self._inner is not None and self._inner.accept(token_id)

    def restart(self) -> None:
        """Go back to the start of the output."""
        self._thinks, self._count, self._matched = self._start
        if self._inner is not None:
            self._inner.restart()

    def fork(self) -> ThinkingBudget:
        """Return another grammar at the same position."""
        other = copy(self)
        other._inner = None if self._inner is None else self._inner.fork()
        return other

    def _take(self, token_id: int) -> None:
        mark = self._marks.closing if self._thinks else self._marks.opening
        before = self._matched
        self._matched = _matched(mark, before, token_id) if before or token_id == mark[0] else 0
        self._count += before + 1 - self._matched
        if self._matched == len(mark):
            self._thinks = not self._thinks
            self._count = self._matched = 0

    def _bit(self, token_id: int) -> bytes:
        words = bytearray(4 * -(-self._vocab_size // 32))
        words[token_id // 8] |= 1 << token_id % 8
        return bytes(words)


def _matched(mark: Sequence[int], matched: int, token_id: int) -> int:
    """Return how many ids at the start of ``mark`` the tokens up to ``token_id`` match, if those before it matched
    ``matched``."""
    recent = [*mark[:matched], token_id]
    return max(size for size in range(len(recent) + 1) if list(mark[:size]) == recent[len(recent) - size :])
