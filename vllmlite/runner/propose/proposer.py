"""The interface of proposers of draft tokens, which the model runner calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vllmlite.backends.base import KVCache
from vllmlite.backends.batch import Tensor
from vllmlite.engine.schedule import Schedule


class Proposer(Protocol):
    """Guesses the next ids of sequences. Calls of one proposer come in the order of the steps."""

    states: Sequence[int] = ()
    """Indices of the hidden states that :meth:`keep_states` gets, as the argument ``kept`` of
    ``KeepingModel.forward_keeping``."""

    caches: Sequence[KVCache] = ()
    """The proposer's key/value cache; empty if it has none."""

    def forget_cached(self) -> None:
        """Forget the contents of :attr:`caches`, which are lost. Called while no sequence has a slot."""
        return None

    def admit(self, slot: int, token_ids: list[int], num_prompt: int) -> None:
        """Begin a sequence in ``slot``: its prompt of ``num_prompt`` ids, and the output so far. The sequence that had
        the slot has ended; results of steps that were launched with it are ignored."""
        ...

    def append_blocks(self, slots: Sequence[int], columns: Sequence[int], blocks: Sequence[int]) -> None:
        """Write block ``blocks[i]`` to column ``columns[i]`` of the block table of ``slots[i]``. A proposer with a
        key/value cache of its own uses the same blocks as the target model."""
        return None

    def keep_states(self, schedule: Schedule, states: Sequence[Tensor]) -> None:
        """Keep the hidden states of a step that was launched: for each of :attr:`states`, those of all its tokens.
        Called before :meth:`launch`."""
        return None

    def launch(self, slots: Sequence[int]) -> Any:
        """Prepare for the results of a step that was launched and samples in ``slots``. The returned handle goes to
        :meth:`collect`."""
        ...

    def collect(self, handle: Any, token_ids: Sequence[list[int]], wanted: Sequence[int]) -> list[list[int]]:
        """Add the ids that a step sampled in its slots; return at most ``wanted[i]`` drafts for the i-th slot."""
        ...

    def profile(self, num_rows: int) -> None:
        """Compute one draft in each of ``num_rows`` rows and discard it, to measure its time."""
        return None


class EarlierStages(Proposer):
    """Stands for the proposer of a pipeline's last stage in the earlier stages, whose hidden states that proposer
    reads."""

    def __init__(self, states: Sequence[int]) -> None:
        """Have the stages pass on the inputs of the layers ``states``."""
        self.states = states

    def admit(self, slot: int, token_ids: list[int], num_prompt: int) -> None:
        """Do nothing."""

    def launch(self, slots: Sequence[int]) -> None:
        """Do nothing."""

    def collect(self, handle: None, token_ids: Sequence[list[int]], wanted: Sequence[int]) -> list[list[int]]:
        """Return no drafts: the last stage proposes them."""
        return [[] for _ in wanted]
