"""The engine: requests in, token ids out, one step at a time.

A step is scheduled, launched on a runner, and collected; up to ``steps_in_flight`` steps are launched before the
oldest is collected, so that a runner whose work is asynchronous never waits for the host. Everything here is plain
Python over integers; the runner is the only thing that knows a model.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import compress
from typing import Any, TypedDict

from vllmlite.engine.adapters import AdapterSource
from vllmlite.engine.beams import BeamSearch, Continuation, Hypothesis
from vllmlite.engine.block_pool import root_digest
from vllmlite.engine.bounds import RequestBounds
from vllmlite.engine.drafts import DraftPolicy
from vllmlite.engine.request import Grammar, Request, Status
from vllmlite.engine.runner_protocol import Runner, StepResult, TokenLogprobs
from vllmlite.engine.saved_prefixes import SavedPrefixes
from vllmlite.engine.schedule import Schedule
from vllmlite.engine.scheduler import Limits, Scheduler
from vllmlite.engine.thinking import ReasoningMarks, ThinkingBudget
from vllmlite.engine.tiers import Copies, Tiers
from vllmlite.engine.trace import Trace, TracedRunner, TraceEvent
from vllmlite.errors import EngineDeadError, ParameterError
from vllmlite.outputs import TIER_EVENTS, EngineStats, RequestMetrics
from vllmlite.sampling_params import SamplingParams
from vllmlite.signals import came_from_handler

logger = logging.getLogger(__name__)

ADAPTER_BYTES = 4 << 20
"""Bytes of an adapter that are put on the device before a step, if requests run."""
ADAPTER_SECONDS = 0.01
"""Maximum time that a step without anything to run waits for an adapter to be read."""
DISK_POLL_SECONDS = 0.05
"""Most seconds that a step waits for blocks from disk if nothing else can run."""


@dataclass(slots=True)
class EngineOutput:
    """What one step produced for one request. An output with a ``finish_reason`` is the request's last."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    num_cached_tokens: int
    metrics: RequestMetrics
    logprobs: list[TokenLogprobs] | None = None
    """Log-probabilities of ``new_token_ids``."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Log-probabilities of all prompt tokens but the first; set in a single output, once all of them are known."""
    ends_in_text: bool = False
    """Whether the last token is part of the text although the request ended with ``stop``: it completed a grammar."""
    pooled: list[float] | None = None
    """The vector of a pooling request, which gets no tokens."""
    beams: list[Hypothesis] | None = None
    """The outputs that beam search found, the best first. Such a request gets no ``new_token_ids``."""
    error: str | None = None
    """The message of the error, if ``finish_reason`` is ``error``."""


class RequestOptions(TypedDict, total=False):
    """The keyword arguments of :meth:`Engine.add_request`."""

    bad_words: Sequence[Sequence[int]]
    grammar: Grammar | None
    priority: int
    cache_salt: str | None
    arrival_time: float | None
    pooling_type: str | None
    adapter: Any


@dataclass(slots=True)
class _StepLog:
    """A step whose results are being applied: enough to finish applying them after an interrupt."""

    outputs: list[EngineOutput]
    first: int
    """Index in ``outputs`` of the step's first output; those before it belong to earlier steps."""
    schedule: Schedule
    rows: list[Request]

    def positions(self) -> dict[str, int]:
        """Request id → index in the request's output of the first id that the step samples."""
        schedule = self.schedule
        columns = zip(self.rows, schedule.starts, schedule.counts, schedule.samples, strict=True)
        return {
            r.request_id: start + count - max(samples - 1, 0) - len(r.prompt_token_ids)
            for r, start, count, samples in columns
        }


class Engine:
    """Admits requests, runs steps and applies stop conditions. Not thread-safe.

    Every call is atomic, even if an exception interrupts it. The requests hold all state that matters: their prompts,
    their output ids and whether they have finished. Everything else (queues, slots, blocks, the prefix cache, steps in
    flight) can be rebuilt from them. A call that was interrupted leaves ``_changing`` set, and the next call then
    rebuilds (:meth:`_restore`): the prefix cache is empty afterwards, and running requests are computed again."""

    def __init__(
        self,
        limits: Limits,
        runner: Runner,
        *,
        vocab_size: int,
        eos_ids: Sequence[int] = (),
        steps_in_flight: int = 1,
        seed: int = 0,
        max_logprobs: int = -1,
        reasoning: ReasoningMarks | None = None,
        drafting: DraftPolicy | None = None,
        cache_format: str = "",
        adapters: AdapterSource | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        """Start without requests. Requests without a seed of their own derive one from ``seed``. Without ``drafting``
        nothing is speculated. Block hashes depend on ``cache_format``, which says how the key/value cache stores
        numbers. Without ``adapters`` no request can have one. With ``tiers`` the runner must have places for blocks in
        host memory."""
        self.scheduler = Scheduler(limits, drafting or DraftPolicy(0), tiers)
        self.stats = EngineStats(
            num_blocks=limits.num_blocks, block_size=limits.block_size, max_adapters=limits.max_adapters
        )
        self.runner = runner
        self.bounds = RequestBounds(
            vocab_size, frozenset(eos_ids), limits.max_model_len, max_logprobs, reasoning,
            max_beams=self.scheduler.max_beams,
            num_blocks=limits.num_blocks, block_size=limits.block_size,
        )  # fmt: skip
        self._steps_in_flight = steps_in_flight
        self._seed = seed
        self._cache_format = cache_format
        self.adapters = adapters
        self._trace: Trace | None = None
        self._requests: dict[str, Request] = {}
        self._prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self._in_flight: deque[tuple[Schedule, list[Request], Any]] = deque()
        self._num_added = 0
        self.saved_prefixes: SavedPrefixes | None = None
        """Saves prompts to files and restores them, if there is a directory for that."""
        self._busy_since = 0.0
        """When the runner began the oldest step in flight."""
        self._changing = False
        """Set while a call changes the engine; still set by the next one if that call was interrupted."""
        self._log: _StepLog | None = None

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        bad_words: Sequence[Sequence[int]] = (),
        grammar: Grammar | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
        pooling_type: str | None = None,
        adapter: Any = None,
    ) -> Request:
        """Queue a request. Raises :class:`ParameterError`, and adds nothing, if it can never be served.

        ``bad_words`` are token sequences. ``grammar`` must not be shared with another request. Requests with different
        ``cache_salt`` share no blocks of the prefix cache. With ``pooling_type`` the request gets a vector of its
        prompt and no tokens. ``adapter`` is what :attr:`adapters` reads a LoRA adapter from, if it does not know it."""
        self._restore_if_interrupted()
        if request_id in self._requests:
            raise ParameterError("request_id", request_id, "is in use by a request that has not finished")
        bounds = self.bounds
        prompt = bounds.check(prompt_token_ids, params, bad_words, generates=pooling_type is None)
        longest = bounds.max_model_len
        if params.max_tokens is not None:
            longest = min(longest, len(prompt) + params.max_tokens)
        if pooling_type is not None:
            longest = len(prompt) + 1
        if params.thinking_token_budget is not None and bounds.reasoning is not None:
            grammar = ThinkingBudget(
                bounds.reasoning, params.thinking_token_budget, prompt, bounds.vocab_size, grammar
            )
        key = None if adapter is None else self.adapter_source().identify(adapter)
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=params,
            seed=self._derive_seed() if params.seed is None else params.seed % 2**64,
            max_total_tokens=longest,
            stop_ids=bounds.stop_ids(params),
            eos_ids=bounds.eos_ids,
            root=self.prefix_root(cache_salt or "", *([key.digest] if key else [])),
            metrics=RequestMetrics(
                time.monotonic() if arrival_time is None else arrival_time, num_prompt_tokens=len(prompt)
            ),
            bad_words=[tuple(word) for word in bad_words],
            grammar=grammar,
            pooling_type=pooling_type,
            priority=priority,
            adapter=key,
            order=self._num_added,
            acceptance=self.scheduler.drafting.begin(),
        )
        if params.beams is not None:
            request.beams = BeamSearch(request, params.beams)
        self._changing = True
        self._num_added += 1
        self._requests[request_id] = request
        self.scheduler.add(request)
        self.stats.num_prompt_tokens += len(prompt)
        self._changing = False
        return request

    def has_unfinished_requests(self) -> bool:
        """Whether any request has not finished."""
        return bool(self._requests)

    def finish(self, request_id: str, reason: str = "abort", stop_reason: int | str | None = None) -> bool:
        """End a request: ``abort``, or ``stop`` for a stop string. False if there is no such request (any more)."""
        self._restore_if_interrupted()
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._changing = True
        self._end(request, reason, stop_reason, time.monotonic())
        self._changing = False
        return True

    def start_trace(self) -> None:
        """Start recording steps. Drops an earlier recording. Call it between two steps."""
        self.stop_trace()
        self._trace = Trace()
        self.runner = TracedRunner(self.runner, self._trace)

    def stop_trace(self) -> list[TraceEvent]:
        """Stop recording; returns the events, none if no recording was started."""
        if self._trace is None or not isinstance(self.runner, TracedRunner):
            return []
        self.runner, trace, self._trace = self.runner.runner, self._trace, None
        return trace.events

    def step(self, outputs: list[EngineOutput] | None = None) -> list[EngineOutput]:
        """Launch steps until ``steps_in_flight`` are in flight, then collect the oldest.

        Appends the outputs to ``outputs`` (default: a new list) and returns that list. If the call is interrupted, the
        ids whose outputs are in the list are final, and the others will be sampled again, with the same result: the
        caller loses nothing by keeping the list. If a step raises an Exception that did not come from a signal
        handler, the requests of all steps in flight end with ``error``; the engine and the waiting requests go on.
        Raises EngineDeadError if a process that computes the model has ended."""
        if outputs is None:
            outputs = []
        if self._trace is None:
            self._step(outputs)
        else:
            with self._trace.span("step", running=len(self.scheduler.running)):
                self._step(outputs)
        return outputs

    def _step(self, outputs: list[EngineOutput]) -> None:
        self._restore_if_interrupted()
        self._changing = True
        try:
            if self.scheduler.adapters.in_use:
                self._load_adapters(outputs, 0.0)
            while len(self._in_flight) < self._steps_in_flight:
                if self._in_flight and self._in_flight[-1][0].holds_back():
                    break
                now = time.monotonic()
                schedule, rows = self.scheduler.schedule(now)
                if schedule.is_empty:
                    break
                self._launch(schedule, rows, now)
            if self._in_flight:
                self._collect(outputs)
            elif self.scheduler.adapters.in_use:
                self._load_adapters(outputs, ADAPTER_SECONDS)
            elif self.scheduler.tiers is not None and self.scheduler.tiers.is_waiting:
                self.scheduler.tiers.wait(DISK_POLL_SECONDS)
            if self.scheduler.tiers is not None and not self._requests:
                self._flush(outputs, self.scheduler.tiers)
        except EngineDeadError:
            raise  # the runner is gone: no later step can succeed
        except Exception as error:
            if came_from_handler(error):
                raise
            logger.exception("a step failed; its requests end with an error")
            self._fail(error, outputs)
        self._changing = False

    def _launch(self, schedule: Schedule, rows: list[Request], now: float) -> None:
        if not self._in_flight:
            self._busy_since = now
        self._in_flight.append((schedule, rows, None))
        self._in_flight[-1] = (schedule, rows, self.runner.launch(schedule))
        self.stats.num_steps += 1

    def _collect(self, outputs: list[EngineOutput]) -> None:
        schedule, rows, handle = self._in_flight[0]
        result = self.runner.collect(handle)
        self._in_flight.popleft()
        tiers = self.scheduler.tiers
        if tiers is not None and schedule.copies is not None:
            now = time.monotonic()
            tiers.cost.record_step(schedule.num_tokens, now - self._busy_since)
            tiers.settled(schedule.copies)
            self._busy_since = now
        self._apply(schedule, rows, result, outputs)

    def _flush(self, outputs: list[EngineOutput], tiers: Tiers) -> None:
        """Save blocks, now that nothing runs. Only a disk needs to know when the copies are done."""
        schedule = self.scheduler.flush()
        if not schedule.is_empty:
            self._launch(schedule, [], time.monotonic())
            while self._in_flight and tiers.disk is not None:
                self._collect(outputs)

    def adapter_source(self) -> AdapterSource:
        """Return the reader of adapters. Raises ParameterError if requests cannot have any."""
        if self.adapters is None:
            raise ParameterError("enable_lora", False, "must be True for requests with an adapter")
        return self.adapters

    def add_adapter(self, source: Any) -> None:
        """Read and check an adapter, so that requests with it need not wait for that."""
        self.adapter_source().identify(source)

    def remove_adapter(self, source: Any) -> bool:
        """Forget an adapter; unfinished requests that use it go on. Returns whether it was known."""
        self.scheduler.adapters.forget(source)
        return self.adapter_source().forget(source)

    def _load_adapters(self, outputs: list[EngineOutput], timeout: float) -> None:
        """Put adapters that requests wait for on the device: a part of each, or all of them if nothing runs. Wait for
        their files for up to ``timeout`` seconds."""
        scheduler = self.scheduler
        scheduler.assign_adapters(len(self._in_flight))
        most = ADAPTER_BYTES if scheduler.running else sys.maxsize
        for waiting, error in scheduler.adapters.load(self.adapter_source(), self.runner, most, timeout):
            logger.warning("an adapter cannot be loaded; the requests that wait for it end: %s", error)
            self._log = _StepLog(outputs, len(outputs), Schedule(), [])
            for request in waiting:
                self._end_with_error(request, str(error), outputs)
            self._log = None
        scheduler.assign_adapters(len(self._in_flight))

    def prefix_root(self, cache_salt: str = "", *adapter: str) -> bytes:
        """Return the parent hash of the first block of a text, with the digest of its ``adapter``."""
        return root_digest("salt", cache_salt, self._cache_format, *adapter, private=bool(cache_salt))

    def run_copies(self, copies: Copies) -> None:
        """Have the runner make copies, and wait for them. Raises ParameterError while requests run."""
        tiers, outputs = self.scheduler.tiers, list[EngineOutput]()
        assert tiers is not None
        if self._requests:
            raise ParameterError("id_slot", len(self._requests), "requests are running: try again later")
        tiers.save_evicted(copies)
        if copies:
            self._launch(Schedule(copies=copies), [], time.monotonic())
            while self._in_flight:
                self._collect(outputs)

    def change_prefix(self, token_ids: tuple[int, ...], action: str, name: str = "") -> int:
        """Save what the cache has of a text in a file, erase it from memory, or restore the file; returns the number of
        tokens. Raises ParameterError."""
        self._restore_if_interrupted()
        if self.saved_prefixes is None:
            raise ParameterError("slot_save_path", None, "must be a directory to save prompts in")
        self.run_copies(Copies())  # refuses while requests run
        self._changing = True
        try:
            count = self.saved_prefixes.change(token_ids, action, name)
        except ParameterError:
            self._changing = False
            raise
        self._changing = False
        return count

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, in all tiers."""
        self._restore_if_interrupted()
        self._changing = True
        if self.scheduler.tiers is None:
            self.scheduler.pool.forget_all()
        else:
            self.scheduler.tiers.forget_all()
        self._changing = False

    def current_stats(self) -> EngineStats:
        """The counters, brought up to date."""
        scheduler, stats = self.scheduler, self.stats
        stats.num_running = len(scheduler.running)
        stats.num_waiting = scheduler.num_waiting
        stats.num_used_blocks = scheduler.pool.num_used
        stats.peak_used_blocks = scheduler.pool.peak_used
        stats.num_preemptions = scheduler.num_preemptions
        stats.prefix_cache_queries = scheduler.prefix_queries
        stats.prefix_cache_hits = scheduler.prefix_hits
        if scheduler.tiers is not None:
            counts = scheduler.tiers.counts
            stats.external_prefix_cache_queries = counts.queries
            stats.external_prefix_cache_hits = counts.hits
            for name in TIER_EVENTS:
                setattr(stats, f"tier_blocks_{name}", getattr(counts, name))
        if stats.max_adapters:
            stats.running_adapters = _adapter_names(scheduler.running)
            stats.waiting_adapters = _adapter_names(
                each for each in self._requests.values() if each.is_waiting
            )
        return stats

    def _derive_seed(self) -> int:
        return int.from_bytes(sha256(f"{self._seed}/{self._num_added}".encode()).digest()[:8], "little")

    def _apply(
        self, schedule: Schedule, rows: list[Request], result: StepResult, outputs: list[EngineOutput]
    ) -> None:
        """Apply a step's result, one request after the other: append its output, which makes the ids final, then update
        the request."""
        now = time.monotonic()
        first = len(outputs)
        finished, scheduler = Status.FINISHED, self.scheduler
        self._log = _StepLog(outputs, first, schedule, rows)
        if result.prompt_logprobs:
            self._keep_prompt_logprobs(schedule, rows, result.prompt_logprobs)
        token_ids = result.token_ids
        logprobs: Sequence[list[TokenLogprobs] | None] = result.logprobs or [None] * len(token_ids)
        sampling = compress(rows, schedule.samples)
        num_tokens = 0
        for request, sampled, ids, entries in zip(
            sampling, filter(None, schedule.samples), token_ids, logprobs, strict=True
        ):
            if request.status is finished or request.beams is not None:
                continue
            reason: str | None = None
            stop_reason: int | None = None
            complete, count = False, 0
            for token_id in ids:
                count += 1
                complete = request.grammar is not None and request.grammar.accept(token_id)
                if token_id in request.stop_ids:
                    reason = "stop"
                    if token_id not in request.eos_ids or request.params.ignore_eos:
                        stop_reason = token_id
                    break
                if complete:
                    reason = "stop"
                    break
                if request.num_tokens - request.num_in_flight + count >= request.max_total_tokens:
                    reason = "length"
                    break
            output = EngineOutput(
                request.request_id,
                ids if count == len(ids) else ids[:count],
                reason,
                stop_reason,
                request.num_cached_tokens or 0,
                request.metrics,
            )
            if complete:
                output.ends_in_text = token_id not in request.stop_ids
            if entries is not None and request.params.num_logprobs is not None:
                output.logprobs = entries[:count]
            if self._prompt_logprobs:
                output.prompt_logprobs = self._prompt_logprobs.get(request.request_id)
            outputs.append(output)
            scheduler.collected(request, output.new_token_ids, sampled - count)
            num_tokens += count
            if sampled > 1:
                self._count_drafts(request, sampled - 1, count - 1, len(rows))
            request.metrics.count_tokens(now, count)
            if output.prompt_logprobs is not None:
                del self._prompt_logprobs[request.request_id]
            if reason is not None:
                self._end(request, reason, stop_reason, now)
        for beams, continuations in zip(schedule.beams, result.beams, strict=True):
            num_tokens += len(beams.scores)
            self._apply_beams(rows[beams.row], continuations, now, outputs)
        self.stats.num_generation_tokens += num_tokens
        for row in schedule.wanted:
            scheduler.proposed(rows[row], result.drafts.get(row, []))
        for row, vector in result.pooled.items():
            request = rows[row]
            if request.status is not Status.FINISHED:
                outputs.append(
                    EngineOutput(
                        request.request_id, [], "stop", None, request.num_cached_tokens or 0, request.metrics,
                        pooled=vector,
                    )
                )  # fmt: skip
                self._end(request, "stop", None, now)
        self._log = None

    def _apply_beams(
        self, row: Request, continuations: Sequence[Continuation], now: float, outputs: list[EngineOutput]
    ) -> None:
        """Apply the continuations that were chosen of the request to which ``row`` belongs."""
        search = row.beams
        assert isinstance(search, BeamSearch)
        request = search.request
        if request.status is Status.FINISHED:
            return
        state = search.following(continuations)
        request.metrics.count_tokens(now, 1)
        if not state.is_done:
            search.advance(self.scheduler, state)
            return
        best = state.finished[0]
        outputs.append(
            EngineOutput(
                request.request_id, [], best.finish_reason, best.stop_reason, request.num_cached_tokens or 0,
                request.metrics, prompt_logprobs=self._prompt_logprobs.get(request.request_id),
                beams=state.finished,
            )
        )  # fmt: skip
        self._end(request, best.finish_reason, best.stop_reason, now)

    def _count_drafts(self, request: Request, drafts: int, accepted: int, rows: int) -> None:
        self.scheduler.drafting.record(request.acceptance, drafts, accepted)
        stats = self.stats
        drafting = self.scheduler.drafting
        stats.draft_seconds += drafting.row_cost(drafts, rows)
        stats.plain_seconds += (accepted + 1) * drafting.row_cost(0, rows)
        stats.num_drafts += 1
        stats.num_draft_tokens += drafts
        stats.num_accepted_tokens += accepted
        counts = stats.num_accepted_tokens_per_pos
        counts += (0,) * (drafts - len(counts))
        stats.num_accepted_tokens_per_pos = tuple(
            count + (position < accepted) for position, count in enumerate(counts)
        )

    def _keep_prompt_logprobs(
        self, schedule: Schedule, rows: list[Request], found: dict[int, list[TokenLogprobs]]
    ) -> None:
        for row, entries in found.items():
            if rows[row].status is not Status.FINISHED:
                kept = self._prompt_logprobs.setdefault(rows[row].request_id, [])
                kept[schedule.starts[row] :] = entries

    def _end(self, request: Request, reason: str, stop_reason: int | str | None, now: float) -> None:
        self.scheduler.finish(request, reason, stop_reason, now)
        del self._requests[request.request_id]
        self._prompt_logprobs.pop(request.request_id, None)

    def _end_with_error(self, request: Request, reason: str, outputs: list[EngineOutput]) -> None:
        if request.is_waiting:
            outputs.append(_error_output(request, reason))
            self._end(request, "error", None, time.monotonic())

    def _fail(self, error: Exception, outputs: list[EngineOutput]) -> None:
        """End the requests of the steps in flight with ``error``; without any, the running ones, or else all, so that a
        step that always fails cannot be repeated for ever. Requests that have got an output of the failed step go on.
        The prefix cache is emptied, since the contents of its blocks are unknown."""
        reason = f"{type(error).__name__}: {error}"
        self.stats.num_failed_steps += 1
        self.stats.last_error = reason
        first = len(outputs) if self._log is None else self._log.first
        served = {output.request_id for output in outputs[first:]}
        self._restore_requests()
        in_flight = {id(row.first): row.first for _, rows, _ in self._in_flight for row in rows}
        failed = list(in_flight.values()) or self.scheduler.running or list(self._requests.values())
        self._log = _StepLog(outputs, len(outputs), Schedule(), [])
        for request in failed:
            if request.status is not Status.FINISHED and request.request_id not in served:
                outputs.append(_error_output(request, reason))
        self._restore()

    def _restore_if_interrupted(self) -> None:
        if self._changing:
            self._restore()

    def _restore(self) -> None:
        """Rebuild everything from the requests, as if all unfinished ones had just been preempted.

        If it is interrupted itself, the next call starts it again."""
        self._restore_requests()
        self._in_flight.clear()
        self._prompt_logprobs = {}
        self._requests = {
            request_id: request
            for request_id, request in self._requests.items()
            if request.status is not Status.FINISHED
        }
        for request in self._requests.values():
            request.restart()
        self.scheduler.restart(self._requests.values())
        self._changing = False

    def _restore_requests(self) -> None:
        """Apply the outputs of an interrupted step to their requests; those that were applied are not applied twice."""
        if self._log is None:
            return
        positions = self._log.positions()
        for output in self._log.outputs[self._log.first :]:
            request = self._requests.get(output.request_id)
            if request is None:
                continue
            if output.new_token_ids:
                request.output_token_ids[positions[output.request_id] :] = output.new_token_ids
            if output.finish_reason is not None:
                request.finish(output.finish_reason, output.stop_reason, time.monotonic())
        self._log = None


def _adapter_names(requests: Iterable[Request]) -> tuple[str, ...]:
    """Return the names of the adapters of ``requests``."""
    return tuple(sorted({request.adapter.name for request in requests if request.adapter is not None}))


def _error_output(request: Request, reason: str) -> EngineOutput:
    """Return the last output of a request that ends with an error."""
    cached = request.num_cached_tokens or 0
    return EngineOutput(request.request_id, [], "error", None, cached, request.metrics, error=reason)
