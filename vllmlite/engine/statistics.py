"""The counters of an engine's statistics."""

from __future__ import annotations

from collections.abc import Iterable

from vllmlite.engine.drafts import DraftPolicy
from vllmlite.engine.request import Request
from vllmlite.engine.scheduler import Scheduler
from vllmlite.outputs import TIER_EVENTS, EngineStats


def refresh_stats(stats: EngineStats, scheduler: Scheduler) -> None:
    """Copy the scheduler's counters into ``stats``."""
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
        stats.running_adapters = adapter_names(scheduler.running)
        stats.waiting_adapters = adapter_names(each for each in scheduler.requests() if each.is_waiting)


def adapter_names(requests: Iterable[Request]) -> tuple[str, ...]:
    """Return the names of the adapters of ``requests``, sorted and without repetition."""
    return tuple(sorted({request.adapter.name for request in requests if request.adapter is not None}))


def count_drafts(stats: EngineStats, drafting: DraftPolicy, drafts: int, accepted: int, rows: int) -> None:
    """Count one verification in a step of ``rows`` rows: ``accepted`` of a row's ``drafts`` draft tokens."""
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
