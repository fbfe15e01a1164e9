"""Drafts from an EAGLE head or an MTP layer, which read hidden states of the target model.

The head's state of position p depends on the target model's hidden states of p and on token p + 1. The hidden states
of each launched step are kept until the head has computed their positions. It does so where drafts are wanted, and
where a sequence has more than :data:`STRETCH` positions to catch up: prompts therefore go through the head with their
steps, while sequences for which drafts do not pay cost next to nothing and are never far behind.

The first positions of a sequence may be in the target model's prefix cache, or in a cache tier, but not in the head's
cache, and then nobody has their hidden states any more. They are computed with hidden states of zero; a sequence with
more than :data:`MOST_UNKNOWN` of them gets no drafts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Backend, KVCache
from vllmlite.backends.batch import ForwardBatch, SlotParams, SlotSpec, Tensor
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.engine.schedule import Schedule
from vllmlite.runner.batches import host_batch
from vllmlite.runner.propose.cached import CachedProposer, CachedSequence
from vllmlite.runner.propose.rejection import RejectionSampler

STRETCH = 128
"""Maximum number of positions of a sequence that the head may leave uncomputed."""
MOST_UNKNOWN = 1024
"""Maximum number of positions of a sequence that the head computes without their hidden states."""


class DraftHead(Protocol):
    """A decoder layer that drafts from hidden states of the target model: an EAGLE head or an MTP layer."""

    backend: Backend
    kv_spec: KVSpec
    states: tuple[int, ...]
    """Indices of the layers of the target model whose inputs the head reads, or ``FINAL`` for the final hidden
    states."""
    state_size: int
    """Number of elements of each of these hidden states."""
    vocab_size: int
    """Number of ids that have an embedding."""
    draft_vocab_size: int
    target_ids: NDArray[np.int32]
    """For each id of the draft vocabulary, the id of the same token in the target model."""

    def fused(self, states: Sequence[Tensor]) -> Tensor:
        """Return the hidden state ``[T, hidden]`` that the head computes from the target model's ``states``."""
        ...

    def forward(
        self, token_ids: Tensor, hidden: Tensor, batch: ForwardBatch, kv: KVCache, *, drafted: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the positions of ``batch`` from their hidden states ``hidden [T, hidden]`` and the ids after them,
        ``token_ids [T]``; write keys and values to ``kv``. ``drafted``: the ids are of the draft vocabulary.

        Returns the input of :meth:`logits`, and the hidden states for the next draft."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits ``[N, draft_vocab_size]``."""
        ...


class _States:
    """The hidden states of a step, on the device, and also on the host once they were needed there."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.host: list[NDArray[np.float32]] = []


@dataclass(slots=True)
class _Segment:
    """A run of positions of a sequence, whose hidden states are those of adjacent tokens of a step."""

    start: int
    stop: int
    states: _States
    token: int
    """Index in the step of the token at position ``start``."""


@dataclass(slots=True)
class EagleSequence(CachedSequence):
    """The state of a draft head for a sequence."""

    segments: list[_Segment] = field(default_factory=list)
    """Runs of positions with known hidden states, ascending and without gaps."""

    @property
    def stop(self) -> int:
        """End of the positions that the head can compute: their hidden states and the ids after them are known."""
        return min(self.segments[-1].stop if self.segments else 0, len(self.token_ids) - 1)

    def keep(self, segment: _Segment) -> None:
        """Add the positions of a step, in place of those of rejected drafts."""
        while self.segments and self.segments[-1].start >= segment.start:
            self.segments.pop()
        if self.segments:
            self.segments[-1].stop = segment.start
        self.segments.append(segment)

    def forget(self) -> None:
        """Drop the hidden states of computed positions."""
        self.segments = [segment for segment in self.segments if segment.stop > self.num_computed]
        if self.segments:
            first = self.segments[0]
            first.token += max(self.num_computed - first.start, 0)
            first.start = max(self.num_computed, first.start)


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Drafts on the device."""

    ids: Tensor
    """Ids of the draft vocabulary, ``[rows]`` or ``[steps, rows]``."""
    probabilities: Tensor = None
    """With rejection sampling: the distributions from which they were drawn, ``[rows, draft_vocab_size]``."""


class EagleProposer(CachedProposer[EagleSequence]):
    """Proposes the chain of the most likely ids of a draft head."""

    def __init__(
        self,
        head: DraftHead,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_model_len: int,
        rejection: RejectionSampler | None = None,
    ) -> None:
        """Allocate the head's cache, with as many blocks as the target model's. Sequences of more than
        ``max_model_len`` tokens get no drafts. Drafts are the most likely ids, or with ``rejection`` ids that are drawn
        at random."""
        super().__init__(EagleSequence, head.kv_spec.block_size, max_model_len, ahead=1)
        self.head = head
        self.states = head.states
        self._backend = backend = head.backend
        self._kv = backend.alloc_kv(head.kv_spec, num_blocks)
        self.caches = (self._kv,)
        max_blocks = -(-max_model_len // head.kv_spec.block_size)
        self._slots = backend.alloc_slots(
            SlotSpec(max_num_seqs, max_blocks, max_model_len, head.draft_vocab_size, num_blocks)
        )
        self._max_num_seqs = max_num_seqs
        self._rejection = rejection

    def profile(self, num_rows: int) -> None:
        """Compute one draft in each of ``num_rows`` rows and discard it, to measure its time."""
        rows = list(range(min(num_rows, self._max_num_seqs)))
        zeros, ones = [0] * len(rows), [1] * len(rows)
        for slot in rows:
            self._backend.set_slot(self._slots, slot, SlotParams())
        self._append(rows, zeros, zeros)
        batch = self._upload(host_batch(rows, zeros, ones, ones))
        hidden = self._fused([(None, np.zeros(len(rows), np.int32))])
        normed, _ = self.head.forward(self._ids(zeros), hidden, batch, self._kv)
        self._backend.to_host(self._sample(normed, batch).ids)

    def keep_states(self, schedule: Schedule, states: Sequence[Tensor]) -> None:
        """Keep the hidden states of a step that was launched: for each of :attr:`states`, those of all its tokens.
        Called before :meth:`launch`."""
        step, token = _States(states), 0
        behind: dict[int, EagleSequence] = {}
        kept: list[_Segment] = []
        for slot, start, count in zip(schedule.slots, schedule.starts, schedule.counts, strict=True):
            sequence = self._sequences[slot]
            if not sequence.segments and sequence.num_uploaded < 0:
                self._find_computed(sequence)
            sequence.keep(_Segment(start, start + count, step, token))
            sequence.dropped |= start + count > self._max_model_len
            token += count
            if sequence.stop - sequence.num_computed > STRETCH and not sequence.dropped:
                behind[slot] = sequence
        if behind:
            self._compute(behind, dict.fromkeys(behind, 1))
        for slot in schedule.slots:
            sequence = self._sequences[slot]
            if sequence.dropped:
                sequence.segments.clear()
            kept += [segment for segment in sequence.segments if segment.states is step]
        self._compact(step, kept, token)

    def _compact(self, step: _States, kept: list[_Segment], num_tokens: int) -> None:
        """Drop a step's hidden states except those of the segments ``kept``, which have ``num_tokens`` tokens."""
        spans = [range(segment.token, segment.token + segment.stop - segment.start) for segment in kept]
        if sum(map(len, spans)) == num_tokens:
            return
        index = self._ids([token for span in spans for token in span])
        step.tensors = [self._backend.rows(state, index) for state in step.tensors] if kept else []
        step.host, token = [], 0
        for segment, span in zip(kept, spans, strict=True):
            segment.token, token = token, token + len(span)

    def _draft(self, asked: Mapping[int, EagleSequence], counts: Mapping[int, int]) -> None:
        """Compute the positions of ``asked`` that are not computed, then a chain of ``counts[slot]`` drafts of each
        sequence. All drafts are launched before the first is read."""
        slots, batch, normed, hidden = self._compute(asked, counts)
        if not slots:
            return
        if self._rejection is not None:
            self._rejection.begin(slots)
        drafts, known = [(slots, self._sample(normed, batch))], 1
        while going := [row for row, slot in enumerate(slots) if counts[slot] > known]:
            if len(going) < len(slots):
                slots = [slots[row] for row in going]
                hidden = self._backend.rows(hidden, self._ids(going))
            steps = min(counts[slot] for slot in slots) - known
            starts = [asked[slot].num_computed + known - 1 for slot in slots]
            found, hidden = self._chain(slots, starts, hidden, steps)
            drafts += [(slots, sampled) for sampled in found]
            known += steps
        for slots, sampled in drafts:
            self._read(asked, slots, sampled)

    def _read(self, asked: Mapping[int, EagleSequence], slots: list[int], sampled: _Sampled) -> None:
        """Wait for drafts and append them to the sequences in ``slots``."""
        places = self._backend.to_host(sampled.ids).reshape(-1, len(slots))
        token_ids = self.head.target_ids[places]
        for slot, column in zip(slots, token_ids.T.tolist(), strict=True):
            asked[slot].drafts += column
        if self._rejection is not None:
            rows = self._backend.to_host(sampled.probabilities)
            for slot, token_id, place, row in zip(slots, token_ids[0].tolist(), places[0], rows, strict=True):
                position = len(asked[slot].token_ids) + len(asked[slot].drafts) - 1
                self._rejection.add(slot, position, token_id, place, row, self.head.target_ids)

    def _chain(
        self, slots: list[int], starts: list[int], hidden: Tensor, steps: int
    ) -> tuple[list[_Sampled], Tensor]:
        """Compute ``steps`` positions from ``starts``, each from the draft before it, which its slot knows. Returns the
        drafts and the last hidden states."""
        ones, found = [1] * len(slots), []
        batch = self._backend.upload(host_batch(slots, starts, ones, ones), self._slots, self.head.kv_spec)
        for step in range(steps):
            if step:
                further = host_batch(slots, [start + step for start in starts], ones, ones)
                batch = self._backend.upload(further, self._slots, self.head.kv_spec)
            normed, hidden = self.head.forward(batch.token_ids, hidden, batch, self._kv, drafted=True)
            found.append(self._sample(normed, batch))
        return found, hidden

    def _sample(self, normed: Tensor, batch: ForwardBatch) -> _Sampled:
        """Return drafts after the sampled positions of ``batch``, which their slots then know."""
        backend, logits = self._backend, self.head.logits(normed)
        probabilities = None
        if self._rejection is not None:
            probabilities = backend.probabilities(logits, self._slots, batch)
        ids = backend.sample(logits, self._slots, batch).ids
        backend.accept(ids, self._slots, batch)
        return _Sampled(ids, probabilities)

    def _compute(
        self, asked: Mapping[int, EagleSequence], counts: Mapping[int, int]
    ) -> tuple[list[int], Any, Tensor, Tensor]:
        """Compute the positions of ``asked`` that are not computed, before a chain of ``counts[slot]`` drafts. Returns
        the slots, the uploaded batch, which samples at the last position of each, and the two results of
        :meth:`DraftHead.forward` for these."""
        slots, starts, lengths = [], [], []
        token_ids: list[int] = []
        parts: list[tuple[_States | None, NDArray[np.int32]]] = []
        for slot, sequence in asked.items():
            start, stop = sequence.num_computed, sequence.stop
            ids = sequence.token_ids[start + 1 : stop + 1]
            if max(ids, default=0) >= self.head.vocab_size:
                sequence.dropped = True
            sequence.dropped |= sequence.segments[0].start - start > MOST_UNKNOWN
            if sequence.dropped or not ids:
                continue
            if sequence.num_uploaded < 0:
                params = SlotParams() if self._rejection is None else self._rejection.draft_params(slot)
                self._backend.set_slot(self._slots, slot, params)
            new = self._new_blocks(sequence)
            if new:
                self._append([slot] * len(new), new, sequence.blocks[new.start : new.stop])
            parts += self._parts(sequence, start, stop)
            self._mark(sequence, start, stop, stop + counts[slot] - 1)
            sequence.forget()
            slots.append(slot)
            starts.append(start)
            lengths.append(stop - start)
            token_ids += ids
        if not slots:
            return [], None, None, None
        batch = self._upload(host_batch(slots, starts, lengths, [1] * len(slots)))
        normed, hidden = self.head.forward(self._ids(token_ids), self._fused(parts), batch, self._kv)
        if len(token_ids) > len(slots):
            rows = self._backend.rows
            normed, hidden = rows(normed, batch.logits_rows), rows(hidden, batch.logits_rows)
        return slots, batch, normed, hidden

    def _parts(
        self, sequence: EagleSequence, start: int, stop: int
    ) -> list[tuple[_States | None, NDArray[np.int32]]]:
        """Return where the hidden states of positions ``start`` to ``stop`` are: pairs of a step and token indices in
        it; None as the step if they are not known."""
        parts: list[tuple[_States | None, NDArray[np.int32]]] = []
        first = sequence.segments[0].start
        if first > start:
            parts.append((None, np.zeros(first - start, np.int32)))
            sequence.num_marked = -(-first // self._block_size)
        for segment in sequence.segments:
            at, end = max(start, segment.start), min(stop, segment.stop)
            if at < end:
                offset = segment.token - segment.start
                parts.append((segment.states, np.arange(at + offset, end + offset, dtype=np.int32)))
        return parts

    def _fused(self, parts: Sequence[tuple[_States | None, NDArray[np.int32]]]) -> Tensor:
        """Return the head's input for the hidden states of ``parts``, in their order. If they come from several steps,
        they are joined on the host."""
        backend, (first, _) = self._backend, parts[0]
        if first is not None and all(states is first for states, _ in parts):
            index = backend.tensor(np.concatenate([index for _, index in parts]))
            return self.head.fused([backend.rows(state, index) for state in first.tensors])
        joined = []
        for number in range(len(self.states)):
            pieces = []
            for states, index in parts:
                if states is None:
                    pieces.append(np.zeros((len(index), self.head.state_size), np.float32))
                    continue
                if not states.host:
                    states.host = [backend.to_host(tensor) for tensor in states.tensors]
                pieces.append(states.host[number][index])
            joined.append(backend.tensor(np.concatenate(pieces), backend.dtype))
        return self.head.fused(joined)

    def _upload(self, batch: ForwardBatch) -> ForwardBatch:
        batch.token_ids = np.zeros(batch.num_tokens, np.int32)  # the head gets the ids by themselves
        return self._backend.upload(batch, self._slots, self.head.kv_spec)

    def _append(self, slots: Iterable[int], columns: Iterable[int], blocks: Iterable[int]) -> None:
        arrays = [np.array(list(values), np.int32) for values in (slots, columns, blocks)]
        self._backend.append_blocks(self._slots, arrays[0], arrays[1], arrays[2])

    def _ids(self, values: Iterable[int]) -> Tensor:
        return self._backend.tensor(np.array(list(values), np.int32))
