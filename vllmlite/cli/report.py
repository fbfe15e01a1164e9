"""Statistics of a run, for a table and for JSON."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllmlite.terminal import is_terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllmlite.cli.session import Session
    from vllmlite.outputs import EngineStats, RequestMetrics, RequestOutput


BAR = 30
"""Number of characters of a full progress bar."""


class Run:
    """Statistics of the requests that finish from now on, timed by the requests' own metrics."""

    def __init__(self, session: Session) -> None:
        """Start the clock; the engine's earlier counts are subtracted."""
        self.begin = time.monotonic()
        self.num_requests = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generation_tokens = 0
        self.metrics: list[RequestMetrics] = []
        self._session = session
        self._before = replace(session.engine.stats())

    def add(self, output: RequestOutput, num_generation_tokens: int) -> None:
        """Count a finished request."""
        self.num_requests += 1
        self.num_prompt_tokens += len(output.prompt_token_ids)
        self.num_cached_tokens += output.num_cached_tokens
        self.num_generation_tokens += num_generation_tokens
        if output.metrics is not None:
            self.metrics.append(output.metrics)

    def statistics(self) -> dict[str, Any]:
        """Return all statistics. Prefill lasts until the last first token; decode starts at the earliest first
        token."""
        stats, before = self._session.engine.stats(), self._before
        started = [m.first_scheduled_time for m in self.metrics if m.first_scheduled_time is not None]
        first = [m.first_token_time for m in self.metrics if m.first_token_time is not None]
        ended = [m.finished_time for m in self.metrics if m.finished_time is not None]
        ttft = [m.time_to_first_token for m in self.metrics if m.time_to_first_token is not None]
        computed = self.num_prompt_tokens - self.num_cached_tokens
        prefill_seconds = max(first) - min(started) if first and started else 0.0
        decode_seconds = max(ended) - min(first) if ended and first else 0.0
        return {
            "model": self._session.model_name,
            "backend": stats.backend,
            "device": stats.device,
            "dtype": stats.dtype,
            "load_seconds": round(self._session.load_seconds, 3),
            "requests": self.num_requests,
            "seconds": round(max(ended) - self.begin, 4) if ended else 0.0,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "generated_tokens": self.num_generation_tokens,
            "ttft_seconds": quantiles(ttft),
            "prefill_tokens_per_second": rate(computed, prefill_seconds),
            "decode_tokens_per_second": rate(self.num_generation_tokens - len(first), decode_seconds),
            "steps": stats.num_steps - before.num_steps,
            "preemptions": stats.num_preemptions - before.num_preemptions,
            "kv_blocks": {
                "total": stats.num_blocks,
                "peak_used": stats.peak_used_blocks,
                "size": stats.block_size,
            },
            "prefix_cache": {
                "queried_tokens": stats.prefix_cache_queries - before.prefix_cache_queries,
                "hit_tokens": stats.prefix_cache_hits - before.prefix_cache_hits,
            },
            "speculation": speculation(stats, before),
        }


def speculation(stats: EngineStats, before: EngineStats) -> dict[str, Any] | None:
    """Return the statistics of the draft tokens since ``before``; None if there were none."""
    drafts = stats.drafts_since(before)
    if drafts is None:
        return None
    return {
        "verifications": drafts.verifications,
        "drafted_tokens": drafts.drafted,
        "accepted_tokens": drafts.accepted,
        "tokens_per_verification": round(drafts.mean_length, 3),
        "speedup": round(drafts.speedup, 3),
    }


class Progress:
    """A progress bar on standard error, if that is a terminal."""

    def __init__(self, total: int, beside_output: bool = True) -> None:
        """Show a bar of ``total`` steps. ``beside_output``: hide it if standard output is a terminal too, because
        output is printed meanwhile."""
        self._total = total
        self._done = 0
        output_is_seen = beside_output and is_terminal(sys.stdout)
        self._shown = total > 1 and is_terminal(sys.stderr) and not output_is_seen
        self.advance(0)

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more prompts as done."""
        self._done += count
        if self._shown:
            bar = "#" * (BAR * self._done // self._total)
            end = "\n" if self._done == self._total else ""
            print(
                f"\rvllmlite: [{bar:<{BAR}}] {self._done} of {self._total} prompts done",
                end=end,
                file=sys.stderr,
                flush=True,
            )


def table(statistics: dict[str, Any]) -> str:
    """Return ``statistics`` as a table for people."""
    s = statistics
    kv, prefix, ttft = s["kv_blocks"], s["prefix_cache"], s["ttft_seconds"]
    several = s["requests"] > 1
    rows = {
        "model": f"{s['model']} (started in {s['load_seconds']:.2f} s)",
        "backend": f"{s['backend']} on {s['device']}, {s['dtype']}",
        "requests": f"{s['requests']} in {s['seconds']:.2f} s, {s['steps']} steps",
        "TTFT": milliseconds(ttft) if several else f"{1000 * ttft['p50']:.1f} ms" if ttft else "-",
        "prefill": f"{s['prompt_tokens']} tokens, {s['cached_tokens']} of them cached"
        + _per_second(s["prefill_tokens_per_second"]),
        "decode": f"{s['generated_tokens']} tokens" + _per_second(s["decode_tokens_per_second"]),
        "KV blocks": f"{kv['peak_used']} of {kv['total']} used at most, {kv['size']} tokens each",
        "prefix cache": f"{prefix['hit_tokens']} of {prefix['queried_tokens']} tokens hit",
        "preemptions": str(s["preemptions"]),
    }
    if (drafts := s["speculation"]) is not None:
        rows["speculation"] = (
            f"{drafts['accepted_tokens']} of {drafts['drafted_tokens']} drafted tokens accepted, "
            f"{drafts['tokens_per_verification']:.2f} tokens per verification, {drafts['speedup']:.2f} times as fast "
            "as plain steps"
        )
    return "\n".join(f"{name:<13} {value}" for name, value in rows.items())


def quantiles(values: Sequence[float], percentiles: Sequence[float] = (50, 90, 99)) -> dict[str, float]:
    """Return the mean and percentiles (nearest rank) of ``values``; empty if there are none."""
    if not values:
        return {}
    ordered = sorted(values)

    def at(percentile: float) -> float:
        return round(ordered[max(math.ceil(percentile * len(ordered) / 100) - 1, 0)], 6)

    mean = round(sum(ordered) / len(ordered), 6)
    return {"mean": mean, **{f"p{percentile:g}": at(percentile) for percentile in percentiles}}


def milliseconds(seconds: dict[str, float]) -> str:
    """Return the result of :func:`quantiles`, in seconds, as text in milliseconds."""
    return ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items()) or "-"


def rate(count: int, seconds: float) -> float | None:
    """Return ``count`` per second, or None if either is 0."""
    return round(count / seconds, 2) if count > 0 and seconds > 0 else None


def _per_second(value: float | None) -> str:
    return "" if value is None else f", {value:.1f} tokens/s"
