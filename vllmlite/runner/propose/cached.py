"""Bookkeeping of proposers with a key/value cache of their own.

Every position has the same block in the proposer's cache as in the target model's. Sequences share a prefix if its
blocks hold it in both caches. Blocks that the target model found in its prefix cache may never have been computed by
the proposer, or hold another text there since. Each block of the proposer's cache therefore has a mark: the hash of all
ids that the states up to the block's end depend on, set when the proposer has computed them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vllmlite.runner.propose.proposer import Proposer


@dataclass(slots=True)
class CachedSequence:
    """The state of a proposer for the sequence in a slot."""

    slot: int
    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)
    """Block table of the sequence."""
    num_uploaded: int = -1
    """Number of ``blocks`` that have been copied to the device; -1: the proposer has not started with the sequence."""
    num_computed: int = 0
    """Number of positions whose keys and values in the proposer's cache are those of ``token_ids``."""
    num_marked: int = 0
    """Number of blocks, from the first on, that have their mark."""
    dropped: bool = False
    """Whether the sequence can get no more drafts: it is too long, or has ids that are not in the proposer's
    vocabulary."""
    drafts: list[int] = field(default_factory=list)
    """The drafts that were proposed last."""
    _marks: list[int] = field(default_factory=list)
    """Marks of the first blocks, as far as they have been computed."""

    def append(self, token_ids: list[int]) -> None:
        """Append the ids that the target model sampled."""
        self.token_ids += token_ids
        self.drafts = []

    def mark(self, index: int, block_size: int, ahead: int) -> int:
        """Return the mark of block ``index``: a hash of the ids up to its end, and of ``ahead`` more ids."""
        for at in range(len(self._marks), index + 1):
            before = self._marks[-1] if at else 0
            ids = self.token_ids[at * block_size : (at + 1) * block_size + ahead]
            self._marks.append(hash((before, *ids)))
        return self._marks[index]


SequenceT = TypeVar("SequenceT", bound=CachedSequence)


class CachedProposer(Proposer, Generic[SequenceT]):
    """Base of proposers with a key/value cache: keeps the block tables of sequences and the marks of blocks."""

    def __init__(self, sequence: type[SequenceT], block_size: int, max_model_len: int, ahead: int) -> None:
        """Propose drafts for sequences of up to ``max_model_len`` tokens. The state of a position depends on the ids up
        to it, and on ``ahead`` ids after it."""
        self._make = sequence
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._ahead = ahead
        self._marks: dict[int, int] = {}
        """Block → the mark of its contents in the proposer's cache."""
        self._sequences: dict[int, SequenceT] = {}

    def forget_cached(self) -> None:
        """Forget the contents of the proposer's cache, which are lost. Called while no sequence has a slot."""
        self._marks.clear()

    def admit(self, slot: int, token_ids: list[int], num_prompt: int) -> None:
        """Begin a sequence in ``slot``: its prompt of ``num_prompt`` ids, and the output so far. The sequence that had
        the slot before has ended."""
        self._sequences[slot] = self._make(slot, list(token_ids))

    def append_blocks(self, slots: Sequence[int], columns: Sequence[int], blocks: Sequence[int]) -> None:
        """Write block ``blocks[i]`` to column ``columns[i]`` of the block table of ``slots[i]``."""
        for slot, block in zip(slots, blocks, strict=True):
            self._sequences[slot].blocks.append(block)

    def launch(self, slots: Sequence[int]) -> list[SequenceT]:
        """Prepare for the results of a step that was launched and samples in ``slots``. The returned handle goes to
        :meth:`collect`."""
        return [self._sequences[slot] for slot in slots]

    def collect(
        self, handle: list[SequenceT], token_ids: Sequence[list[int]], wanted: Sequence[int]
    ) -> list[list[int]]:
        """Add the ids that a step sampled in its slots; return at most ``wanted[i]`` drafts for the i-th slot."""
        asked: dict[int, SequenceT] = {}
        counts: dict[int, int] = {}
        for sequence, ids, count in zip(handle, token_ids, wanted, strict=True):
            sequence.append(ids)
            # The last position that is computed is that of the last draft but one, and needs a block.
            room = min(len(sequence.blocks) * self._block_size, self._max_model_len)
            count = min(count, room - len(sequence.token_ids) + 1)
            if count > 0 and self._sequences[sequence.slot] is sequence and not sequence.dropped:
                asked[sequence.slot], counts[sequence.slot] = sequence, count
        if asked:
            self._draft(asked, counts)
        return [sequence.drafts for sequence in handle]

    def _draft(self, asked: Mapping[int, SequenceT], counts: Mapping[int, int]) -> None:
        """Set the drafts of the sequences ``asked``, given by slot: at most ``counts[slot]`` of each."""
        raise NotImplementedError

    def _new_blocks(self, sequence: SequenceT) -> range:
        """Return the columns of a sequence's block table that have to be copied to the device, and count them as
        copied."""
        longest = -(-self._max_model_len // self._block_size)
        new = range(max(sequence.num_uploaded, 0), min(len(sequence.blocks), longest))
        sequence.num_uploaded = new.stop
        return new

    def _find_computed(self, sequence: SequenceT) -> None:
        """Set the number of positions of a new sequence that are in the proposer's cache; the last position is always
        computed again."""
        whole = (len(sequence.token_ids) - 1 - self._ahead) // self._block_size
        for index, block in enumerate(sequence.blocks[:whole]):
            if self._marks.get(block) != sequence.mark(index, self._block_size, self._ahead):
                break
            sequence.num_marked = index + 1
        sequence.num_computed = sequence.num_marked * self._block_size

    def _mark(self, sequence: SequenceT, start: int, end: int, written: int) -> None:
        """Set the marks of a sequence's blocks for a step that computes positions ``start`` to ``end``, after which
        drafts are written up to position ``written``."""
        size = self._block_size
        for block in sequence.blocks[start // size : -(-written // size)]:
            self._marks.pop(block, None)
        for index in range(sequence.num_marked, end // size):
            self._marks[sequence.blocks[index]] = sequence.mark(index, size, self._ahead)
        sequence.num_marked, sequence.num_computed = end // size, end
