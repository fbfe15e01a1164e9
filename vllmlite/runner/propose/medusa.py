"""Drafts from Medusa heads, which read the target model's final hidden state and need no cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.batch import Tensor
from vllmlite.engine.schedule import Schedule
from vllmlite.models.decoder import FINAL
from vllmlite.models.medusa import MedusaHeads
from vllmlite.runner.propose.proposer import Proposer

Step = tuple[list[int], Tensor, dict[int, int]]
"""Slots of a step, its hidden states, and the token of each slot's first sampled position."""


class MedusaProposer(Proposer):
    """Proposes the most likely id of each Medusa head."""

    states = (FINAL,)

    def __init__(self, heads: MedusaHeads) -> None:
        """Propose with ``heads``, at most one draft of each."""
        self.heads = heads
        self._backend = heads.backend
        self._last: tuple[Tensor, dict[int, int]] = (None, {})
        """Hidden states and first sampled tokens of the step that was launched last."""

    def admit(self, slot: int, token_ids: list[int], num_prompt: int) -> None:
        """Begin a sequence in ``slot``: its prompt of ``num_prompt`` ids, and the output so far. The sequence that had
        the slot before has ended."""

    def keep_states(self, schedule: Schedule, states: Sequence[Tensor]) -> None:
        """Keep the hidden states of a step that was launched: for each of :attr:`states`, those of all its tokens.
        Called before :meth:`launch`."""
        ends = np.cumsum(schedule.counts).tolist()
        firsts = {
            slot: end - samples
            for slot, end, samples in zip(schedule.slots, ends, schedule.samples, strict=True)
            if samples
        }
        self._last = (states[0], firsts)

    def launch(self, slots: Sequence[int]) -> Step:
        """Prepare for the results of a step that was launched and samples in ``slots``. The returned handle goes to
        :meth:`collect`."""
        return (list(slots), *self._last)

    def collect(self, handle: Step, token_ids: Sequence[list[int]], wanted: Sequence[int]) -> list[list[int]]:
        """Add the ids that a step sampled in its slots; return at most ``wanted[i]`` drafts for the i-th slot."""
        slots, hidden, firsts = handle
        drafts: list[list[int]] = [[] for _ in slots]
        rows = [row for row, count in enumerate(wanted) if count]
        if rows:
            # The last id was sampled from the hidden state of the last accepted token.
            index = np.array([firsts[slots[row]] + len(token_ids[row]) - 1 for row in rows], np.int32)
            states = self._backend.rows(hidden, self._backend.tensor(index))
            columns = self._guesses(states, len(rows), max(wanted))
            for number, row in enumerate(rows):
                drafts[row] = [int(column[number]) for column in columns[: wanted[row]]]
        return drafts

    def profile(self, num_rows: int) -> None:
        """Compute one draft in each of ``num_rows`` rows and discard it, to measure its time."""
        zeros = np.zeros((num_rows, self.heads.hidden_size), np.float32)
        self._guesses(self._backend.tensor(zeros, self._backend.dtype), num_rows, 1)

    def _guesses(self, states: Tensor, num_rows: int, count: int) -> list[NDArray[np.int32]]:
        """Return the most likely ids of the first ``count`` heads; all are launched before the first is read."""
        none = self._backend.tensor(np.zeros(num_rows, np.int32))
        found = [
            self._backend.logprobs(self.heads.logits(head, states), none, 1).top_ids
            for head in range(min(count, len(self.heads)))
        ]
        return [self._backend.to_host(ids)[:, 0] for ids in found]
