"""The requests that have not finished, to which the results of steps are applied."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

from vllmlite.engine.beams import BeamSearch, Continuation
from vllmlite.engine.engine_output import EngineOutput, error_output
from vllmlite.engine.request import Request, Status
from vllmlite.engine.runner_protocol import StepResult, TokenLogprobs
from vllmlite.engine.schedule import Schedule
from vllmlite.engine.scheduler import Scheduler
from vllmlite.engine.statistics import count_drafts
from vllmlite.outputs import EngineStats


@dataclass(slots=True)
class StepLog:
    """A step whose results are being applied, with all that is needed to finish that after an interrupt."""

    outputs: list[EngineOutput]
    first: int
    """Index in ``outputs`` of the step's first output; those before it belong to earlier steps."""
    schedule: Schedule
    rows: list[Request]

    def positions(self) -> dict[str, int]:
        """Return, for each request id, the index in the request's output of the first id that the step samples."""
        schedule = self.schedule
        columns = zip(self.rows, schedule.starts, schedule.counts, schedule.samples, strict=True)
        return {
            r.request_id: start + count - max(samples - 1, 0) - len(r.prompt_token_ids)
            for r, start, count, samples in columns
        }


class UnfinishedRequests:
    """Applies the results of steps and the stop conditions to requests, and ends requests.

    An exception may interrupt :meth:`apply` and :meth:`end_with_error` anywhere: :meth:`settle` then finishes them."""

    def __init__(self, scheduler: Scheduler, stats: EngineStats) -> None:
        """Start without requests. Generated tokens and drafts are counted in ``stats``."""
        self.by_id: dict[str, Request] = {}
        self._scheduler = scheduler
        self._stats = stats
        self._prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        """Request id → log-probabilities of its prompt's tokens so far."""
        self._log: StepLog | None = None

    def apply(
        self, schedule: Schedule, rows: list[Request], result: StepResult, outputs: list[EngineOutput]
    ) -> None:
        """Apply a step's result, one request after the other: append its output, which makes the ids final, then update
        the request."""
        now = time.monotonic()
        first = len(outputs)
        finished, scheduler = Status.FINISHED, self._scheduler
        self._log = StepLog(outputs, first, schedule, rows)
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
                scheduler.drafting.record(request.acceptance, sampled - 1, count - 1)
                count_drafts(self._stats, scheduler.drafting, sampled - 1, count - 1, len(rows))
            request.metrics.count_tokens(now, count)
            if output.prompt_logprobs is not None:
                del self._prompt_logprobs[request.request_id]
            if reason is not None:
                self.end(request, reason, stop_reason, now)
        for beams, continuations in zip(schedule.beams, result.beams, strict=True):
            num_tokens += len(beams.scores)
            self._apply_beams(rows[beams.row], continuations, now, outputs)
        self._stats.num_generation_tokens += num_tokens
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
                self.end(request, "stop", None, now)
        self._log = None

    def _apply_beams(
        self, row: Request, continuations: Sequence[Continuation], now: float, outputs: list[EngineOutput]
    ) -> None:
        """Apply the chosen ``continuations`` to the beam search of ``row``."""
        search = row.beams
        assert isinstance(search, BeamSearch)
        request = search.request
        if request.status is Status.FINISHED:
            return
        state = search.following(continuations)
        request.metrics.count_tokens(now, 1)
        if not state.is_done:
            search.advance(self._scheduler, state)
            return
        best = state.finished[0]
        outputs.append(
            EngineOutput(
                request.request_id, [], best.finish_reason, best.stop_reason, request.num_cached_tokens or 0,
                request.metrics, prompt_logprobs=self._prompt_logprobs.get(request.request_id),
                beams=state.finished,
            )
        )  # fmt: skip
        self.end(request, best.finish_reason, best.stop_reason, now)

    def _keep_prompt_logprobs(
        self, schedule: Schedule, rows: list[Request], found: dict[int, list[TokenLogprobs]]
    ) -> None:
        for row, entries in found.items():
            if rows[row].status is not Status.FINISHED:
                kept = self._prompt_logprobs.setdefault(rows[row].request_id, [])
                kept[schedule.starts[row] :] = entries

    def end(self, request: Request, reason: str, stop_reason: int | str | None, now: float) -> None:
        """End a request and free what it holds."""
        self._scheduler.finish(request, reason, stop_reason, now)
        del self.by_id[request.request_id]
        self._prompt_logprobs.pop(request.request_id, None)

    def end_with_error(self, requests: Iterable[Request], reason: str, outputs: list[EngineOutput]) -> None:
        """End those of ``requests`` that are waiting, with the finish reason ``error`` and the message ``reason``."""
        self._log = StepLog(outputs, len(outputs), Schedule(), [])
        for request in requests:
            if request.is_waiting:
                outputs.append(error_output(request, reason))
                self.end(request, "error", None, time.monotonic())
        self._log = None

    def append_errors(self, requests: Iterable[Request], reason: str, outputs: list[EngineOutput]) -> None:
        """Append an output with the finish reason ``error`` and the message ``reason`` for each of ``requests``;
        :meth:`settle` then ends them."""
        self._log = StepLog(outputs, len(outputs), Schedule(), [])
        for request in requests:
            outputs.append(error_output(request, reason))

    def served(self) -> set[str]:
        """Return the ids of the requests that have got an output of the step whose results are being applied."""
        return (
            set() if self._log is None else {each.request_id for each in self._log.outputs[self._log.first :]}
        )

    def settle(self) -> None:
        """Apply the outputs of an interrupted step to their requests, leaving out those that have been applied."""
        if self._log is None:
            return
        positions = self._log.positions()
        for output in self._log.outputs[self._log.first :]:
            request = self.by_id.get(output.request_id)
            if request is None:
                continue
            if output.new_token_ids:
                request.output_token_ids[positions[output.request_id] :] = output.new_token_ids
            if output.finish_reason is not None:
                request.finish(output.finish_reason, output.stop_reason, time.monotonic())
        self._log = None

    def restart(self) -> None:
        """Forget the finished requests, and reset the others to waiting ones."""
        self._prompt_logprobs = {}
        self.by_id = {
            request_id: request
            for request_id, request in self.by_id.items()
            if request.status is not Status.FINISHED
        }
        for request in self.by_id.values():
            request.restart()
