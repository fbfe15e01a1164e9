"""The texts of all slots, from which drafts are looked up: the specification of csrc/propose/sequences.hpp.

It searches the whole text for each draft. The torch backend uses it, whose steps take longer than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

END = -1
"""Stands after each earlier output."""


def after_first_match(ids: Sequence[int], shortest: int, longest: int) -> int:
    """Return the place after the first occurrence of the longest n-gram at the end of ``ids``, of ``shortest`` to
    ``longest`` ids, that occurred before; the length of ``ids`` if there is none."""
    for length in range(min(longest, len(ids) - 1), shortest - 1, -1):
        ngram = ids[-length:]
        for end in range(length, len(ids)):
            if ids[end - length : end] == ngram:
                return end
    return len(ids)


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Limits of drafts that are made from counts of what followed."""

    count: int
    """Most drafts."""
    depth: int
    """Most ids of a matched context and its drafts together."""
    factor: float
    """Drafts for each id of the matched context."""
    least_probability: float
    """Least probability of a draft together with those before it."""


def frequent_draft(
    text: Sequence[int], context: Sequence[int], limits: DraftLimits
) -> tuple[list[int], float]:
    """Return what mostly followed the end of ``context`` in ``text``, and the expected number of ids of it that are
    right if the text goes on as it did before.

    The context's last m ids are matched for each m. After each match, the id that followed most often is followed again
    and again (of equally frequent ones that which had so many first), while the joint probability is high enough. The
    result is the draft with the highest score, of equals that of the longest match. :data:`END` is never drafted."""
    best: list[int] = []
    best_score = 0.0
    for length in range(min(limits.depth - 1, len(context)), 0, -1):
        pattern = context[-length:]
        ends = [end for end in range(length, len(text)) if text[end - length : end] == pattern]
        drafts: list[int] = []
        score, probability = 0.0, 1.0
        while ends and len(drafts) < min(limits.count, int(limits.factor * length), limits.depth - length):
            last = {text[end]: end for end in ends}
            token_id, count = max(
                Counter(text[end] for end in ends).items(), key=lambda e: (e[1], -last[e[0]])
            )
            probability *= count / len(ends)
            if token_id == END or probability < limits.least_probability:
                break
            drafts.append(token_id)
            score += probability
            ends = [end + 1 for end in ends if text[end] == token_id and end + 1 < len(text)]
        if score > best_score:
            best, best_score = drafts, score
    return best, best_score


@dataclass(slots=True)
class Text:
    """The ids of the sequence in a slot."""

    admission: int = 0
    num_prompt: int = 0
    ids: list[int] = field(default_factory=list)


class Sequences:
    """The texts of all slots."""

    def __init__(self, max_slots: int) -> None:
        """Begin with empty slots."""
        self._slots = [Text() for _ in range(max_slots)]
        self.num_admissions = 0
        """How many sequences have been admitted."""

    def admit(self, slot: int, ids: list[int], num_prompt: int) -> None:
        """Begin a sequence in ``slot`` with its prompt, the first ``num_prompt`` ids, and its output so far."""
        self._ended(self._slots[slot])
        self.num_admissions += 1
        self._slots[slot] = Text(self.num_admissions, num_prompt, list(ids))

    def propose(
        self, slots: list[int], admissions: int, token_ids: list[list[int]], wanted: list[int]
    ) -> list[list[int]]:
        """Append ``token_ids[i]`` to the sequence of ``slots[i]`` unless it was admitted after the first ``admissions``
        ones; return at most ``wanted[i]`` drafts for it."""
        drafts: list[list[int]] = []
        for slot, ids, count in zip(slots, token_ids, wanted, strict=True):
            text = self._slots[slot]
            if live := text.admission <= admissions:
                text.ids += ids
            drafts.append(self._draft(text.ids, count) if live and count else [])
        return drafts

    def _draft(self, ids: list[int], count: int) -> list[int]:
        raise NotImplementedError

    def _ended(self, text: Text) -> None:
        """Note that a sequence has ended."""


class NgramSequences(Sequences):
    """Drafts what followed the first occurrence of the longest n-gram at the end."""

    def __init__(self, max_slots: int, shortest: int, longest: int) -> None:
        """N-grams have ``shortest`` to ``longest`` ids."""
        super().__init__(max_slots)
        self._range = (shortest, longest)

    def _draft(self, ids: list[int], count: int) -> list[int]:
        first = after_first_match(ids, *self._range)
        return ids[first : first + count]


class SuffixSequences(Sequences):
    """Drafts what mostly followed the end of the sequence in itself, or in the outputs of earlier ones."""

    def __init__(
        self, max_slots: int, depth: int, factor: float, least_probability: float, earlier: int
    ) -> None:
        """Keep the last ``earlier`` outputs, or fewer: outputs are dropped by halves."""
        super().__init__(max_slots)
        self._limits = (depth, factor, least_probability)
        self._earlier = earlier
        self._outputs: list[list[int]] = []
        """The newer half of the earlier outputs, then the older one."""
        self._num_newer = 0

    def _draft(self, ids: list[int], count: int) -> list[int]:
        limits = DraftLimits(count, *self._limits)
        found = [frequent_draft(text, ids, limits) for text in (ids, *self._outputs)]
        return max(found, key=lambda draft: draft[1])[0]

    def _ended(self, text: Text) -> None:
        if not self._earlier or len(text.ids) <= text.num_prompt:
            return
        if not self._outputs or self._num_newer >= max(1, self._earlier // 2):
            self._outputs = [[], *self._outputs[: 1 if self._earlier > 1 else 0]]
            self._num_newer = 0
        self._outputs[0] += [*text.ids[text.num_prompt :], END]
        self._num_newer += 1
