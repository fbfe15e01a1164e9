"""Drafts from a model: a smaller checkpoint with the same vocabulary continues the text greedily.

The draft model has a key/value cache of its own, in which every position has the same block as in the target model's.
It runs only where drafts are wanted, and first computes the positions that it has missed, at most ``budget`` of them in
a step over all sequences; a sequence that has missed more gets no drafts until it has caught up.

Target and draft model share a prefix if its blocks hold it in both caches. Blocks that the target model found in its
prefix cache may never have been computed by the draft model, or hold another text there since. Each block of the draft
model's cache therefore has a mark: the hash of all ids up to the block's end, set when the draft model has computed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, takewhile

from vllmlite.backends.base import Tensor
from vllmlite.engine.scheduler import Admission, Schedule
from vllmlite.runner.propose.proposer import Proposer
from vllmlite.runner.runner import ModelRunner
from vllmlite.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)


@dataclass(slots=True)
class DraftedSequence:
    """A sequence in a slot, as the draft model knows it."""

    slot: int
    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)
    """Its block table."""
    num_uploaded: int = -1
    """How many of ``blocks`` the device knows; -1: the sequence has not been admitted to the draft model's slot."""
    num_computed: int = 0
    """Positions whose keys and values in the draft model's cache are those of ``token_ids``."""
    num_marked: int = 0
    """How many of its blocks have their mark."""
    unknown: bool = False
    """Whether ids of it are not in the draft model's vocabulary."""
    drafts: list[int] = field(default_factory=list)
    """The drafts that were proposed last."""
    _marks: list[int] = field(default_factory=list)
    """Marks of its first blocks."""

    def append(self, token_ids: list[int]) -> None:
        """Append the ids that the target model sampled. Drafts that were right are computed already, except the last
        draft, from which nothing was drafted."""
        if self.num_computed == len(self.token_ids):
            pairs = zip(self.drafts[:-1], token_ids[:-1], strict=False)
            self.num_computed += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.token_ids += token_ids
        self.drafts = []

    def mark(self, index: int, block_size: int) -> int:
        """Return the hash of the ids up to the end of block ``index``."""
        for at in range(len(self._marks), index + 1):
            before = self._marks[-1] if at else 0
            ids = self.token_ids[at * block_size : (at + 1) * block_size]
            self._marks.append(hash((before, *ids)))
        return self._marks[index]


class ModelProposer(Proposer):
    """Proposes the continuation of a draft model."""

    def __init__(self, runner: ModelRunner, *, max_model_len: int, budget: int, vocab_size: int) -> None:
        """Propose with the draft model of ``runner``, whose cache has as many blocks as the target model's, for
        sequences of up to ``max_model_len`` tokens; ids of drafts are below ``vocab_size``, the target model's."""
        self.runner = runner
        self._max_model_len = max_model_len
        self._budget = budget
        self._vocab_size = vocab_size
        self._block_size = runner.model.kv_spec.block_size
        self._marks: dict[int, int] = {}
        """Block → hash of the ids up to its end, for blocks that the draft model has computed to their end."""
        self._sequences: dict[int, DraftedSequence] = {}

    def admit(self, slot: int, token_ids: list[int]) -> None:
        """See :class:`~vllmlite.runner.propose.proposer.Proposer`."""
        self._sequences[slot] = DraftedSequence(slot, list(token_ids))

    def append_blocks(self, slots: Sequence[int], columns: Sequence[int], blocks: Sequence[int]) -> None:
        """See :class:`~vllmlite.runner.propose.proposer.Proposer`."""
        for slot, block in zip(slots, blocks, strict=True):
            self._sequences[slot].blocks.append(block)

    def launch(self, slots: Sequence[int]) -> list[DraftedSequence]:
        """See :class:`~vllmlite.runner.propose.proposer.Proposer`."""
        return [self._sequences[slot] for slot in slots]

    def collect(
        self, handle: list[DraftedSequence], token_ids: Sequence[list[int]], wanted: Sequence[int]
    ) -> list[list[int]]:
        """See :class:`~vllmlite.runner.propose.proposer.Proposer`."""
        asked: dict[int, DraftedSequence] = {}
        counts: dict[int, int] = {}
        for sequence, ids, count in zip(handle, token_ids, wanted, strict=True):
            sequence.append(ids)
            # The last position that is computed is that of the last draft but one, and needs a block.
            room = min(len(sequence.blocks) * self._block_size, self._max_model_len)
            count = min(count, room - len(sequence.token_ids) + 1)
            if count > 0 and self._sequences[sequence.slot] is sequence and not sequence.unknown:
                asked[sequence.slot], counts[sequence.slot] = sequence, count
        if asked:
            self._draft(asked, counts)
        return [sequence.drafts for sequence in handle]

    def profile(self, num_rows: int) -> None:
        """See :class:`~vllmlite.runner.propose.proposer.Proposer`."""
        self.runner.profile(num_rows)

    def _draft(self, asked: Mapping[int, DraftedSequence], counts: Mapping[int, int]) -> None:
        """Compute the known tokens that are missing, then ``counts[slot]`` drafts of every sequence that has caught up.

        All steps are launched before the first draft is read."""
        schedule = self._catch_up(asked, counts)
        slots = list(compress(schedule.slots, schedule.samples))
        steps: list[tuple[list[int], Tensor]] = []
        while slots:
            sampled = self.runner.launch(schedule).sampled
            assert sampled is not None
            steps.append((slots, sampled.ids))
            slots = [slot for slot in slots if counts[slot] > len(steps)]
            starts = [len(asked[slot].token_ids) + len(steps) - 1 for slot in slots]
            schedule = _schedule(slots, starts, [1] * len(slots), [1] * len(slots))
        if not steps and schedule.slots:
            self.runner.launch(schedule)
        for slots, ids in steps:
            for slot, token_id in zip(slots, self.runner.backend.to_host(ids).tolist(), strict=True):
                asked[slot].drafts.append(token_id)
        for sequence in asked.values():
            sequence.drafts = list(takewhile(lambda token_id: token_id < self._vocab_size, sequence.drafts))

    def _catch_up(self, asked: Mapping[int, DraftedSequence], counts: Mapping[int, int]) -> Schedule:
        """Return the step that computes the missing tokens of ``asked``, and samples where none are missing then."""
        schedule = _schedule([], [], [], [])
        budget = self._budget
        for slot, sequence in asked.items():
            if sequence.num_uploaded < 0:
                schedule.admissions.append(Admission(slot, [], 0, GREEDY, 0))
                sequence.num_uploaded = 0
                self._find_computed(sequence)
            start = sequence.num_computed
            ids = sequence.token_ids[start : start + budget]
            if not ids:
                break
            if max(ids) >= self.runner.model.vocab_size:
                sequence.unknown = True
                continue
            budget -= len(ids)
            end = start + len(ids)
            caught_up = end == len(sequence.token_ids)
            self._mark(sequence, start, end, end + counts[slot] - 1 if caught_up else end)
            new = range(sequence.num_uploaded, len(sequence.blocks))
            schedule.block_slots += [slot] * len(new)
            schedule.block_columns += new
            schedule.block_ids += sequence.blocks[new.start :]
            sequence.num_uploaded = len(sequence.blocks)
            schedule.drafts[len(schedule.slots)] = ids
            schedule.slots.append(slot)
            schedule.starts.append(start)
            schedule.counts.append(len(ids))
            schedule.samples.append(int(caught_up))
        schedule.num_tokens, schedule.num_sampled = sum(schedule.counts), sum(schedule.samples)
        return schedule

    def _find_computed(self, sequence: DraftedSequence) -> None:
        """Set how many positions of a new sequence are in the draft model's cache; the last one is always left."""
        whole = (len(sequence.token_ids) - 1) // self._block_size
        for index, block in enumerate(sequence.blocks[:whole]):
            if self._marks.get(block) != sequence.mark(index, self._block_size):
                break
            sequence.num_computed += self._block_size
        sequence.num_marked = sequence.num_computed // self._block_size

    def _mark(self, sequence: DraftedSequence, start: int, end: int, written: int) -> None:
        """Mark the blocks of a sequence for a step that computes positions ``start`` to ``end``, and drafts that are
        written up to ``written``."""
        size = self._block_size
        for block in sequence.blocks[start // size : -(-written // size)]:
            self._marks.pop(block, None)
        for index in range(sequence.num_marked, end // size):
            self._marks[sequence.blocks[index]] = sequence.mark(index, size)
        sequence.num_marked, sequence.num_computed = end // size, end


def _schedule(slots: list[int], starts: list[int], counts: list[int], samples: list[int]) -> Schedule:
    """Return a step of these rows, without admissions."""
    return Schedule(
        slots=slots,
        starts=starts,
        counts=counts,
        samples=samples,
        num_tokens=sum(counts),
        num_sampled=sum(samples),
    )
