#!/usr/bin/env python3
"""Simulate servers behind a router on more machines than there are: throughput, time to first token (TTFT) and time
between tokens (ITL) by routing policy and by GPUs per server, from measured costs of steps.

    PYTHONPATH=. scripts/simulate_fleet.py --gpus 8 64 1024 --plot fleet.svg
    PYTHONPATH=. scripts/simulate_fleet.py --check                # predict a run on this machine, then run it

A server is a loop of steps as the engine's scheduler makes them: every running sequence decodes a token, and prompt
tokens of waiting ones fill the rest of the step's budget. A step's time is interpolated in a table of measured steps.
The router is the server's own (vllmlite.engine.routing). The last line is JSON.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import time
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllmlite.cli.bench_plot import distributions
from vllmlite.engine.block_pool import root_digest
from vllmlite.engine.routing import Router, prefix_of

POLICIES = ("round-robin", "least-requests", "prefix")
ROUTER_BLOCK = 64
"""Tokens of the blocks by which the router knows prefixes; an engine's are smaller, which matters little here."""
ROOT = root_digest("simulation")


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a step on one GPU: of decoding by rows, and of a prompt token beside it."""

    decode: Sequence[tuple[int, float]]
    prompt_token: float
    max_rows: int = 256
    budget: int = 8192
    """Most tokens in a step."""
    cache_tokens: int = 500_000
    """Tokens in the key/value cache."""

    def step(self, rows: int, prompt_tokens: int, speed: float = 1.0) -> float:
        """Return the seconds of a step."""
        table = self.decode
        at = bisect_left(table, (rows, 0.0))
        if at == 0:
            base = table[0][1]
        elif at == len(table):
            base = table[-1][1] * rows / table[-1][0]
        else:
            (low, below), (high, above) = table[at - 1], table[at]
            base = below + (above - below) * (rows - low) / (high - low)
        # A step of few prompt tokens takes no longer than reading the weights, which decoding pays for.
        return (
            max(
                base,
                table[0][1] + prompt_tokens * self.prompt_token,
                base + prompt_tokens * self.prompt_token,
            )
            / speed
        )


H200_LLAMA8B = Costs(((1, 1 / 252), (8, 8 / 1889), (64, 64 / 11440), (256, 256 / 24150)), 1 / 41770)
"""llama8b in bfloat16 on one H200, from the tokens a second of `scripts/bench_cuda.py`."""


@dataclass(slots=True)
class Call:
    """A request of the trace, and what became of it."""

    arrival: float
    prompt: list[int]
    """Prompt tokens: equal ones where prompts share a prefix."""
    output: int
    first: float = 0.0
    done: float = 0.0


def trace(rng: random.Random, count: int, rate: float, burst: float, conversations: int) -> list[Call]:
    """Return ``count`` requests at ``rate`` a second, of lengths as in ShareGPT (log-normal), most of them turns of
    conversations that begin with one of five system prompts. ``burst`` is the coefficient of variation of the times
    between arrivals: 1 is Poisson's."""
    systems = [[rng.randrange(1 << 30)] * rng.randrange(400, 1200) for _ in range(5)]
    histories: list[list[int]] = [list(rng.choice(systems)) for _ in range(conversations)]
    shape = 1 / burst**2
    now, calls = 0.0, []
    for _ in range(count):
        now += rng.gammavariate(shape, 1 / (rate * shape))
        asked = min(int(rng.lognormvariate(4.5, 1.2)) + 4, 4000)
        answered = min(int(rng.lognormvariate(5.0, 0.9)) + 1, 2000)
        index = rng.randrange(conversations)
        prompt = histories[index] + [rng.randrange(1 << 30)] * asked
        calls.append(Call(now, prompt, answered))
        # The next turn repeats this one and its answer; a long conversation ends, and another takes its place.
        grown = prompt + [rng.randrange(1 << 30)] * answered
        histories[index] = grown if len(grown) < 6000 else list(rng.choice(systems))
    return calls


@dataclass(slots=True)
class _Prefilling:
    call: Call
    left: int


@dataclass(slots=True)
class Server:
    """An engine with continuous batching and a prefix cache."""

    costs: Costs
    speed: float
    waiting: deque[_Prefilling] = field(default_factory=deque)
    running: list[tuple[int, int, Call]] = field(default_factory=list)
    """Heap of running sequences: the step in which it ends, a tie-breaker, the request."""
    cached: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    """Hashes of the blocks in the cache, the least recently used first."""
    steps: int = 0
    busy_until: float = 0.0
    stepping: bool = False
    gaps: list[tuple[float, int]] = field(default_factory=list)
    """Seconds of a step, and the rows that got a token in it."""
    hits: int = 0
    queried: int = 0

    def add(self, call: Call, hashes: Sequence[bytes]) -> None:
        """Queue a request whose prompt has blocks with these ``hashes``; those in the cache need no computing."""
        known = next((n for n in range(len(hashes), 0, -1) if hashes[n - 1] in self.cached), 0)
        self.hits += known * ROUTER_BLOCK
        self.queried += len(call.prompt)
        for digest in reversed(hashes):
            self.cached[digest] = None
            self.cached.move_to_end(digest)
        while len(self.cached) > self.costs.cache_tokens // ROUTER_BLOCK:
            self.cached.popitem(last=False)
        self.waiting.append(_Prefilling(call, max(1, len(call.prompt) - known * ROUTER_BLOCK)))

    def run(self, now: float, until: float) -> list[Call]:
        """Run a step that begins at ``now``, or several equal ones that begin before ``until``; return the requests
        that ended. :attr:`busy_until` is the end."""
        rows = len(self.running)
        budget, computed = self.costs.budget - rows, 0
        firsts: list[Call] = []
        while self.waiting and budget and rows + len(firsts) < self.costs.max_rows:
            head = self.waiting[0]
            part = min(head.left, budget)
            head.left -= part
            budget -= part
            computed += part
            if head.left:
                break
            firsts.append(self.waiting.popleft().call)
        seconds = self.costs.step(rows, computed, self.speed)
        count = 1
        if not computed and not self.waiting:
            count = max(1, min(self.running[0][0] - self.steps, int(min((until - now) / seconds, 1e9)) + 1))
        self.steps += count
        self.busy_until = now + count * seconds
        self.gaps.append((seconds, rows * count))
        for call in firsts:
            call.first = self.busy_until
            heapq.heappush(self.running, (self.steps + call.output - 1, id(call), call))
        ended = []
        while self.running and self.running[0][0] <= self.steps:
            call = heapq.heappop(self.running)[2]
            call.done = self.busy_until
            ended.append(call)
        return ended


def simulate(
    calls: Sequence[Call], costs: Costs, servers: int, speed: float, policy: str
) -> dict[str, float]:
    """Run a trace; return its throughput in tokens a second, latencies in seconds, and the prefix cache's hit rate."""
    fleet = [Server(costs, speed) for _ in range(servers)]
    router = Router(range(servers), ROUTER_BLOCK, costs.cache_tokens // ROUTER_BLOCK)
    numbers = itertools.count()
    open_requests = [0] * servers
    turns = itertools.count()
    ending: list[list[Call]] = [[] for _ in range(servers)]
    """Requests that end with the step that each server runs."""
    events: list[tuple[float, int, int]] = []  # time, tie-breaker, server whose steps end
    arrivals = deque(calls)

    def begin(index: int, now: float) -> None:
        server = fleet[index]
        server.stepping = bool(server.running or server.waiting)
        if server.stepping:
            ending[index] = server.run(now, arrivals[0].arrival if arrivals else float("inf"))
            heapq.heappush(events, (server.busy_until, next(numbers), index))

    while arrivals or events:
        if arrivals and (not events or arrivals[0].arrival <= events[0][0]):
            call = arrivals.popleft()
            name = str(id(call))
            prefix = prefix_of(call.prompt, ROOT, ROUTER_BLOCK)
            if policy == "prefix":
                index = router.route(name, prefix)
            elif policy == "round-robin":
                index = next(turns) % servers
            else:
                index = min(range(servers), key=open_requests.__getitem__)
            open_requests[index] += 1
            fleet[index].add(call, prefix.hashes)
            if not fleet[index].stepping:
                begin(index, call.arrival)
        else:
            now, _, index = heapq.heappop(events)
            for call in ending[index]:
                open_requests[index] -= 1
                router.note_end(index, str(id(call)))
            begin(index, now)
    span = max(call.done for call in calls) - calls[0].arrival
    waits = sorted(call.first - call.arrival for call in calls)
    gaps = sorted(gap for server in fleet for gap in server.gaps if gap[1])
    return {
        "tokens_per_second": sum(call.output for call in calls) / span,
        "ttft_p50": _percentile([(wait, 1) for wait in waits], 0.5),
        "ttft_p99": _percentile([(wait, 1) for wait in waits], 0.99),
        "itl_p99": _percentile(gaps, 0.99),
        "hit_rate": sum(server.hits for server in fleet) / sum(server.queried for server in fleet),
    }


def _percentile(values: Sequence[tuple[float, int]], share: float) -> float:
    """Return the percentile of ascending values, each of which counts several times; 0 if there are none."""
    rest = share * sum(count for _, count in values)
    for value, count in values:
        rest -= count
        if rest <= 0:
            return value
    return values[-1][0] if values else 0.0


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Simulate all numbers of GPUs, layouts and policies."""
    costs = Costs(**json.loads(Path(args.costs).read_text())) if args.costs else H200_LLAMA8B
    speeds = {
        1: 1.0,
        **{int(size): float(speed) for size, _, speed in (each.partition("=") for each in args.tp)},
    }
    rows = []
    for gpus in args.gpus:
        rate, count = args.rate * gpus, min(args.requests * gpus, args.most)
        for size, speed in speeds.items():
            if size > gpus:
                continue
            for policy in POLICIES:
                calls = trace(random.Random(args.seed), count, rate, args.burst, max(61, count // 6))
                found = simulate(calls, costs, gpus // size, speed, policy)
                rows.append({"gpus": gpus, "gpus_per_server": size, "policy": policy, **found})
                print(
                    f"{gpus:5} GPUs, {size} a server, {policy:14} {found['tokens_per_second']:12,.0f} tok/s  "
                    f"TTFT {found['ttft_p50'] * 1e3:7.1f} ms, p99 {found['ttft_p99'] * 1e3:8.1f} ms  "
                    f"ITL p99 {found['itl_p99'] * 1e3:6.1f} ms  hits {found['hit_rate']:.0%}",
                    flush=True,
                )
    if args.plot:
        panels = {
            f"p99 TTFT (s), {policy}": [row["ttft_p99"] for row in rows if row["policy"] == policy]
            for policy in POLICIES
        }
        Path(args.plot).write_text(distributions("simulated fleets, by number of GPUs and layout", panels))
    return {"rows": rows}


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Measure this machine's steps, predict a run of the built-in model, run it, and compare."""
    from vllmlite import EngineConfig, LLMEngine, SamplingParams

    engine = LLMEngine(EngineConfig(model=args.model, max_num_seqs=16, max_num_batched_tokens=512, seed=1))
    rng = random.Random(args.seed)
    vocab = engine.engine_core.bounds.vocab_size

    def ids(count: int) -> list[int]:
        return [rng.randrange(10, vocab) for _ in range(count)]

    def timed(prompts: Sequence[list[int]], tokens: int) -> list[float]:
        for index, prompt in enumerate(prompts):
            engine.add_request(
                f"timed {index}", prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            )
        found = []
        while engine.has_unfinished_requests():
            begin = time.perf_counter()
            engine.step()
            found.append(time.perf_counter() - begin)
        return found

    def median(values: Sequence[float]) -> float:
        return sorted(values)[len(values) // 2]

    timed([ids(8)], 8)
    decode = [(rows, median(timed([ids(64) for _ in range(rows)], 48)[4:-2])) for rows in (1, 2, 4, 8, 16)]
    base = decode[0][1]
    prompt_token = (median([timed([ids(480)], 2)[0] for _ in range(7)]) - base) / 480
    costs = Costs(decode, prompt_token, max_rows=16, budget=512)
    capacity = 16 / (decode[-1][1] + 16 * 200 * prompt_token / 60)
    calls = []
    now = 0.0
    for _ in range(args.requests):
        now += rng.expovariate(0.6 * capacity / 60)
        calls.append(Call(now, ids(rng.randrange(40, 360)), rng.randrange(20, 100)))
    predicted = simulate(calls, costs, 1, 1.0, "round-robin")
    first: dict[str, float] = {}
    done = 0.0
    waiting = deque(enumerate(calls))
    begin = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        now = time.perf_counter() - begin
        while waiting and waiting[0][1].arrival <= now:
            index, call = waiting.popleft()
            params = SamplingParams(temperature=0, max_tokens=call.output, ignore_eos=True)
            engine.add_request(str(index), call.prompt, params)
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, waiting[0][1].arrival - now))
            continue
        for output in engine.step():
            done = time.perf_counter() - begin
            first.setdefault(output.request_id, done - calls[int(output.request_id)].arrival)
    real = {
        "tokens_per_second": sum(call.output for call in calls) / (done - calls[0].arrival),
        "ttft_p99": _percentile([(wait, 1) for wait in sorted(first.values())], 0.99),
    }
    ratios = {name: predicted[name] / value for name, value in real.items()}
    print(
        f"steps by rows: {', '.join(f'{rows}: {s * 1e3:.2f} ms' for rows, s in decode)}; "
        f"prompt token {prompt_token * 1e6:.1f} us"
    )
    for name, ratio in ratios.items():
        print(f"{name}: predicted {predicted[name]:.4g}, real {real[name]:.4g}, ratio {ratio:.3f}")
    return {"predicted": predicted, "real": real, "ratios": ratios}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument(
        "--tp",
        nargs="*",
        default=["2=1.7", "4=2.8"],
        metavar="N=SPEED",
        help="layouts: N GPUs a server, which are SPEED times as fast as one; the defaults are assumptions",
    )
    parser.add_argument("--rate", type=float, default=12.0, help="requests a second for each GPU")
    parser.add_argument(
        "--requests", type=int, default=300, help="requests for each GPU; with --check: in all"
    )
    parser.add_argument("--most", type=int, default=6000, help="most requests of a simulation")
    parser.add_argument("--burst", type=float, default=2.0, help="variation of arrival times; 1 is Poisson's")
    parser.add_argument(
        "--costs", metavar="FILE", help="JSON with the fields of Costs; default: llama8b on an H200"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE", help="write a drawing (SVG)")
    parser.add_argument("--check", action="store_true", help="predict a run on this machine and compare")
    parser.add_argument("--model", help="model of --check; default: the built-in one")
    args = parser.parse_args()
    print(json.dumps(check(args) if args.check else sweep(args)))


if __name__ == "__main__":
    main()
