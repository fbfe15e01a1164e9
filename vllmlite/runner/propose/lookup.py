"""Drafts that are looked up in texts: n-grams (prompt lookup, Saxena 2023) and suffixes (Oliaro et al. 2024).

The texts are indexed in native code (csrc/propose), by a suffix automaton of each, when drafts are first wanted for
them; until then an id costs an append to an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from vllmlite.config.speculative import Speculative
from vllmlite.runner.propose import reference
from vllmlite.runner.propose.proposer import Proposer


class LookupProposer(Proposer):
    """Proposes the ids that followed the same ids earlier in a text."""

    def __init__(self, sequences: Any) -> None:
        """Look drafts up in ``sequences``: a :class:`~vllmlite.runner.propose.reference.Sequences`, or its native
        equivalent."""
        self._sequences = sequences

    def admit(self, slot: int, token_ids: list[int], num_prompt: int) -> None:
        """Begin a sequence in ``slot``: its prompt of ``num_prompt`` ids, and the output so far. The sequence that had
        the slot before has ended."""
        self._sequences.admit(slot, token_ids, num_prompt)

    def launch(self, slots: Sequence[int]) -> tuple[list[int], int]:
        """Prepare for the results of a step that was launched and samples in ``slots``. The returned handle goes to
        :meth:`collect`."""
        return list(slots), self._sequences.num_admissions

    def collect(
        self, handle: tuple[list[int], int], token_ids: Sequence[list[int]], wanted: Sequence[int]
    ) -> list[list[int]]:
        """Add the ids that a step sampled in its slots; return at most ``wanted[i]`` drafts for the i-th slot."""
        drafts: list[list[int]] = self._sequences.propose(*handle, token_ids, wanted)
        return drafts


def lookup_proposer(options: Speculative, max_slots: int, extension: ModuleType | None) -> LookupProposer:
    """Return the proposer for ``options``, in native code, or in Python if ``extension`` is None."""
    classes: Any = extension or reference
    if (suffix := options.suffix) is not None:
        return LookupProposer(
            classes.SuffixSequences(
                max_slots, suffix.depth, suffix.factor, suffix.least_probability, suffix.earlier_outputs
            )
        )
    return LookupProposer(
        classes.NgramSequences(max_slots, options.prompt_lookup_min, options.prompt_lookup_max)
    )
