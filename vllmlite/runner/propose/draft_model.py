"""Drafts from a draft model: a smaller checkpoint with the same vocabulary continues the text.

The draft model runs only if drafts are wanted. It first computes the positions that it has not computed yet, at most
``budget`` of them in a step over all sequences; a sequence with more gets no drafts until all of them are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress, takewhile

from vllmlite.backends.batch import Tensor
from vllmlite.engine.schedule import Admission, Schedule
from vllmlite.runner.propose.cached import CachedProposer, CachedSequence
from vllmlite.runner.propose.rejection import RejectionSampler
from vllmlite.runner.runner import ModelRunner
from vllmlite.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)


class DraftedSequence(CachedSequence):
    """The state of a draft model for a sequence."""

    __slots__ = ()

    def append(self, token_ids: list[int]) -> None:
        """Append the ids that the target model sampled. Positions of accepted drafts count as computed, except that of
        the last draft, which the draft model never read."""
        if self.num_computed == len(self.token_ids):
            pairs = zip(self.drafts[:-1], token_ids[:-1], strict=False)
            self.num_computed += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        super().append(token_ids)


class ModelProposer(CachedProposer[DraftedSequence]):
    """Proposes the ids with which a draft model continues the text."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_model_len: int,
        budget: int,
        vocab_size: int,
        rejection: RejectionSampler | None = None,
    ) -> None:
        """Propose with the draft model of ``runner``, whose cache has as many blocks as the target model's, for
        sequences of up to ``max_model_len`` tokens. Drafts have ids below ``vocab_size``, the size of the target
        model's vocabulary: the most likely ids, or with ``rejection`` ids that are drawn at random."""
        super().__init__(DraftedSequence, runner.model.kv_spec.block_size, max_model_len, ahead=0)
        self.runner = runner
        self.caches = (runner.kv,)
        self._budget = budget
        self._vocab_size = vocab_size
        self._rejection = rejection
        runner.keeps_probabilities = rejection is not None

    def profile(self, num_rows: int) -> None:
        """Compute one draft in each of ``num_rows`` rows and discard it, to measure its time."""
        self.runner.profile(num_rows)

    def _draft(self, asked: Mapping[int, DraftedSequence], counts: Mapping[int, int]) -> None:
        """Compute the known tokens of ``asked`` that are not computed yet, within the budget, then ``counts[slot]``
        drafts of every sequence whose known tokens are all computed. All steps are launched before the first draft is
        read."""
        schedule = self._catch_up(asked, counts)
        slots = list(compress(schedule.slots, schedule.samples))
        steps: list[tuple[list[int], Tensor, Tensor]] = []
        while slots:
            launched = self.runner.launch(schedule)
            assert launched.sampled is not None
            steps.append((slots, launched.sampled.ids, launched.probabilities))
            slots = [slot for slot in slots if counts[slot] > len(steps)]
            starts = [len(asked[slot].token_ids) + len(steps) - 1 for slot in slots]
            schedule = _schedule(slots, starts, [1] * len(slots), [1] * len(slots))
        if not steps and schedule.slots:
            self.runner.launch(schedule)
        to_host = self.runner.backend.to_host
        if self._rejection is not None:
            self._rejection.begin([*asked])
        for slots, ids, probabilities in steps:
            drafted = list(zip(slots, to_host(ids).tolist(), strict=True))
            for slot, token_id in drafted:
                asked[slot].drafts.append(token_id)
            if self._rejection is not None:
                for (slot, token_id), row in zip(drafted, to_host(probabilities), strict=True):
                    position = len(asked[slot].token_ids) + len(asked[slot].drafts) - 1
                    self._rejection.add(slot, position, token_id, token_id, row)
        for sequence in asked.values():
            sequence.drafts = list(takewhile(lambda token_id: token_id < self._vocab_size, sequence.drafts))

    def _admission(self, slot: int) -> Admission:
        if self._rejection is None:
            return Admission(slot, [], 0, GREEDY, 0)
        own = self._rejection.draft_params(slot)
        params = SamplingParams(
            temperature=own.temperature, top_k=own.top_k, top_p=own.top_p, min_p=own.min_p
        )
        return Admission(slot, [], 0, params, own.seed)

    def _catch_up(self, asked: Mapping[int, DraftedSequence], counts: Mapping[int, int]) -> Schedule:
        """Return the step that computes known tokens of ``asked`` that are not computed yet, within the budget. It
        samples the first draft of sequences whose known tokens are then all computed."""
        schedule = _schedule([], [], [], [])
        budget = self._budget
        for slot, sequence in asked.items():
            if not budget:
                break
            if sequence.num_uploaded < 0:
                schedule.admissions.append(self._admission(slot))
                self._find_computed(sequence)
            start = sequence.num_computed
            ids = sequence.token_ids[start : start + budget]
            if max(ids) >= self.runner.model.vocab_size:
                sequence.dropped = True
                continue
            budget -= len(ids)
            end = start + len(ids)
            caught_up = end == len(sequence.token_ids)
            self._mark(sequence, start, end, end + counts[slot] - 1 if caught_up else end)
            new = self._new_blocks(sequence)
            schedule.block_slots += [slot] * len(new)
            schedule.block_columns += new
            schedule.block_ids += sequence.blocks[new.start : new.stop]
            schedule.drafts[len(schedule.slots)] = ids
            schedule.slots.append(slot)
            schedule.starts.append(start)
            schedule.counts.append(len(ids))
            schedule.samples.append(int(caught_up))
        schedule.num_tokens, schedule.num_sampled = sum(schedule.counts), sum(schedule.samples)
        return schedule


def _schedule(slots: list[int], starts: list[int], counts: list[int], samples: list[int]) -> Schedule:
    """Return a step with these rows, without admissions."""
    return Schedule(
        slots=slots,
        starts=starts,
        counts=counts,
        samples=samples,
        num_tokens=sum(counts),
        num_sampled=sum(samples),
    )
