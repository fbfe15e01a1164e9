"""The scheduler: decides which requests run in a step, and how many tokens of each.

There is one rule: every step hands out tokens from a budget until each request's computed tokens have caught up with
its known ones and their drafts. Whole prompts, chunks of prompts, decoding, verification of drafts, the rest of a
prompt after a prefix hit and recomputation after a preemption all follow from it. Requests are served in the order of
their key. When blocks run out, the running request with the largest key is preempted: it gives its blocks back and is
computed again later. Drafts take only what is left of budget and blocks. :mod:`vllmlite.engine.drafts` says how they go
with two steps in flight.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vllmlite.engine.adapters import AdapterSlots
from vllmlite.engine.block_pool import BlockPool
from vllmlite.engine.cache_manager import CacheManager
from vllmlite.engine.drafts import MOST_DRAFTS, DraftPolicy
from vllmlite.engine.request import Request, Status
from vllmlite.engine.schedule import Admission, Schedule
from vllmlite.engine.tiers import Copies, Tiers


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a step and of the block pool."""

    max_num_seqs: int
    max_num_batched_tokens: int
    """Maximum number of tokens in a step."""
    max_mixed_prefill_tokens: int
    """Maximum number of prompt tokens in a step that also decodes. Longer prompts are computed in chunks, so that other
    requests do not wait long for their next token."""
    max_model_len: int
    block_size: int
    num_blocks: int
    enable_prefix_caching: bool = True
    stages: int = 1
    """Number of stages of the pipeline. As many steps are in flight, each with a share of the requests, and a request
    has one row in flight at a time, since the first stage does not know the ids that the last one samples."""
    max_adapters: int = 0
    """Maximum number of adapters on the device at a time."""


class Scheduler:
    """Schedules the unfinished requests, and gives them blocks of the pool."""

    def __init__(self, limits: Limits, drafting: DraftPolicy, tiers: Tiers | None = None) -> None:
        """Start without requests. ``limits.num_blocks`` must hold ``limits.max_model_len`` tokens."""
        if limits.num_blocks * limits.block_size < limits.max_model_len:
            raise ValueError(
                f"{limits.num_blocks} blocks do not hold one sequence of {limits.max_model_len} tokens"
            )
        self.limits = limits
        self.drafting = drafting
        self.tiers = tiers
        self.pool: BlockPool = BlockPool(limits.num_blocks) if tiers is None else tiers.pool
        self.cache = CacheManager(self.pool, limits.block_size, caches_prefixes=limits.enable_prefix_caching)
        self.adapters = AdapterSlots(limits.max_adapters)
        self.running: list[Request] = []
        self.num_waiting = 0
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self._last_tokens = 0
        """Number of tokens of the last step."""
        self._spare = 0
        """Number of tokens of the step being scheduled that may still be drafts."""
        self._drafted = False
        """Whether any running request may have drafts."""
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))

    @property
    def max_beams(self) -> int:
        """Maximum number of beams of a request. 0 if drafts are proposed from a key/value cache, which forked sequences
        do not have."""
        if self.drafting.fills_cache:
            return 0
        return min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        request.reads_text |= self.limits.stages > 1
        self.num_waiting += 1
        heapq.heappush(self._waiting, (request.key, request))

    def finish(self, request: Request, reason: str, stop_reason: int | str | None, now: float) -> None:
        """End a request, running or waiting, and free its blocks and slot at once. ``now`` is from
        :func:`time.monotonic`."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._vacate(request)
        elif request.status is Status.WAITING:
            self.num_waiting -= 1  # its entry in the heap is skipped when it comes up
        request.finish(reason, stop_reason, now)

    def schedule(self, now: float) -> tuple[Schedule, list[Request]]:
        """Return the next step, and the requests of its rows. The step is empty if nothing can run before a step in
        flight is collected. ``now`` is from :func:`time.monotonic`."""
        schedule = Schedule()
        rows: list[Request] = []
        budget = prefill_budget = self.limits.max_num_batched_tokens
        block_size = self.limits.block_size
        running = self.running
        if self.tiers is not None:
            copies = schedule.copies = Copies()
            self._begin_copies(self.tiers, schedule, copies, now)
        if self._drafted:
            self._spare = min(budget - self._tokens_to_compute(), MOST_DRAFTS)
        if any(request.num_missing_tokens == 1 and request.may_run for request in running):
            prefill_budget = self.limits.max_mixed_prefill_tokens
        num_preemptions = self.num_preemptions
        most_rows = self._share_of_rows()
        position = 0
        while position < len(running) and budget and len(rows) < most_rows:
            request = running[position]
            position += 1
            if not request.may_run:
                continue
            if request.beams is not None:
                prefills = request.num_missing_tokens > 1
                most = min(budget, max(prefill_budget, request.width)) if prefills else budget
                count = request.beams.schedule(self, most, schedule, rows)
                budget -= count
                if prefills:
                    prefill_budget = max(prefill_budget - count, 0)
                if request.status is not Status.RUNNING:
                    break
                continue
            count = request.num_tokens - request.num_computed_tokens
            if count > 1:
                count = min(count, budget, prefill_budget)
                prefill_budget -= count
            if not count:
                continue
            if request.drafts:
                count += self._fit_drafts(request, count, budget)
            if request.num_computed_tokens + count > len(request.blocks) * block_size:
                missing = self.cache.missing_blocks(request, count)
                if not self.make_room(missing, request):
                    break
                self.cache.append_blocks(request, self.pool.allocate(missing), schedule)
            budget -= count
            self.append_row(request, count, schedule)
            rows.append(request)
        if self.num_preemptions == num_preemptions:
            self._admit(min(budget, prefill_budget), schedule, rows, now, most_rows)
        if self._drafted:
            self._drafted = any(request.drafts for request in running)
        if self.drafting.fills_cache:
            self._allocate_for_drafts(schedule, rows)
        schedule.num_tokens = sum(schedule.counts)
        if self.tiers is not None:
            self.tiers.save_evicted(copies)
            self._last_tokens = schedule.num_tokens
        self.adapters.next_step += bool(rows)
        return schedule, rows

    def flush(self, everything: bool = False) -> Schedule:
        """Return a step without rows that saves blocks while nothing runs; see :meth:`Tiers.save_idle`."""
        copies = Copies()
        if self.tiers is not None:
            self.tiers.save_idle(copies, everything)
        return Schedule(copies=copies)

    def assign_adapters(self, in_flight: int) -> None:
        """Give adapters slots on the device, and queue the requests whose adapter is ready, while ``in_flight`` steps
        are in flight."""
        for request in self.adapters.assign(in_flight):
            heapq.heappush(self._waiting, (request.key, request))

    def restart(self, requests: Iterable[Request]) -> None:
        """Reset queues, slots, blocks and the prefix cache, and queue ``requests``, which must be waiting."""
        if self.tiers is None:
            self.pool.reset()
        else:
            self.tiers.restart()
        self.adapters.restart()
        self.running = []
        self._free_slots = list(range(self.limits.max_num_seqs - 1, -1, -1))
        self._waiting = sorted((request.key, request) for request in requests)
        self.num_waiting = len(self._waiting)

    def drop_contents(self) -> None:
        """Forget what is in host memory and which adapters are on the device, while nothing runs."""
        if self.tiers is not None:
            self.tiers.restart()
        for resident in self.adapters.residents:
            self.adapters.empty(resident)

    def collected(self, request: Request, token_ids: Sequence[int], num_rejected: int = 0) -> None:
        """Append the ids that a launched row of ``request`` has sampled, and uncount its ``num_rejected`` rejected
        drafts."""
        request.output_token_ids += token_ids
        request.num_in_flight -= len(token_ids) + num_rejected
        if num_rejected:
            request.num_tokens -= num_rejected
            request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        if request.num_tokens - request.num_in_flight >= request.next_full_at:
            self.cache.cache_full_blocks(request)

    def proposed(self, request: Request, drafts: list[int]) -> None:
        """Keep the drafts that were proposed for ``request``, if it still runs."""
        if request.status is Status.RUNNING:
            request.drafts = drafts
            self._drafted = self._drafted or bool(drafts)
            if not drafts and self.drafting.overlapped:
                self.drafting.record(request.acceptance, 1, 0)  # it has waited for nothing

    def requests(self) -> Iterator[Request]:
        """Yield all requests that have not finished."""
        yield from self.running
        for _, request in self._waiting:
            if request.status is Status.WAITING:
                yield request
        yield from self.adapters.requests()

    def check_integrity(self) -> None:
        """Raise AssertionError if blocks, slots, queues or counters disagree."""
        self.pool.check_integrity(member.blocks for request in self.requests() for member in request.members)
        if self.tiers is not None:
            self.tiers.check_integrity()
        slots = sorted(
            [member.slot for request in self.running for member in request.members] + self._free_slots
        )
        assert slots == list(range(self.limits.max_num_seqs)), slots
        assert [r.key for r in self.running] == sorted(r.key for r in self.running)
        assert self.num_waiting == sum(request.is_waiting for request in self.requests())
        self.adapters.check_integrity(self.running)
        for request in self.requests():
            known = len(request.prompt_token_ids) + len(request.output_token_ids)
            assert request.num_tokens == known + request.num_in_flight
            assert request.num_computed_tokens <= request.num_tokens <= request.max_total_tokens
            for member in request.members if request.status is Status.RUNNING else ():
                if request.beams is None or member in (request.beams.active or [request]):
                    # A new beam gets the copy of its last, partial block with its next row.
                    uncopied = request.beams.awaits_copy(member) if request.beams is not None else False
                    held = (len(member.blocks) + uncopied) * self.limits.block_size
                    assert held >= member.num_computed_tokens == request.num_computed_tokens
                    assert member.num_tokens == request.num_tokens
                else:
                    assert not member.blocks
                assert member.num_cached_blocks <= len(member.blocks)
            assert request.status is Status.RUNNING or not (request.blocks or request.slot >= 0)

    def make_room(self, num_blocks: int, request: Request) -> bool:
        """Preempt requests, the last one first, until ``num_blocks`` are free. Returns False if ``request`` itself was
        preempted."""
        while num_blocks > self.pool.num_free:
            if self._preempt_last() is request:
                return False
        return True

    def _tokens_to_compute(self) -> int:
        """Return the number of known tokens that are not computed, of the running requests and of the next waiting
        one."""
        tokens = sum(request.num_tokens - request.num_computed_tokens for request in self.running)
        waiting = self._peek_waiting() if self._free_slots else None
        return tokens if waiting is None else tokens + waiting.num_tokens

    def _fit_drafts(self, request: Request, count: int, budget: int) -> int:
        """Shorten the drafts of a request to those that can be accepted, and that fit into the step and the cache
        beside the ``count`` known tokens of its row. Returns how many are left."""
        start, drafts = request.num_computed_tokens, request.drafts
        most = 0
        if start + count == request.num_tokens:
            spare_blocks = max(self.pool.num_free - len(self.running), 0)
            free = (len(request.blocks) + spare_blocks) * self.limits.block_size - start - count
            longest = min(request.max_total_tokens - 1, self.drafting.max_len) - request.num_tokens
            most = max(min(len(drafts), longest, self._spare, budget - count, free), 0)
        for index in range(most):
            if drafts[index] in request.stop_ids:
                most = index
                break
        if request.grammar is not None and most:
            request.masks = request.grammar.masks(drafts[:most])
            most = len(request.masks) - 1
        del drafts[most:]
        self._spare -= most
        return most

    def append_row(self, request: Request, count: int, schedule: Schedule) -> None:
        """Add a row of the next ``count`` tokens of a sequence."""
        start = request.num_computed_tokens
        end = request.num_computed_tokens = start + count
        samples = 0
        if end >= request.num_tokens:
            samples = 1 if request.pooling_type is None else 0
            if self.drafting.most and samples and request.beams is None:
                if request.drafts or request.num_tokens >= request.asks_at:
                    samples += self._append_drafts(request, schedule)
                else:
                    request.awaits_drafts = False
        if self.limits.stages > 1 and start + 1 == request.num_tokens and request.beams is None:
            row = len(schedule.slots)
            schedule.ids[row] = request.known_ids(start, start + 1) + schedule.drafts.get(row, [])
        if request.has_extras:
            self._append_extras(request, start, end >= request.num_tokens, schedule)
        if end >= request.num_tokens:
            in_flight = end + 1 - request.num_tokens
            request.num_tokens += in_flight
            request.num_in_flight += in_flight
        schedule.num_sampled += samples
        schedule.slots.append(request.slot)
        schedule.starts.append(start)
        schedule.counts.append(count)
        schedule.samples.append(samples)
        if end >= request.next_full_at:
            self.cache.cache_full_blocks(request)

    def _append_drafts(self, request: Request, schedule: Schedule) -> int:
        """Move a request's drafts to the row that is being appended, and schedule the proposal of the next ones.
        Returns how many drafts the row has."""
        row, drafts = len(schedule.slots), request.drafts
        if drafts:
            schedule.drafts[row] = drafts
            request.drafts = []
        if request.num_tokens + 2 < min(request.max_total_tokens, self.drafting.max_len + 1):
            wanted = self.drafting.wanted(request.acceptance, len(self.running))
            if wanted:
                schedule.wanted[row] = wanted
            else:
                request.asks_at = request.num_tokens + request.acceptance.pause
        request.awaits_drafts = bool(drafts) or row in schedule.wanted
        return len(drafts)

    def _allocate_for_drafts(self, schedule: Schedule, rows: list[Request]) -> None:
        """Allocate spare blocks for the positions at which drafts are to be proposed, and reduce the numbers of wanted
        drafts to those that fit."""
        block_size = self.limits.block_size
        for row, wanted in list(schedule.wanted.items()):
            request = rows[row]
            end = min(request.num_computed_tokens + wanted, request.max_total_tokens)
            spare = max(self.pool.num_free - len(self.running), 0)
            missing = min(-(-end // block_size) - len(request.blocks), spare)
            if missing > 0:
                self.cache.append_blocks(request, self.pool.allocate(missing), schedule)
            room = min(wanted, len(request.blocks) * block_size - request.num_computed_tokens)
            if room:
                schedule.wanted[row] = room
            else:
                del schedule.wanted[row]
                request.awaits_drafts = row in schedule.drafts

    def _append_extras(self, request: Request, start: int, ends: bool, schedule: Schedule) -> None:
        """Add banned ids, mask, prompt log-probabilities or pooling of the row that is being appended to the
        schedule."""
        row = len(schedule.slots)
        if request.params.prompt_logprobs is not None and start + 1 < len(request.prompt_token_ids):
            schedule.prompt_logprobs.append(row)
        if request.pooling_type is not None:
            if ends or request.pooling_type == "MEAN":
                schedule.pools.append(row)
        elif ends:
            drafts, first = schedule.drafts.get(row, []), schedule.num_sampled
            if request.has_bans:
                for index in range(len(drafts) + 1):
                    if banned := request.banned_ids(drafts[:index]):
                        schedule.banned[first + index] = banned
            if request.grammar is not None:
                for index, mask in enumerate(request.masks or request.grammar.masks()):
                    if mask is not None:
                        schedule.masks[first + index] = mask
                request.masks = []

    def _share_of_rows(self) -> int:
        """Return the maximum number of requests in a step, so that each stage of the pipeline gets a share."""
        if self.limits.stages == 1:
            return self.limits.max_num_seqs
        return -(-(len(self.running) + min(self.num_waiting, len(self._free_slots))) // self.limits.stages)

    def _admit(
        self, budget: int, schedule: Schedule, rows: list[Request], now: float, most_rows: int
    ) -> None:
        while budget and self._free_slots and len(rows) < most_rows:
            request = self._peek_waiting()
            if request is None or request.num_in_flight:
                return  # a preempted request waits for ids that it sampled before it lost its blocks
            if request.adapter is not None and not self.adapters.admits(request):
                heapq.heappop(self._waiting)
                self.adapters.set_aside(request)
                continue
            if request.width > len(self._free_slots):
                return
            hits = self.cache.find_prefix(request, leave=int(self.drafting.reads_states))
            needed = self.cache.needed_blocks(request) - len(hits)
            if needed > self.pool.num_free - self.pool.num_free_in(hits):
                return
            heapq.heappop(self._waiting)
            self.num_waiting -= 1
            self._occupy(request, schedule, now)
            self.pool.share(hits)
            self.cache.append_blocks(request, hits, schedule)
            self.cache.note_prefix(request)
            if request.num_cached_tokens is None:
                request.num_cached_tokens = request.num_computed_tokens
                self.prefix_queries += len(request.prompt_token_ids)
                self.prefix_hits += request.num_computed_tokens
            if self.tiers is not None and schedule.copies is not None:
                self.cache.load(self.tiers, request, schedule, schedule.copies, now)
                if request.awaits_blocks:
                    continue
            if request.beams is not None:
                budget -= request.beams.schedule(self, budget, schedule, rows)
                continue
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            self.cache.append_blocks(
                request, self.pool.allocate(self.cache.missing_blocks(request, count)), schedule
            )
            budget -= count
            self.append_row(request, count, schedule)
            rows.append(request)

    def _begin_copies(self, tiers: Tiers, schedule: Schedule, copies: Copies, now: float) -> None:
        """Schedule copies of computed blocks to the cache tiers, and of blocks that have been read from disk to the
        pool."""
        tiers.poll()
        tiers.save_behind(copies, self._last_tokens)
        for request in self.running:
            if request.awaits_blocks:
                self.cache.load(tiers, request, schedule, copies, now)

    def _peek_waiting(self) -> Request | None:
        while self._waiting:
            request = self._waiting[0][1]
            if request.status is Status.WAITING:
                return request
            heapq.heappop(self._waiting)
        return None

    def _occupy(self, request: Request, schedule: Schedule, now: float) -> None:
        request.status = Status.RUNNING
        request.slot = self._free_slots.pop()
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = now
        insort(self.running, request, key=_key)
        adapter = 0 if request.adapter is None else self.adapters.acquire(request)
        schedule.admissions.append(self.admission(request, adapter))
        if request.beams is not None:
            request.beams.occupy(self._free_slots, schedule)

    def admission(self, request: Request, adapter: int) -> Admission:
        """Return the admission of a sequence that takes a slot, with the index of its adapter."""
        return Admission(
            request.slot,
            request.known_ids(0, request.num_known_ids),
            len(request.prompt_token_ids),
            request.params,
            request.seed,
            request.pooling_type,
            adapter,
        )

    def _preempt_last(self) -> Request:
        request = self.running.pop()
        self._vacate(request)
        request.status = Status.WAITING
        self.num_preemptions += 1
        request.metrics.num_preemptions += 1
        self.num_waiting += 1
        heapq.heappush(self._waiting, (request.key, request))
        return request

    def _vacate(self, request: Request) -> None:
        for member in request.members:
            self.pool.release(member.blocks)
            self._free_slots.append(member.slot)
        if request.beams is not None:
            request.beams.vacate(self.limits.block_size)
        if request.adapter is not None:
            self.adapters.release(request)
        request.blocks = []
        request.slot = -1
        request.num_computed_tokens = 0
        request.num_cached_blocks = 0
        request.awaits_blocks = False
        request.drop_drafts()


def _key(request: Request) -> tuple[int, int]:
    return request.key
