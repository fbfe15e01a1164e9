#!/usr/bin/env python3
"""Measure the cache tiers: the time to the first token of a long prompt after a restart, from disk and computed anew.

    PYTHONPATH=. scripts/bench_cache_tiers.py DIR [--tokens 4096] [--disk TIERDIR] [--device cpu] [--rounds 3]
        [--rows restart,evicted,unused,nano] [-- OPTION VALUE...]

DIR has a config.json, for example of llama1b's shape; the weights are random. Rows:

restart  An engine computes the prompt and ends. Another process has the same engine; the file's pages are dropped from
         the page cache before it gets the prompt. Loading the model does not count.
evicted  The prompt's blocks leave the pool and are copied back from host memory.
unused   Prompts of which nothing recurs, with tiers and without, by turns: what saving costs.
nano     Requests of 100 to 1,024 tokens in and out, in a pool of a quarter of the blocks that they need, with host
         memory that saves blocks and is never read, and without it, by turns.
Times are wall time and processor time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllmlite import LLM, SamplingParams

BLOCK = 16
DISK_SIZE = 8 << 30


def make(args: argparse.Namespace, **options: Any) -> LLM:
    """Load the model."""
    sizes = {"max_model_len": args.tokens + 2 * BLOCK, "max_num_seqs": 8}
    return LLM(
        model=args.dir,
        load_format="dummy",
        skip_tokenizer_init=True,
        device=args.device,
        **{**sizes, **options},
    )


def prompt(args: argparse.Namespace, seed: int) -> list[int]:
    """Return a prompt of random ids."""
    draw = random.Random(seed)
    return [draw.randrange(1, args.vocab) for _ in range(args.tokens + 1)]


def first_token(llm: LLM, ids: Sequence[int]) -> dict[str, Any]:
    """Return the wall and processor seconds until the first token, the token, and what was cached."""
    wall, cpu = time.perf_counter(), time.process_time()
    [output] = llm.generate({"prompt_token_ids": list(ids)}, SamplingParams(temperature=0.0, max_tokens=1))
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "token": output.outputs[0].token_ids[0],
        "cached": output.num_cached_tokens,
    }


def drop_pages(directory: str) -> None:
    """Drop the tier's file from the page cache."""
    for path in Path(directory).iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def child(args: argparse.Namespace) -> None:
    """Answer the prompt once in this process, after a short one that warms the engine up."""
    llm = make(args, kv_disk_path=args.disk, kv_disk_size=DISK_SIZE)
    first_token(llm, range(1, 20))
    drop_pages(args.disk)
    print(json.dumps(first_token(llm, prompt(args, 0))))


def restart(args: argparse.Namespace) -> dict[str, Any]:
    """Time the prompt computed and read back, in a process each."""
    found: dict[str, list[dict[str, Any]]] = {"computed": [], "read": []}
    for _ in range(args.rounds):
        shutil.rmtree(args.disk, ignore_errors=True)
        for name in found:
            command = [sys.executable, __file__, *args.given, "--child", "--disk", args.disk]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name].append(json.loads(answer.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    assert {each["token"] for row in found.values() for each in row} == {found["read"][0]["token"]}
    assert all(each["cached"] == args.tokens for each in found["read"])
    return {
        name: {key: min(each[key] for each in row) for key in ("wall", "cpu")} for name, row in found.items()
    }


def evicted(args: argparse.Namespace) -> dict[str, Any]:
    """Time the prompt computed and copied back, in one process whose pool holds one prompt."""
    blocks = -(-(args.tokens + 2 * BLOCK) // BLOCK)
    llm = make(args, num_gpu_blocks_override=blocks, swap_space=args.swap)
    first_token(llm, range(1, 20))
    found: dict[str, list[dict[str, Any]]] = {"computed": [], "copied": []}
    for seed in range(args.rounds + 1):
        found["computed"].append(first_token(llm, prompt(args, seed)))
        if seed:
            found["copied"].append(first_token(llm, prompt(args, seed - 1)))
            assert found["copied"][-1]["token"] == found["computed"][-2]["token"]
            assert found["copied"][-1]["cached"] == args.tokens
    return {
        name: {key: min(each[key] for each in row) for key in ("wall", "cpu")} for name, row in found.items()
    }


def unused(args: argparse.Namespace) -> dict[str, Any]:
    """Time prompts that share nothing, in a pool that holds a quarter of what runs, with tiers and without."""
    blocks = -(-(args.tokens + 2 * BLOCK) // BLOCK)
    engines = {
        "without": make(args, num_gpu_blocks_override=blocks),
        "host": make(args, num_gpu_blocks_override=blocks, swap_space=args.swap),
        "disk": make(args, num_gpu_blocks_override=blocks, kv_disk_path=args.disk, kv_disk_size=DISK_SIZE),
    }
    draw = random.Random(1)
    times: dict[str, list[float]] = {name: [] for name in engines}
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, seed=0)
    length = args.tokens // 8
    for turn in range(args.rounds + 1):
        prompts = [
            {"prompt_token_ids": [draw.randrange(1, args.vocab) for _ in range(length)]} for _ in range(8)
        ]
        for name in sorted(engines, key=lambda name: (turn, draw.random())):
            cpu, wall = time.process_time(), time.perf_counter()
            engines[name].generate(prompts, params)
            if turn:
                times[name].append(
                    time.process_time() - cpu if args.device == "cpu" else time.perf_counter() - wall
                )
    return {name: statistics.median(row) for name, row in times.items()}


def nano(args: argparse.Namespace) -> dict[str, Any]:
    """Time requests of random lengths in a quarter of the pool that they need, with host memory and without."""
    draw = random.Random(2)
    lengths = [(draw.randint(100, 1024), draw.randint(100, 1024)) for _ in range(args.sequences)]
    needed = sum(-(-sum(each) // BLOCK) for each in lengths)
    options = {"num_gpu_blocks_override": needed // 4, "max_model_len": 2048, "max_num_seqs": args.sequences}
    engines = {
        "without": make(args, **options),
        "host": make(args, swap_space=args.swap, preemption_mode="recompute", **options),
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(args.rounds + 1):
        prompts = [
            {"prompt_token_ids": [draw.randrange(1, args.vocab) for _ in range(length)]}
            for length, _ in lengths
        ]
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for _, count in lengths]
        for name in sorted(engines, key=lambda name: (turn, draw.random())):
            cpu, wall = time.process_time(), time.perf_counter()
            engines[name].generate(prompts, params)
            if turn:
                taken = time.process_time() - cpu if args.device == "cpu" else time.perf_counter() - wall
                times[name].append(taken)
                print(name, taken, flush=True)
    stats = engines["host"].llm_engine.stats()
    assert stats.tier_blocks_saved > 0 and not stats.tier_blocks_loaded
    return {
        "saved": stats.tier_blocks_saved,
        "preemptions": {name: llm.llm_engine.stats().num_preemptions for name, llm in engines.items()},
        **{name: statistics.median(row) for name, row in times.items()},
    }


def main() -> None:
    """Run the rows and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=30000, help="ids of prompts are below this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequences", type=int, default=256, help="requests of the row nano")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--swap", type=float, default=1.0, help="GiB of host memory")
    parser.add_argument("--disk", help="directory of the disk tier; it is removed first")
    parser.add_argument("--rows", default="restart,evicted,unused")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.given = sys.argv[1:]
    if args.child:
        child(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.disk = args.disk or f"{scratch}/kv"
        found: dict[str, Any] = {}
        for name in args.rows.split(","):
            rows = {"restart": restart, "evicted": evicted, "unused": unused, "nano": nano}
            found[name] = rows[name](args)
            print(name, json.dumps(found[name]), flush=True)
            gc.collect()
    for name, cached in (("restart", "read"), ("evicted", "copied")):
        if name in found:
            row = found[name]
            found[name]["times_faster"] = {
                k: round(row["computed"][k] / row[cached][k], 2) for k in ("wall", "cpu")
            }
    if "unused" in found:
        row = found["unused"]
        found["unused"]["speed"] = {name: round(row["without"] / row[name], 3) for name in ("host", "disk")}
    if "nano" in found:
        found["nano"]["speed"] = round(found["nano"]["without"] / found["nano"]["host"], 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
