"""Metrics under vLLM's names, counted here and written by prometheus_client when they are scraped.

The engine's thread counts every token, so counting costs only a bisection and two additions.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vllmlite.engine.engine_output import EngineOutput
from vllmlite.outputs import TIER_EVENTS, EngineStats
from vllmlite.sampling_params import SamplingParams

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

FINISH_REASONS = ("stop", "length", "abort", "error")
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""vLLM's names of the sleep levels 0 to 2."""
REJECTION_REASONS = ("queue_full", "shutting_down", "sleeping")


def _up_to(highest: int) -> list[float]:
    """Return 1, 2, 5, 10, 20, 50, … up to ``highest``."""
    return [float(m * 10**e) for e in range(len(str(highest))) for m in (1, 2, 5) if m * 10**e <= highest]


TTFT_BUCKETS = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
]  # fmt: skip
ITL_BUCKETS = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
]  # fmt: skip
LATENCY_BUCKETS = [
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
]  # fmt: skip
"""Upper bounds in seconds: vLLM's, with additional small ones."""
PARAMS_N = [1, 2, 5, 10, 20]
"""vLLM's upper bounds for ``n``."""


@dataclass(slots=True)
class Histogram:
    """Counts of values by upper bound."""

    name: str
    help: str
    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        """Begin with zero counts."""
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count ``value``."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return Prometheus' buckets: (upper bound, number of values up to it)."""
        total, found = 0, []
        for bound, count in zip([*(str(float(b)) for b in self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Metrics:
    """Metrics of an engine, observed after each step; may be scraped from any thread."""

    def __init__(self, model: str, max_model_len: int, stats: Callable[[], EngineStats]) -> None:
        """Start with zero counts. ``stats`` returns the engine's counters; all series have the labels ``model_name``
        and ``engine``."""
        self._labels = {"model_name": model, "engine": "0"}
        self._stats = stats
        self._adapters: dict[str, int] = {}
        """Name of an adapter → number of prompts that have been submitted with it."""
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.rejections = dict.fromkeys(REJECTION_REASONS, 0)
        lengths = _up_to(max_model_len)
        self.ttft = Histogram(
            "vllm:time_to_first_token_seconds", "Time from arrival to first token.", TTFT_BUCKETS
        )
        self.itl = Histogram("vllm:inter_token_latency_seconds", "Time from token to token.", ITL_BUCKETS)
        self.tpot = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "A request's mean time per token after the first.",
            ITL_BUCKETS,
        )
        self.e2e = Histogram("vllm:e2e_request_latency_seconds", "Time from arrival to end.", LATENCY_BUCKETS)
        self.queue = Histogram(
            "vllm:request_queue_time_seconds", "Time from arrival to first step.", LATENCY_BUCKETS
        )
        self.inference = Histogram(
            "vllm:request_inference_time_seconds", "Time from first step to end.", LATENCY_BUCKETS
        )
        self.prefill = Histogram(
            "vllm:request_prefill_time_seconds", "Time from first step to first token.", LATENCY_BUCKETS
        )
        self.decode = Histogram(
            "vllm:request_decode_time_seconds", "Time from first token to end.", LATENCY_BUCKETS
        )
        self.prompt_tokens = Histogram("vllm:request_prompt_tokens", "Prompt tokens per request.", lengths)
        self.generation_tokens = Histogram(
            "vllm:request_generation_tokens", "Generated tokens per request.", lengths
        )
        self.params_n = Histogram("vllm:request_params_n", "Requested completions per prompt.", PARAMS_N)
        self.params_max_tokens = Histogram(
            "vllm:request_params_max_tokens", "Requested maximum tokens of a completion.", lengths
        )
        self.iteration_tokens = Histogram(
            "vllm:iteration_tokens_total",
            "Prompt tokens and generated tokens per step.",
            [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
        )

        self.max_generation_tokens = Histogram(
            "vllm:request_max_num_generation_tokens",
            "Generated tokens of a request's longest completion.",
            lengths,
        )
        self.preemptions = Histogram(
            "vllm:request_num_preemptions", "Preemptions per request.", [1, 2, 3, 4, 5, 10, 20]
        )

    @property
    def histograms(self) -> list[Histogram]:
        """All histograms."""
        return [value for value in vars(self).values() if isinstance(value, Histogram)]

    def observe_step(self, outputs: list[EngineOutput]) -> None:
        """Count the outputs of a step, in the engine's thread. A prompt counts in the step that completes its
        prefill."""
        tokens = 0
        for output in outputs:
            metrics = output.metrics
            later = len(output.new_token_ids)
            tokens += later
            if output.pooled is not None or (later and metrics.num_generation_tokens == later):
                tokens += metrics.num_prompt_tokens
            if later and metrics.num_generation_tokens == later and metrics.first_token_time is not None:
                self.ttft.observe(metrics.first_token_time - metrics.arrival_time)
                later -= 1
            if later and metrics.last_token_time is not None and metrics.previous_token_time is not None:
                for _ in range(later):
                    self.itl.observe(metrics.last_token_time - metrics.previous_token_time)
            if metrics.finished_time is not None:
                self._finish(output)
        if outputs:
            self.iteration_tokens.observe(tokens)

    def requested(self, params: SamplingParams, prompts: int) -> None:
        """Count the parameters of ``prompts`` requests; an unlimited ``max_tokens`` is not counted."""
        for _ in range(prompts):
            self.params_n.observe(params.n)
            if params.max_tokens is not None:
                self.params_max_tokens.observe(params.max_tokens)

    def adapter_used(self, name: str, prompts: int) -> None:
        """Count ``prompts`` requests with the adapter ``name``."""
        self._adapters[name] = self._adapters.get(name, 0) + prompts

    def forget_adapter(self, name: str) -> None:
        """Drop the count of an adapter that is no longer served."""
        self._adapters.pop(name, None)

    def completed(self, num_tokens: int) -> None:
        """Count the tokens of the longest completion of a prompt that has finished."""
        self.max_generation_tokens.observe(num_tokens)

    def rejected(self, reason: str) -> None:
        """Count a rejected request."""
        self.rejections[reason] += 1

    def aborted(self, count: int) -> None:
        """Count ``count`` sequences aborted by clients."""
        self.finished["abort"] += count

    def mean_latency(self) -> float:
        """Return the mean request latency in seconds; 1 before any request has finished."""
        count = sum(self.e2e.counts)
        return self.e2e.sum / count if count else 1.0

    def _finish(self, output: EngineOutput) -> None:
        metrics = output.metrics
        self.finished[output.finish_reason or "stop"] += 1  # None: ended by a stop string
        arrival, begun, first, end = (
            metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time,
        )  # fmt: skip
        if begun is None or first is None or end is None:
            return
        self.e2e.observe(end - arrival)
        self.queue.observe(begun - arrival)
        self.inference.observe(end - begun)
        self.prefill.observe(first - begun)
        self.decode.observe(end - first)
        self.preemptions.observe(metrics.num_preemptions)
        self.prompt_tokens.observe(metrics.num_prompt_tokens)
        self.generation_tokens.observe(metrics.num_generation_tokens)
        if metrics.num_generation_tokens > 1:
            self.tpot.observe((end - first) / (metrics.num_generation_tokens - 1))

    def collect(self) -> Iterator[Any]:
        """Yield the metric families, as prometheus_client requires."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        stats, names, values = self._stats(), list(self._labels), list(self._labels.values())
        gauges = {
            "vllm:num_requests_running": ("Sequences being processed.", stats.num_running),
            "vllm:num_requests_waiting": ("Sequences in the queue.", stats.num_waiting),
            "vllm:kv_cache_usage_perc": ("Fraction of KV blocks in use, 0 to 1.", kv_usage(stats)),
        }
        counters = {
            "vllm:prompt_tokens": ("Prompt tokens processed.", stats.num_prompt_tokens),
            "vllm:generation_tokens": ("Tokens generated.", stats.num_generation_tokens),
            "vllm:num_preemptions": (
                "Sequences that lost their blocks and were restarted.",
                stats.num_preemptions,
            ),
            "vllm:prefix_cache_queries": (
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_cache_queries,
            ),
            "vllm:prefix_cache_hits": ("Prompt tokens found in the prefix cache.", stats.prefix_cache_hits),
            "vllm:external_prefix_cache_queries": (
                "Prompt tokens looked up in the cache tiers.",
                stats.external_prefix_cache_queries,
            ),
            "vllm:external_prefix_cache_hits": (
                "Prompt tokens found in the cache tiers.",
                stats.external_prefix_cache_hits,
            ),
            "vllm:spec_decode_num_drafts": ("Verifications of draft tokens.", stats.num_drafts),
            "vllm:spec_decode_num_draft_tokens": ("Draft tokens.", stats.num_draft_tokens),
            "vllm:spec_decode_num_accepted_tokens": ("Accepted draft tokens.", stats.num_accepted_tokens),
            "vllmlite:spec_decode_seconds": (
                "Time of verifications, by the measured time of steps.",
                stats.draft_seconds,
            ),
            "vllmlite:spec_decode_plain_seconds": (
                "Time that the tokens of verifications would have taken one by one.",
                stats.plain_seconds,
            ),
            "vllmlite:failed_steps": ("Steps that failed.", stats.num_failed_steps),
            "vllmlite:steps": ("Steps.", stats.num_steps),
        }
        for name, (help, value) in gauges.items():
            gauge = GaugeMetricFamily(name, help, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        for name, (help, value) in counters.items():
            counter = CounterMetricFamily(name, help, labels=names)
            counter.add_metric(values, value)
            yield counter
        per_position = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by their place in the draft.",
            labels=[*names, "position"],
        )
        for position, count in enumerate(stats.num_accepted_tokens_per_pos):
            per_position.add_metric([*values, str(position)], count)
        yield per_position
        blocks = CounterMetricFamily(
            "vllmlite:tier_blocks",
            "Blocks that were copied to host memory or back, read from disk or written, or lost.",
            labels=[*names, "event"],
        )
        for event in TIER_EVENTS:
            blocks.add_metric([*values, event], getattr(stats, f"tier_blocks_{event}"))
        yield blocks
        queued = {"capacity": stats.num_waiting, "deferred": 0}
        sleep = {state: int(stats.sleep_level == level) for level, state in enumerate(SLEEP_STATES)}
        for kind, name, help, label, counts in (
            (GaugeMetricFamily, "vllm:num_requests_waiting_by_reason", "Sequences in the queue, by reason.", "reason",
             queued),
            (GaugeMetricFamily, "vllm:engine_sleep_state", "1 for the state that the engine is in.", "sleep_state",
             sleep),
            (CounterMetricFamily, "vllm:request_success", "Finished sequences, by reason.", "finished_reason",
             self.finished),
            (CounterMetricFamily, "vllm:admission_rejections", "Rejected requests, by reason.", "reason",
             self.rejections),
        ):  # fmt: skip
            family = kind(name, help, labels=[*names, label])
            for reason, count in counts.items():
                family.add_metric([*values, reason], count)
            yield family
        for histogram in self.histograms:
            buckets = HistogramMetricFamily(histogram.name, histogram.help, labels=names)
            buckets.add_metric(values, histogram.cumulative(), histogram.sum)
            yield buckets
        if stats.max_adapters:
            yield from self._collect_adapters(stats)
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Configuration of the KV cache.",
            labels=[*names, "block_size", "num_gpu_blocks"],
        )
        config.add_metric([*values, str(stats.block_size), str(stats.num_blocks)], 1)
        yield config

    def _collect_adapters(self, stats: EngineStats) -> Iterator[Any]:
        """Yield the metric families of LoRA adapters."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        waiting, running = ",".join(stats.waiting_adapters), ",".join(stats.running_adapters)
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Names of the adapters of waiting and of running requests; the value is the time.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        info.add_metric([str(stats.max_adapters), waiting, running], time.time())
        yield info
        requests = CounterMetricFamily(
            "vllmlite:lora_requests", "Prompts with an adapter.", labels=[*self._labels, "lora_name"]
        )
        for name, count in self._adapters.items():
            requests.add_metric([*self._labels.values(), name], count)
        yield requests

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the text format that ``accept`` prefers, and its media type."""
        from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
        from prometheus_client.exposition import choose_encoder

        registry = CollectorRegistry(auto_describe=False)
        collector: Collector = self
        registry.register(collector)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        encode, media_type = choose_encoder(accept)
        return encode(registry), media_type


def kv_usage(stats: EngineStats) -> float:
    """Return the fraction of KV blocks in use."""
    return stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0


def _drafts(stats: EngineStats, before: EngineStats) -> str:
    """Return a text for the log about the drafts since ``before``: how many were accepted; empty if there were none."""
    drafts = stats.drafts_since(before)
    if drafts is None:
        return ""
    rate = 100 * drafts.accepted / drafts.drafted
    return (
        f", Mean acceptance length: {drafts.mean_length:.2f}, Drafted: {drafts.drafted} tokens, "
        f"Accepted: {drafts.accepted} tokens, Avg draft acceptance rate: {rate:.1f}%, "
        f"Speed-up over plain steps: {drafts.speedup:.2f}x"
    )


class StatsLog:
    """Periodically logs a line of statistics, if something ran."""

    def __init__(self, stats: Callable[[], EngineStats], interval: float) -> None:
        """Log every ``interval`` seconds; ``stats`` returns the engine's counters."""
        self._stats = stats
        self._interval = interval
        self._before = EngineStats()

    def line(self) -> str | None:
        """Return vLLM's log line about the time since the last call, or None if nothing happened."""
        stats, before = self._stats(), self._before
        self._before = replace(stats)
        prompt = stats.num_prompt_tokens - before.num_prompt_tokens
        generation = stats.num_generation_tokens - before.num_generation_tokens
        queries = stats.prefix_cache_queries - before.prefix_cache_queries
        hits = stats.prefix_cache_hits - before.prefix_cache_hits
        if not (prompt or generation or stats.num_running or stats.num_waiting):
            return None
        return (
            f"Avg prompt throughput: {prompt / self._interval:.1f} tokens/s, "
            f"Avg generation throughput: {generation / self._interval:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"KV cache usage: {100 * kv_usage(stats):.1f}%, "
            f"Prefix cache hit rate: {100 * hits / queries if queries else 0.0:.1f}%{_drafts(stats, before)}"
        )

    async def run(self) -> None:
        """Log forever."""
        import asyncio

        while True:
            await asyncio.sleep(self._interval)
            line = self.line()
            if line is not None:
                logger.info(line)
