#!/usr/bin/env python3
"""Measure the cost of HTTP: concurrent streams of ``vllmlite serve`` against the same work through ``LLM.generate``.

    PYTHONPATH=. scripts/bench_server.py [--streams N] [--output-len N] [--repeat N] [--model DIR]
        [--config FILE.yaml] [--[no-]engine-process] [--clients N]

Both run alternately; medians are compared. ``overhead_us_per_token`` is the CPU time of a streamed token beyond an
offline one: HTTP, JSON, queues, and contention of two threads. ``api_us_per_token`` is the total CPU time of the HTTP
process per token, including detokenisation, if the engine has its own process; it does not depend on the model's speed.
``itl`` is the time between pieces of a stream, which hold one token, or several if the server falls behind.
``--clients`` is the number of client processes; one reads about as many pieces per second as a server writes. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context

from vllmlite import LLM, SamplingParams
from vllmlite.config.options import read_yaml


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--config", metavar="FILE.yaml", help="options of the engine, for both")
    parser.add_argument("--clients", type=int, default=max(1, (os.cpu_count() or 1) // 4))
    parser.add_argument("--engine-process", action=argparse.BooleanOptionalAction, default=None)
    args = parser.parse_args()
    prompts = [f"The Debian Project is number {index}" for index in range(args.streams)]
    model = [args.model] if args.model else []
    command = [
        sys.executable,
        "-m",
        "vllmlite",
        "serve",
        *model,
        "--port",
        "0",
        "--disable-uvicorn-access-log",
    ]
    options = {}
    if args.config is not None:
        command += ["--config", args.config]
        options = read_yaml(args.config)
    if args.engine_process is not None:
        command.append("--engine-process" if args.engine_process else "--no-engine-process")
    clients = ProcessPoolExecutor(args.clients, get_context("spawn"))
    server = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if line.startswith("INFO") and " at http" in line)
        port = int(line.split(" at http://")[1].split(",")[0].rsplit(":", 1)[1])
        llm = LLM(args.model, **options)
        offline: list[tuple[float, float]] = []
        served: list[tuple[float, float, float]] = []
        gaps: list[float] = []
        for index in range(args.repeat + 1):
            length = args.output_len if index else 4  # the first round is a warm-up
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            begin, cpu = time.perf_counter(), time.process_time()
            llm.generate(prompts, params, use_tqdm=False)
            offline.append((time.perf_counter() - begin, time.process_time() - cpu))
            before = _cpu_seconds(server.pid)
            shares = [(port, prompts[first :: args.clients], length) for first in range(args.clients)]
            found = list(clients.map(_share, *zip(*shares, strict=True)))
            begin, end = min(client.begin for client in found), max(client.end for client in found)
            after = _cpu_seconds(server.pid)
            served.append((end - begin, sum(after) - sum(before), after[0] - before[0]))
            gaps += [gap for client in found for gap in client.gaps if index]
    finally:
        clients.shutdown()
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    tokens = args.streams * args.output_len
    (wall_off, cpu_off), (wall_on, cpu_on, cpu_api) = _medians(offline[1:]), _medians(served[1:])
    result = {
        "streams": args.streams,
        "output_len": args.output_len,
        "offline_tokens_per_second": round(tokens / wall_off, 1),
        "served_tokens_per_second": round(tokens / wall_on, 1),
        "ratio": round(wall_off / wall_on, 3),
        "offline_cpu_seconds": round(cpu_off, 3),
        "served_cpu_seconds": round(cpu_on, 3),
        "overhead_us_per_token": round((cpu_on - cpu_off) / tokens * 1e6, 1),
        "api_us_per_token": round(cpu_api / tokens * 1e6, 1),
        "itl_p50_ms": round(_percentile(gaps, 50) * 1e3, 2),
        "itl_p99_ms": round(_percentile(gaps, 99) * 1e3, 2),
    }
    print(json.dumps(result))


@dataclass(frozen=True, slots=True)
class _Client:
    """The timings of one client process, in seconds of the system-wide monotonic clock."""

    begin: float
    end: float
    gaps: list[float]
    """Times between successive pieces of a stream, for all of the client's streams."""


def _share(port: int, prompts: Sequence[str], length: int) -> _Client:
    begin = time.monotonic()
    streams = asyncio.run(_all(port, prompts, length))
    end = time.monotonic()
    assert all(count == length for count, _ in streams)
    gaps = [later - earlier for _, times in streams for earlier, later in pairwise(times)]
    return _Client(begin, end, gaps)


async def _all(port: int, prompts: Sequence[str], length: int) -> list[tuple[int, list[float]]]:
    return await asyncio.gather(*(_one(port, prompt, length) for prompt in prompts))


async def _one(port: int, prompt: str, length: int) -> tuple[int, list[float]]:
    """Stream one completion; return its token count from the usage, and the times at which pieces arrived.

    Uses plain sockets, because the client shares the server's cores. Token ids are requested so that each token causes
    an event even if random weights give ids without text."""
    body = {"prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True, "stream": True}
    content = json.dumps(
        {**body, "return_token_ids": True, "stream_options": {"include_usage": True}}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(content), content)
    )
    last, times = b"", []
    while data := await reader.read(1 << 16):
        last = (last + data)[-1024:]
        times.append(time.monotonic())
    writer.close()
    count: int = json.loads(last.split(b"data: ")[-2].partition(b"\n")[0])["usage"]["completion_tokens"]
    return count, times[1:-1]  # without the headers, and the usage at the end


def _cpu_seconds(pid: int) -> list[float]:
    """Return the CPU seconds of a process and of its children, itself first."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return [own, *(seconds for child in children for seconds in _cpu_seconds(child))]


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[len(values) * percent // 100]


def _medians(rounds: Sequence[tuple[float, ...]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


if __name__ == "__main__":
    main()
