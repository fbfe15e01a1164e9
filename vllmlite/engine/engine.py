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
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from vllmlite.engine.adapters import AdapterSource
from vllmlite.engine.beams import BeamSearch
from vllmlite.engine.block_pool import root_digest
from vllmlite.engine.bounds import RequestBounds
from vllmlite.engine.drafts import DraftPolicy
from vllmlite.engine.engine_output import EngineOutput
from vllmlite.engine.request import Grammar, Request, Status
from vllmlite.engine.runner_protocol import Runner
from vllmlite.engine.saved_prefixes import SavedPrefixes
from vllmlite.engine.schedule import Schedule
from vllmlite.engine.scheduler import Limits, Scheduler
from vllmlite.engine.sleeping import CanSleep
from vllmlite.engine.statistics import refresh_stats
from vllmlite.engine.thinking import ReasoningMarks, ThinkingBudget
from vllmlite.engine.tiers import Copies, Tiers
from vllmlite.engine.trace import Trace, TracedRunner, TraceEvent
from vllmlite.engine.unfinished import UnfinishedRequests
from vllmlite.errors import EngineDeadError, ParameterError
from vllmlite.outputs import EngineStats, RequestMetrics
from vllmlite.sampling_params import SamplingParams
from vllmlite.signals import came_from_handler

logger = logging.getLogger(__name__)

ADAPTER_BYTES = 4 << 20
"""Bytes of an adapter that are put on the device before a step, if requests run."""
ADAPTER_SECONDS = 0.01
"""Maximum time that a step without anything to run waits for an adapter to be read."""
DISK_POLL_SECONDS = 0.05
"""Most seconds that a step waits for blocks from disk if nothing else can run."""


class Engine(CanSleep):
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
        """Start without requests.

        ``seed`` determines the seeds of requests without one. Without ``drafting`` there is no speculative decoding.
        ``cache_format`` names the number format of the key/value cache and goes into block hashes. Without ``adapters``
        no request can have an adapter. With ``tiers`` the runner must have host memory for blocks."""
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
        self._unfinished = UnfinishedRequests(self.scheduler, self.stats)
        self._in_flight: deque[tuple[Schedule, list[Request], Any]] = deque()
        self._num_added = 0
        self.saved_prefixes: SavedPrefixes | None = None
        """Saves prompts to files and restores them; None if there is no directory for that."""
        self._busy_since = 0.0
        """Time at which the runner began the oldest step in flight, from :func:`time.monotonic`."""
        self._changing = False
        """Set while a call changes the engine. If it is set when a call begins, the call before was interrupted."""

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
        self.check_awake()
        self._restore_if_interrupted()
        if request_id in self._unfinished.by_id:
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
        self._unfinished.by_id[request_id] = request
        self.scheduler.add(request)
        self.stats.num_prompt_tokens += len(prompt)
        self._changing = False
        return request

    def has_unfinished_requests(self) -> bool:
        """Return whether any request has not finished."""
        return bool(self._unfinished.by_id)

    def finish(self, request_id: str, reason: str = "abort", stop_reason: int | str | None = None) -> bool:
        """End a request with ``reason``: ``abort``, or ``stop`` for a stop string. Returns False if there is no
        unfinished request with this id."""
        self._restore_if_interrupted()
        request = self._unfinished.by_id.get(request_id)
        if request is None:
            return False
        self._changing = True
        self._unfinished.end(request, reason, stop_reason, time.monotonic())
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
        Raises EngineDeadError if a process that computes the model has ended, EngineSleepingError if the engine
        sleeps."""
        self.check_awake()
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
            # In a pipeline, steps in flight have other requests in any case.
            in_pipeline = self.scheduler.limits.stages > 1
            while len(self._in_flight) < self._steps_in_flight:
                if self._in_flight and not in_pipeline and self._in_flight[-1][0].holds_back():
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
            if self.scheduler.tiers is not None and not self._unfinished.by_id:
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
        self._unfinished.apply(schedule, rows, result, outputs)

    def _flush(self, outputs: list[EngineOutput], tiers: Tiers, everything: bool = False) -> None:
        """Save blocks to the cache tiers while nothing runs. With a disk, wait until they are copied."""
        schedule = self.scheduler.flush(everything)
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
        """Load adapters that requests wait for to the device: a part of each, or all parts if nothing runs. Wait for
        their files for up to ``timeout`` seconds."""
        scheduler = self.scheduler
        scheduler.assign_adapters(len(self._in_flight))
        most = ADAPTER_BYTES if scheduler.running else sys.maxsize
        for waiting, error in scheduler.adapters.load(self.adapter_source(), self.runner, most, timeout):
            logger.warning("an adapter cannot be loaded; the requests that wait for it end: %s", error)
            self._unfinished.end_with_error(waiting, str(error), outputs)
        scheduler.assign_adapters(len(self._in_flight))

    def prefix_root(self, cache_salt: str = "", *adapter: str) -> bytes:
        """Return the parent hash of the first block of a text with ``cache_salt`` and the digest of an ``adapter``."""
        return root_digest("salt", cache_salt, self._cache_format, *adapter, private=bool(cache_salt))

    def run_copies(self, copies: Copies) -> None:
        """Have the runner copy blocks between the pool and host memory, and wait for that. Raises ParameterError while
        requests run."""
        tiers, outputs = self.scheduler.tiers, list[EngineOutput]()
        assert tiers is not None
        if self._unfinished.by_id:
            raise ParameterError(
                "id_slot", len(self._unfinished.by_id), "requests are running: try again later"
            )
        tiers.save_evicted(copies)
        if copies:
            self._launch(Schedule(copies=copies), [], time.monotonic())
            while self._in_flight:
                self._collect(outputs)

    def change_prefix(self, token_ids: tuple[int, ...], action: str, name: str = "") -> int:
        """Do ``action`` with the cached blocks of a text: ``save`` them in the file ``name``, ``erase`` them from
        memory, or ``restore`` the file to the cache. Returns the number of tokens of these blocks. Raises
        ParameterError if that is not possible."""
        self.check_awake()
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
        """Update the statistics from the scheduler, and return them."""
        refresh_stats(self.stats, self.scheduler)
        self.stats.sleep_level = self.sleep_level
        return self.stats

    def _derive_seed(self) -> int:
        return int.from_bytes(sha256(f"{self._seed}/{self._num_added}".encode()).digest()[:8], "little")

    def _fail(self, error: Exception, outputs: list[EngineOutput]) -> None:
        """End requests after a step has failed with ``error``: those of the steps in flight; if there are none, the
        running ones; if there are none either, all, so that a step that always fails is not repeated for ever.

        Requests that got an output of the failed step go on. The prefix cache is emptied, since the contents of its
        blocks are unknown."""
        reason = f"{type(error).__name__}: {error}"
        self.stats.num_failed_steps += 1
        self.stats.last_error = reason
        served = self._unfinished.served()
        self._unfinished.settle()
        in_flight = {id(row.first): row.first for _, rows, _ in self._in_flight for row in rows}
        failed = list(in_flight.values()) or self.scheduler.running or list(self._unfinished.by_id.values())
        unserved = [
            request
            for request in failed
            if request.status is not Status.FINISHED and request.request_id not in served
        ]
        self._unfinished.append_errors(unserved, reason, outputs)
        self._restore()

    def _restore_if_interrupted(self) -> None:
        if self._changing:
            self._restore()

    def _restore(self) -> None:
        """Rebuild all state from the requests, as if all unfinished ones had just been preempted.

        If this call is interrupted, the next one starts it again."""
        self._unfinished.settle()
        self._in_flight.clear()
        if self.scheduler.tiers is not None:
            self.runner.drain()
        self._unfinished.restart()
        self.scheduler.restart(self._unfinished.by_id.values())
        self._changing = False
