"""A runner without a model, whose next id depends on every token that its paged cache holds for the sequence.

It stores token ids where a model would store keys and values, reads them back through the block tables, and hashes them
into the next id. A wrong or stale block, one allocated twice, or a lost token changes the output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from random import Random
from typing import Any
from zlib import crc32

from vllmlite.engine.beams import Continuation
from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.engine.scheduler import Limits
from vllmlite.engine.tiers import Copies

VOCAB = 97
EOS = 0


def next_id(context: Sequence[int], banned: Collection[int] = ()) -> int:
    """The id after ``context``: a hash of all its ids, moved past ``banned`` ids."""
    token_id = crc32(bytes(context)) % VOCAB
    while token_id in banned:
        token_id = (token_id + 1) % VOCAB
    return token_id


def expected(
    prompt: Sequence[int], max_tokens: int, *, eos: Collection[int] = (EOS,), min_tokens: int = 0
) -> list[int]:
    """The output that a request must have, however it is scheduled."""
    context = list(prompt)
    for index in range(max_tokens):
        context.append(next_id(context, eos if index < min_tokens else ()))
        if context[-1] in eos:
            break
    return context[len(prompt) :]


def continuations(
    contexts: Sequence[Sequence[int]], scores: Sequence[float], count: int
) -> list[Continuation]:
    """The best continuations of beams; the log-probability of an id is a hash of the context and the id."""
    found = [
        Continuation(beam, token_id, score - crc32(bytes([*context, token_id])) % 1021 / 64)
        for beam, (context, score) in enumerate(zip(contexts, scores, strict=True))
        for token_id in range(VOCAB)
    ]
    return sorted(found, key=lambda one: -one.score)[:count]


class FakeRunner:
    """Runs schedules on a cache of token ids; raises at step ``fail_at`` if that is given.

    It proposes drafts, each of which is the right id with probability ``right``."""

    def __init__(self, limits: Limits, fail_at: int = -1, right: float = 0.5) -> None:
        self.block_size = limits.block_size
        self.cache = [-1] * (limits.num_blocks * limits.block_size)
        self.host: dict[int, list[int]] = {}
        """Place → a block's token ids."""
        self.tables: list[list[int]] = [[] for _ in range(limits.max_num_seqs)]
        self.known: list[list[int]] = [[] for _ in range(limits.max_num_seqs)]
        self.last = [-1] * limits.max_num_seqs
        self.steps = 0
        self.fail_at = fail_at
        self.right = right
        self.tokens_run = 0

    def launch(self, schedule: Schedule) -> StepResult:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("told to fail")
        for admission in schedule.admissions:
            self.tables[admission.slot] = []
            self.known[admission.slot] = list(admission.token_ids)
        for slot, column, block in zip(
            schedule.block_slots, schedule.block_columns, schedule.block_ids, strict=True
        ):
            assert column <= len(self.tables[slot]), "block tables have no gaps"
            assert column == len(self.tables[slot]) or schedule.beams, "only those of beams are overwritten"
            self.tables[slot][column:] = [block]
        copies = schedule.copies or Copies()
        for block, place in zip(copies.save_blocks, copies.save_places, strict=True):
            self.host[place] = self.cache[self._block(block)]
        for place, block in zip(copies.load_places, copies.load_blocks, strict=True):
            self.cache[self._block(block)] = self.host[place]
        for source, target in schedule.copied_blocks:
            self.cache[self._block(target)] = self.cache[self._block(source)]
        rows = list(zip(schedule.slots, schedule.starts, schedule.counts, strict=True))
        assert len({slot for slot, _, _ in rows}) == len(rows), "a slot runs once a step"
        assert schedule.num_tokens == sum(schedule.counts)
        assert schedule.num_sampled == sum(schedule.samples)
        self.tokens_run += schedule.num_tokens
        for row, (slot, start, count) in enumerate(rows):
            drafts, known = schedule.drafts.get(row, []), self.known[slot]
            for index in range(count):
                position, drafted = start + index, index - (count - len(drafts))
                token_id = known[position] if position < len(known) else self.last[slot]
                if row in schedule.ids:
                    token_id = schedule.ids[row][index]
                self.cache[self._address(slot, position)] = drafts[drafted] if drafted >= 0 else token_id
        result = StepResult([])
        at = 0
        for row, (slot, start, count) in enumerate(rows):
            samples, drafts = schedule.samples[row], schedule.drafts.get(row, [])
            if not samples:
                assert not drafts
                continue
            assert samples == len(drafts) + 1
            context = [self.cache[self._address(slot, p)] for p in range(start + count - len(drafts))]
            ids = []
            for index in range(samples):
                ids.append(next_id(context, schedule.banned.get(at + index, ())))
                context.append(ids[-1])
                if index < len(drafts) and drafts[index] != ids[-1]:
                    break
            at += samples
            self.last[slot] = ids[-1]
            result.token_ids.append(ids)
            if row in schedule.wanted:
                result.drafts[row] = self._propose(context, schedule.wanted[row])
        for group in schedule.beams:
            beams = [
                [self.cache[self._address(slot, p)] for p in range(start + count)]
                for slot, start, count in rows[group.row : group.row + len(group.scores)]
            ]
            result.beams.append(continuations(beams, group.scores, group.num_candidates))
        return result

    def drain(self) -> None:
        """Do nothing: every step has ended when it has been launched."""

    def load_adapter_parts(self, index: int, adapter: Any) -> Iterator[int]:
        raise NotImplementedError("the fake runner has no adapters")

    def _propose(self, context: list[int], count: int) -> list[int]:
        """Guess up to ``count`` ids, the same for the same context."""
        drafts: list[int] = []
        draw = Random(crc32(bytes(context)))
        for _ in range(draw.randint(0, count) if self.right < 1 else count):
            token_id = next_id([*context, *drafts])
            drafts.append(token_id if draw.random() < self.right else draw.randrange(VOCAB))
        return drafts

    def collect(self, handle: StepResult) -> StepResult:
        return handle

    def _block(self, block: int) -> slice:
        return slice(block * self.block_size, (block + 1) * self.block_size)

    def _address(self, slot: int, position: int) -> int:
        return self.tables[slot][position // self.block_size] * self.block_size + position % self.block_size
