"""Reference implementation, in Python, of the look-up of drafts in the texts of all slots; csrc/propose/sequences.hpp
does the same.

It searches the whole text for each draft. The torch backend uses it, since its steps take longer than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

END = -1
"""Separator after each earlier output."""


def after_first_match(ids: Sequence[int], shortest: int, longest: int) -> int:
    """Return the index after the first earlier occurrence of the n-gram that ends ``ids``, for the largest n from
    ``shortest`` to ``longest`` that has one; the length of ``ids`` if there is none."""
    for length in range(min(longest, len(ids) - 1), shortest - 1, -1):
        ngram = ids[-length:]
        for end in range(length, len(ids)):
            if ids[end - length : end] == ngram:
                return end
    return len(ids)


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Limits of drafts that are predicted from counts of earlier continuations."""

    count: int
    """Maximum number of drafts."""
    depth: int
    """Maximum number of ids of the matched context and its drafts together."""
    factor: float
    """Number of drafts for each id of the matched context."""
    least_probability: float
    """Minimum joint probability of a draft and those before it."""


def frequent_draft(
    text: Sequence[int], context: Sequence[int], limits: DraftLimits
) -> tuple[list[int], float]:
    """Predict the ids after ``context`` from what followed its end in ``text``. Returns the draft, and its score: the
    expected number of right ids, if the text continues with the same frequencies as before.

    For each m, the last m ids of the context are looked up. From each match on, the most frequent next id is appended
    repeatedly (among equally frequent ids, the one that had this frequency first), while the joint probability stays
    above ``limits.least_probability``. The draft with the highest score is returned; among equal scores, that of the
    longest match. :data:`END` is never drafted."""
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
    """The ids of the sequence in one slot."""

    admission: int = 0
    num_prompt: int = 0
    ids: list[int] = field(default_factory=list)


class Sequences:
    """The texts of all slots, in which drafts are looked up."""

    def __init__(self, max_slots: int) -> None:
        """Start with empty slots."""
        self._slots = [Text() for _ in range(max_slots)]
        self.num_admissions = 0
        """Number of sequences that have been admitted."""

    def admit(self, slot: int, ids: list[int], num_prompt: int) -> None:
        """Begin a sequence in ``slot`` with its prompt, the first ``num_prompt`` ids, and its output so far."""
        self._ended(self._slots[slot])
        self.num_admissions += 1
        self._slots[slot] = Text(self.num_admissions, num_prompt, list(ids))

    def propose(
        self, slots: list[int], admissions: int, token_ids: list[list[int]], wanted: list[int]
    ) -> list[list[int]]:
        """Append ``token_ids[i]`` to the sequence in ``slots[i]``, unless that was admitted after the first
        ``admissions`` sequences; return at most ``wanted[i]`` drafts for it."""
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
        """Handle the end of a sequence; does nothing by default."""


class NgramSequences(Sequences):
    """Drafts the ids after the first occurrence of the longest n-gram that ends the text."""

    def __init__(self, max_slots: int, shortest: int, longest: int) -> None:
        """Match n-grams of ``shortest`` to ``longest`` ids."""
        super().__init__(max_slots)
        self._range = (shortest, longest)

    def _draft(self, ids: list[int], count: int) -> list[int]:
        first = after_first_match(ids, *self._range)
        return ids[first : first + count]


class SuffixSequences(Sequences):
    """Drafts the most frequent continuation of the end of the text, in the text itself or in outputs of earlier
    sequences."""

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
