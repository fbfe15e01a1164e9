"""The model runner: turns a :class:`~vllmlite.engine.schedule.Schedule` into a step on a backend, and returns the
sampled ids.

It never sees a request. All that it knows of a sequence came with its admission to a slot. The ids sampled since then
stay on the device, where the next step gathers them, so that a step can be launched before the last one is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Backend, KVCache
from vllmlite.backends.batch import AdapterRows, ForwardBatch, SlotParams, SlotSpec, Tensor
from vllmlite.backends.sampling import Continuations, Sampled
from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Admission, Schedule
from vllmlite.errors import BackendError, ParameterError
from vllmlite.models.interface import AdaptableModel, KeepingModel, Model
from vllmlite.runner.batches import host_batch
from vllmlite.runner.beams import choose_beams, read_beams
from vllmlite.runner.graphs import Graphs
from vllmlite.runner.kv_transfer import start_copies
from vllmlite.runner.logprobs import RowLogprobs, named_logprobs, prompt_logprobs, read_logprobs, read_rows
from vllmlite.runner.masks import pack_bits, restrict
from vllmlite.runner.pooling import Pool, Pooling
from vllmlite.runner.propose.proposer import Proposer
from vllmlite.runner.propose.rejection import RejectionSampler
from vllmlite.weights.adapter import HEAD, Adapter, AdapterLimits

T = TypeVar("T")


@dataclass(slots=True)
class Launched:
    """A launched step, whose results :meth:`ModelRunner.collect` reads."""

    schedule: Schedule
    sampled: Sampled | None = None
    probabilities: Tensor = None
    """Distributions of the sampled ids; None unless the runner keeps them."""
    accepted: Tensor | None = None
    """1 for each sampled id that is accepted, else 0; None if the step has no drafts, so that all are accepted."""
    beams: Continuations | None = None
    """The continuations that were chosen of the schedule's beams."""
    proposal: Any = None
    """The handle that the proposer returned for the step."""
    prompt_logprobs: list[RowLogprobs] = field(default_factory=list)
    named_logprobs: list[RowLogprobs] = field(default_factory=list)
    """Log-probabilities of the ids that requests list in ``logprob_token_ids``."""
    pools: list[Pool] = field(default_factory=list)
    hidden: Tensor | None = None
    """Hidden states of all tokens of the step; None unless ``pools`` need them."""


class ModelRunner:
    """Owns the KV pool and the slots of one model on one backend."""

    def __init__(
        self,
        backend: Backend,
        model: Model,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_model_len: int,
        enforce_eager: bool = False,
        proposer: Proposer | None = None,
        adapters: AdapterLimits | None = None,
        num_places: int = 0,
        samples: bool = True,
        rejection: RejectionSampler | None = None,
    ) -> None:
        """Allocate the pool, the slots, and host memory for ``num_places`` blocks. Raises BackendError if they do not
        fit.

        A schedule may ask for drafts if there is a ``proposer``, and for copies if ``num_places`` is not 0; sequences
        may have adapters within the limits of ``adapters``. ``samples`` is False for a stage of a pipeline before the
        last one, whose model returns no logits."""
        self.backend = backend
        self.model = model
        self.num_blocks = num_blocks
        self.samples = samples
        """Whether the model returns logits; False in a stage of a pipeline before the last one."""
        self._empty = backend.tensor(np.zeros(1, np.int32))
        self.proposer = proposer
        self._rejection = rejection
        """Verifies drafts by rejection sampling; None: an id is sampled at each draft, which is accepted if it equals
        that id."""
        self.keeps_probabilities = False
        """Whether steps keep the distributions of the ids that they sample."""
        self.kv: KVCache = backend.alloc_kv(model.kv_spec, num_blocks)
        self.host_blocks = backend.host_blocks(self.kv, model.kv_spec, num_places) if num_places else None
        max_blocks = -(-max_model_len // model.kv_spec.block_size)
        self.slots = backend.alloc_slots(
            SlotSpec(max_num_seqs, max_blocks, max_model_len, model.vocab_size, num_blocks)
        )
        self.adapter_limits = adapters
        if adapters is not None:
            self._adaptable().enable_adapters(adapters)
        self._adapters = np.zeros(max_num_seqs, np.int32)
        """Index of each slot's adapter."""
        graph_rows = () if enforce_eager else tuple(backend.graph_rows(max_num_seqs))
        self.graphs = Graphs(
            backend, self._logits, self.slots, model.kv_spec, graph_rows, adapters=adapters is not None
        )
        self._known: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * max_num_seqs
        self._num_known = np.zeros(max_num_seqs, np.int32)
        self._num_prompt = np.zeros(max_num_seqs, np.int32)
        self._num_logprobs = np.full(max_num_seqs, -1, np.int32)
        self._num_prompt_logprobs = np.zeros(max_num_seqs, np.int32)
        self._named_ids: dict[int, list[int]] = {}
        """Slot → the ids whose log-probabilities its request wants."""
        self._allowed: dict[int, NDArray[np.uint32]] = {}
        self._pooling_type: list[str | None] = [None] * max_num_seqs
        self._pooling = Pooling(backend)

    def profile(self, num_tokens: int, waits: bool = True) -> None:
        """Run a step of ``num_tokens`` tokens in as many rows as there are slots, on block 0, and discard its results.
        If it ``waits``, return once the step is done."""
        num_rows = min(len(self._known), num_tokens)
        counts = np.diff(np.arange(num_rows + 1, dtype=np.int32) * num_tokens // num_rows)
        rows = np.arange(num_rows, dtype=np.int32)
        for slot in range(num_rows):
            self.backend.set_slot(self.slots, slot, SlotParams())
        batch = host_batch(rows.tolist(), [0] * num_rows, counts.tolist(), [1] * num_rows)
        batch.token_ids = np.zeros(num_tokens, np.int32)
        columns = -(-int(counts.max()) // self.model.kv_spec.block_size)
        places = np.tile(np.arange(columns, dtype=np.int32), num_rows)
        self.backend.append_blocks(self.slots, np.repeat(rows, columns), places, np.zeros_like(places))
        key = self.graphs.find(batch)
        device_batch = self.backend.upload(batch, self.slots, self.model.kv_spec, key)
        outputs = self._logits(device_batch) if key is None else self.graphs.run(key, device_batch)
        if self.samples:
            self._sample(outputs[0], device_batch)
        if waits:
            self.backend.to_host(self._empty)

    def release(self) -> None:
        """Free device memory until :meth:`restore`, while no step is in flight and no sequence has a slot. The
        key/value caches lose their contents; weights and adapters are kept."""
        if self.proposer is not None:
            self.proposer.forget_cached()
        self.backend.release(self._caches)

    def restore(self) -> None:
        """Allocate the memory again. Raises BackendError if there is too little; it may then be called again."""
        self.backend.restore(self._caches)

    @property
    def _caches(self) -> list[KVCache]:
        return [self.kv, *(() if self.proposer is None else self.proposer.caches)]

    def load_adapter(self, index: int, adapter: Adapter) -> None:
        """Put ``adapter`` at ``index``, as :meth:`load_adapter_parts` does, all its parts at once."""
        for _ in self.load_adapter_parts(index, adapter):
            pass

    def load_adapter_parts(self, index: int, adapter: Adapter) -> Iterator[int]:
        """Put ``adapter`` at ``index``, from 1 to the limit, in place of the one that is there, one weight after the
        other; yields the bytes of each.

        No step in flight and no admitted sequence may have that index; steps that are launched after the last part may.
        Raises ParameterError if it exceeds the limits or does not fit the model, and BackendError if it does not fit
        into memory; then there is no adapter at ``index``."""
        limits = self.adapter_limits or AdapterLimits(0, 0)
        if not 0 < index <= limits.max_adapters:
            raise ParameterError("adapter", index, f"there is room for {limits.max_adapters} adapters")
        if adapter.rank > limits.max_rank:
            raise ParameterError("max_lora_rank", limits.max_rank, f"the adapter has rank {adapter.rank}")
        try:
            yield from self._adaptable().set_adapter_parts(index, adapter)
        except (ParameterError, BackendError):
            self._adaptable().set_adapter(index, None)
            raise

    def drain(self) -> None:
        """Wait for the block copies that have been issued."""
        if self.host_blocks is not None:
            self.host_blocks.wait()

    def host_memory(self) -> list[NDArray[np.uint8]]:
        """Return the host memory for blocks, ``[places, bytes]``; empty if there is none."""
        return [] if self.host_blocks is None else [self.host_blocks.memory]

    def _adaptable(self) -> AdaptableModel:
        if not isinstance(self.model, AdaptableModel):
            raise ParameterError(
                "enable_lora",
                True,
                f"needs a native model; {type(self.model).__name__} runs without adapters",
            )
        return self.model

    def unload_adapter(self, index: int) -> None:
        """Remove the adapter at ``index``, which no step in flight and no admitted sequence has."""
        self._adaptable().set_adapter(index, None)

    def launch(self, schedule: Schedule) -> Launched:
        """Start a step on the backend, and return its handle for :meth:`collect`."""
        for admission in schedule.admissions:
            self._admit(admission)
        if schedule.block_ids:
            columns = (schedule.block_slots, schedule.block_columns, schedule.block_ids)
            self.backend.append_blocks(self.slots, *(np.array(column, np.int32) for column in columns))
            if self.proposer is not None:
                self.proposer.append_blocks(*columns)
        launched = Launched(schedule)
        if self.host_blocks is not None and schedule.copies is not None:
            written = [*schedule.block_ids, *(target for _, target in schedule.copied_blocks)]
            start_copies(self.host_blocks, schedule.copies, written)
            if not schedule.slots:
                return launched
        if schedule.copied_blocks:
            sources, targets = np.array(schedule.copied_blocks, np.int32).T
            self.backend.copy_blocks(self.kv, sources, self.kv, targets)
        batch, starts = self._batch(schedule)
        key = None
        if not (schedule.prompt_logprobs or schedule.pools):
            if schedule.drafts:
                self.graphs.record_if_frequent(batch)
            key = self.graphs.find(batch)
        device_batch = self.backend.upload(batch, self.slots, self.model.kv_spec, key)
        if not self.samples:
            if key is None:
                self._forward(device_batch)
            else:
                self.graphs.run(key, device_batch)
            return launched
        samples = len(batch.logits_rows) > 0
        hidden, logits = None, None
        states: Sequence[Tensor] = ()
        if key is None:
            hidden, states = self._forward(device_batch)
            logits = self._output(hidden, device_batch) if samples else None
        else:
            logits, *states = self.graphs.run(key, device_batch)
            # The next run overwrites what this one returns; all tokens are sampled from, and padding comes after them.
            states = [self.backend.rows(state, self._every_token(batch)) for state in states]
        if self.proposer is not None:
            if states:
                self.proposer.keep_states(schedule, states)
            launched.proposal = self.proposer.launch([schedule.slots[row] for row in _drawing_rows(schedule)])
        if samples:
            launched.named_logprobs = self._named(logits, batch)
            if schedule.beams:
                launched.beams = choose_beams(self.backend, logits, self.slots, device_batch, schedule.beams)
            if not schedule.beams or _drawing_rows(schedule):
                if self.keeps_probabilities:
                    launched.probabilities = self.backend.probabilities(logits, self.slots, device_batch)
                launched.sampled, accepted = self._sample(logits, device_batch, batch)
                launched.accepted = accepted if schedule.drafts else None
        launched.prompt_logprobs = [
            chunk
            for row in schedule.prompt_logprobs
            for chunk in self._prompt_logprobs(hidden, batch, row, starts[row])
        ]
        launched.pools = [self._pool(schedule, batch, row) for row in schedule.pools]
        launched.hidden = hidden if launched.pools else None
        return launched

    def collect(self, handle: Launched) -> StepResult:
        """Wait for a step and read what it sampled."""
        result = StepResult([])
        if not self.samples:
            self.backend.to_host(self._empty)  # waits for the step
            return result
        if handle.sampled is not None:
            ids = self.backend.to_host(handle.sampled.ids)
            spans = self._accepted_spans(handle)
            result.token_ids = _split(ids.tolist(), spans)
            if handle.sampled.logprobs is not None:
                logprobs = read_logprobs(self.backend, ids, handle.sampled.logprobs)
                for row, entry in read_rows(self.backend, handle.named_logprobs):
                    logprobs[row].named.append(entry)
                result.logprobs = _split(logprobs, spans)
            if self.proposer is not None:
                self._propose(handle, result)
        else:
            result.token_ids = [[] for _ in range(handle.schedule.num_sampled)]
        if handle.beams is not None:
            result.beams = read_beams(self.backend, handle.schedule.beams, handle.beams)
        for row, entry in read_rows(self.backend, handle.prompt_logprobs):
            result.prompt_logprobs.setdefault(row, []).append(entry)
        if handle.pools:
            result.pooled = self._pooling.read(handle.pools, handle.hidden)
        if self.host_blocks is not None and handle.schedule.copies:
            self.host_blocks.wait()
        return result

    def _accepted_spans(self, handle: Launched) -> list[tuple[int, int]] | None:
        """Return, for each row that samples, its first sampled position and the one after its last accepted position.
        None if every row has one sampled position."""
        if handle.accepted is None:
            return None
        ends = np.cumsum([samples for samples in handle.schedule.samples if samples])
        starts = np.concatenate(([0], ends[:-1]))
        counts = np.add.reduceat(self.backend.to_host(handle.accepted), starts)
        return list(zip(starts.tolist(), (starts + counts).tolist(), strict=True))

    def _propose(self, handle: Launched, result: StepResult) -> None:
        """Give the accepted ids of a step to the proposer, and put the drafts that the step's schedule wants into
        ``result``."""
        assert self.proposer is not None
        schedule, wanted = handle.schedule, handle.schedule.wanted
        sampling = _drawing_rows(schedule)
        counts = [wanted.get(row, 0) for row in sampling]
        of_row = dict(
            zip(compress(range(len(schedule.slots)), schedule.samples), result.token_ids, strict=True)
        )
        found = self.proposer.collect(handle.proposal, [of_row[row] for row in sampling], counts)
        result.drafts = {row: drafts for row, drafts in zip(sampling, found, strict=True) if drafts}

    def _pool(self, schedule: Schedule, batch: ForwardBatch, row: int) -> Pool:
        slot, start, count = schedule.slots[row], schedule.starts[row], schedule.counts[row]
        pooling_type, num_prompt = self._pooling_type[slot], int(self._num_prompt[slot])
        assert pooling_type is not None
        span = int(batch.query_start_loc[row]), int(batch.query_start_loc[row + 1])
        return Pool(row, slot, pooling_type, span, start == 0, start + count == num_prompt, num_prompt)

    def _admit(self, admission: Admission) -> None:
        slot, params = admission.slot, admission.params
        known = np.array(admission.token_ids, np.int32)
        penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (
            1.0,
            0.0,
            0.0,
        )
        slot_params = SlotParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=admission.seed,
            logit_bias=tuple((params.logit_bias or {}).items()),
            prompt_ids=admission.token_ids[: admission.num_prompt_tokens] if penalised else (),
            output_ids=admission.token_ids[admission.num_prompt_tokens :] if penalised else (),
        )
        self.backend.set_slot(self.slots, slot, slot_params)
        if self._rejection is not None:
            self._rejection.admit(slot, slot_params)
        if self.proposer is not None:
            self.proposer.admit(slot, admission.token_ids, admission.num_prompt_tokens)
        self._known[slot] = known
        self._num_known[slot] = len(known)
        self._num_prompt[slot] = admission.num_prompt_tokens
        self._num_logprobs[slot] = self._top(params.num_logprobs)
        self._num_prompt_logprobs[slot] = self._top(params.prompt_logprobs)
        self._pooling_type[slot] = admission.pooling_type
        self._adapters[slot] = admission.adapter
        self._allowed.pop(slot, None)
        self._named_ids.pop(slot, None)
        if params.logprob_token_ids:
            self._named_ids[slot] = list(dict.fromkeys(params.logprob_token_ids))
        if params.allowed_token_ids is not None:
            self._allowed[slot] = pack_bits(np.array(params.allowed_token_ids), self.model.vocab_size)

    def _top(self, count: int | None) -> int:
        if count is None:
            return -1
        return self.model.vocab_size if count == -1 else count

    def _batch(self, schedule: Schedule) -> tuple[ForwardBatch, NDArray[np.int32]]:
        batch = host_batch(schedule.slots, schedule.starts, schedule.counts, schedule.samples)
        starts, slots = np.array(schedule.starts, np.int32), batch.slots
        token_ids, query_start_loc, sample_slots = batch.token_ids, batch.query_start_loc, batch.sample_slots
        for row in np.flatnonzero(starts < self._num_known[slots]).tolist():
            start, count, at = schedule.starts[row], schedule.counts[row], query_start_loc[row]
            known = self._known[schedule.slots[row]][start : start + count]
            token_ids[at : at + len(known)] = known
        for row, ids in schedule.ids.items():
            token_ids[query_start_loc[row] : query_start_loc[row + 1]] = ids
        for row, drafts in schedule.drafts.items():
            end = query_start_loc[row + 1]
            token_ids[end - len(drafts) : end] = drafts
        adapters = self._adapters[slots]
        if adapters.any():
            batch.adapters = adapters
        if len(sample_slots):
            batch.num_logprobs = int(self._num_logprobs[sample_slots].max())
            if schedule.banned or schedule.masks or self._allowed:
                restrict(batch, schedule, self._allowed, self.model.vocab_size)
        return batch, starts

    def _logits(self, batch: ForwardBatch) -> Sequence[Tensor]:
        """Return the logits of an uploaded batch. This part of a step is captured: which kernels run depends on the
        number of rows and of their tokens alone."""
        hidden, states = self._forward(batch, batch.logits_rows)
        return [self._output(hidden, batch), *states] if self.samples else []

    def _forward(self, batch: ForwardBatch, rows: Tensor = None) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the final hidden states of an uploaded batch, and of the tokens ``rows`` (default: all) those that the
        proposer reads."""
        kept = () if self.proposer is None else self.proposer.states
        if not kept:
            return self.model.forward(batch, self.kv), ()
        rows = self._every_token(batch) if rows is None else rows
        return cast(KeepingModel, self.model).forward_keeping(batch, self.kv, kept, rows)

    def _every_token(self, batch: ForwardBatch) -> Tensor:
        return self.backend.tensor(np.arange(batch.num_tokens, dtype=np.int32))

    def _output(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        return self._logits_of(self.backend.rows(hidden, batch.logits_rows), batch.sample_adapters)

    def _logits_of(self, hidden: Tensor, adapters: AdapterRows) -> Tensor:
        if adapters is None:
            return self.model.logits(hidden)
        return cast(AdaptableModel, self.model).logits(hidden, adapters)

    def _sample(
        self, logits: Tensor, batch: ForwardBatch, host: ForwardBatch | None = None
    ) -> tuple[Sampled, Tensor]:
        """Sample from the logits of an uploaded batch; also returns which of the ids are accepted. Drafts that were
        drawn at random are verified if ``host`` is the same batch on the host."""
        if self._rejection is not None and host is not None and self._rejection.concerns(host):
            sampled = self._rejection.sample(logits, self.slots, host, batch)
        else:
            sampled = self.backend.sample(logits, self.slots, batch)
        return sampled, self.backend.accept(sampled.ids, self.slots, batch)

    def _named(self, logits: Tensor, batch: ForwardBatch) -> list[RowLogprobs]:
        """Compute log-probabilities of the ids that the requests of sampling rows name, of unmodified logits."""
        if not self._named_ids:
            return []
        slots = enumerate(batch.sample_slots.tolist())
        wanted = [(row, self._named_ids[slot]) for row, slot in slots if slot in self._named_ids]
        return named_logprobs(self.backend, logits, wanted)

    def _prompt_logprobs(
        self, hidden: Tensor, batch: ForwardBatch, row: int, start: int
    ) -> Iterator[RowLogprobs]:
        """Compute log-probabilities of the prompt tokens that follow those of ``row``, which begins at position
        ``start``."""
        slot = batch.slots[row]
        first, last = batch.query_start_loc[row], batch.query_start_loc[row + 1]
        adapter = 0 if batch.adapters is None else batch.adapters[row]
        changes_head = adapter and HEAD in self.backend.adapter_abilities
        targets = self._known[slot][start + 1 : min(start + 1 + last - first, self._num_prompt[slot])]
        k = int(self._num_prompt_logprobs[slot])

        def logits(states: Tensor, count: int) -> Tensor:
            rows = self.backend.adapter_rows(np.full(count, adapter, np.int32)) if changes_head else None
            return self._logits_of(states, rows)

        return prompt_logprobs(self.backend, logits, hidden, row, first, targets, k)


def _drawing_rows(schedule: Schedule) -> list[int]:
    """Return the rows that sample ids, without the rows of beams."""
    beams = {row for group in schedule.beams for row in range(group.row, group.row + len(group.scores))}
    return [row for row, samples in enumerate(schedule.samples) if samples and row not in beams]


def _split(values: list[T], spans: list[tuple[int, int]] | None) -> list[list[T]]:
    """Return the values of each span ``(first, end)``; if ``spans`` is None, each value in a list of its own."""
    if spans is None:
        return [[value] for value in values]
    return [values[first:end] for first, end in spans]
