"""N-gram drafts (prompt lookup, Saxena 2023): what followed the last few ids when they occurred before.

The ids of a sequence are indexed once, as they come: for each length, every n-gram has an entry with the place after
its first occurrence. A proposal looks up the longest n-gram at the end of the sequence that has occurred before, as
vLLM's proposer does; it costs a few dictionary accesses, however long the sequence is. A sequence that is asked for no
drafts is not indexed. An entry takes about 150 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllmlite.runner.propose.proposer import Proposer

ID_BITS = 20
"""Bits of an id in the key of an n-gram, which is the ids side by side. Where ids are larger, n-grams may share a key,
and a draft may be wrong."""


class Lookup:
    """The ids of one sequence and the places of their n-grams of ``shortest`` to ``longest`` ids."""

    def __init__(self, token_ids: list[int], shortest: int, longest: int) -> None:
        """Index nothing yet. ``token_ids`` becomes the lookup's own."""
        self.token_ids = token_ids
        self._num_indexed = 0
        self._recent = 0
        """Key of the last ``longest`` ids that are indexed."""
        self._indexes: list[tuple[int, int, dict[int, int]]] = [
            (length, (1 << ID_BITS * length) - 1, {}) for length in range(longest, shortest - 1, -1)
        ]
        """Length, mask of its key, and key → place after the first occurrence; the longest first."""
        self._mask = self._indexes[0][1]

    def propose(self, count: int) -> list[int]:
        """Return up to ``count`` ids that followed the earlier occurrence of the longest n-gram at the end."""
        ids, recent = self.token_ids, self._recent
        end, found = len(ids), len(ids)
        for place in range(self._num_indexed + 1, end + 1):
            recent = (recent << ID_BITS | ids[place - 1]) & self._mask
            found = end
            for length, mask, index in self._indexes:
                if length <= place:
                    first = index.setdefault(recent & mask, place)
                    if first < place:
                        # The shorter n-grams are the ends of this one, so they have occurred before as well.
                        found = first
                        break
        self._num_indexed, self._recent = end, recent
        return ids[found : found + count]


class NgramProposer(Proposer):
    """Proposes what followed the longest matching n-gram."""

    def __init__(self, max_slots: int, shortest: int, longest: int) -> None:
        """N-grams have ``shortest`` to ``longest`` ids."""
        self._range = (shortest, longest)
        self._lookups = [Lookup([], shortest, longest) for _ in range(max_slots)]

    def admit(self, slot: int, token_ids: list[int]) -> None:
        """See :class:`~vllmlite.runner.propose.proposer.Proposer`."""
        self._lookups[slot] = Lookup(list(token_ids), *self._range)

    def launch(self, slots: Sequence[int]) -> list[Lookup]:
        """See :class:`~vllmlite.runner.propose.proposer.Proposer`."""
        return [self._lookups[slot] for slot in slots]

    def collect(
        self, handle: list[Lookup], token_ids: Sequence[list[int]], wanted: Sequence[int]
    ) -> list[list[int]]:
        """See :class:`~vllmlite.runner.propose.proposer.Proposer`."""
        drafts = []
        for lookup, ids, count in zip(handle, token_ids, wanted, strict=True):
            lookup.token_ids += ids
            drafts.append(lookup.propose(count) if count else [])
        return drafts
