#!/usr/bin/env python3
"""Compare the native CPU backend with vLLM, llama.cpp and the limits of the machine, and print the table of bars.

    PYTHONPATH=. scripts/bench_cpu.py [MODEL] [--vllm PYTHON] [--llama-bench COMMAND] [--llama-batched-bench COMMAND]
        [--gguf FILE] [--gguf-q8 FILE] [--gguf-q4 FILE] [--gguf-q4-k-m FILE] [--rows 'decode-1-*,start/*']
        [--rounds 3] [--scale 0.25]

MODEL is a checkpoint directory in bfloat16; the GGUF files have the same weights. Rows named after a shape use random
weights created here, and need only the gguf package. In each round, every figure of the chosen rows is measured once,
ours and the peers' alternately; medians of the rounds are compared, for vLLM those of the faster of its two modes
(eager, compiled). A row whose peer is not given, or cannot run it, has no ratio. ``--scale`` shortens the 64 mixed
requests of 64 to 512 tokens, which take minutes. ``--around`` names a command that is started before each round, prints
``ready`` (for example when it has quieted the machine), and ends after the round when its standard input is closed. The
last line is JSON: {row: {"ours": ..., "peer": ..., "ratio": ..., "bar": ...}}; a bar is met by a ratio of at least it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from cpu_bench.models import Models
from cpu_bench.programs import programs, step_model
from cpu_bench.rows import LONG, Figure, Row, table
from cpu_bench.shapes import SHAPES, Shape
from cpu_bench.systems import Engine, Limits, LlamaBench, Made, Step, System

from vllmlite.backends.cores import usable_cores

POOL_GIB = 3
COMMON = {"skip_tokenizer_init": True, "dtype": "bfloat16", "max_num_seqs": 64}
OURS = {"backend": "cpu", "max_model_len": LONG + 64, "kv_cache_memory_bytes": POOL_GIB << 30}
OURS_SHAPES = {"backend": "cpu", "max_model_len": 512, "kv_cache_memory_bytes": 1 << 30}
QUANTIZATIONS = {"bf16": {}, "q8": {"quantization": "int8"}}
VLLM = {"max_model_len": 1040}
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": str(POOL_GIB),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "HF_HUB_OFFLINE": "1",
}
SHORTEST, LONGEST = 64, 512


def main() -> None:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--vllm", metavar="COMMAND", help="Python of an environment with vLLM for the CPU")
    parser.add_argument("--llama-bench", metavar="COMMAND")
    parser.add_argument("--llama-batched-bench", metavar="COMMAND")
    parser.add_argument("--gguf", metavar="FILE", help="GGUF file in bf16")
    parser.add_argument("--gguf-q8", metavar="FILE", help="GGUF file in Q8_0")
    parser.add_argument("--gguf-q4", metavar="FILE", help="GGUF file in Q4_0")
    parser.add_argument("--gguf-q4-k-m", metavar="FILE", help="GGUF file in Q4_K_M, also run by vllmlite")
    parser.add_argument("--rows", metavar="GLOB,...", default="*", help="rows to measure (default: all)")
    parser.add_argument("--list", action="store_true", help="list the rows' names and exit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--scale", type=float, default=0.25, help="factor for the mixed requests' lengths; 1 for the bar"
    )
    parser.add_argument(
        "--around", metavar="COMMAND", help="command to run during each round; must print a line first"
    )
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, help="directory for created checkpoints, which are kept"
    )
    args = parser.parse_args()
    patterns = args.rows.split(",")
    rows = [
        row
        for row in table((int(SHORTEST * args.scale), int(LONGEST * args.scale)))
        if any(fnmatch(row.name, pattern) for pattern in patterns)
    ]
    if args.list:
        print(*(row.name for row in rows), sep="\n")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # never leave engines stopped
    with tempfile.TemporaryDirectory() as temporary:
        systems = _systems(args, args.keep or Path(temporary))
        try:
            found = _measure(rows, systems, args.rounds, args.around)
        finally:
            for system in systems.values():
                system.close()
    print(json.dumps({row.name: _compared(row, found) for row in rows}))


def _systems(args: argparse.Namespace, directory: Path) -> dict[str, System]:
    """Return the systems that can be measured, by the names used in rows."""
    threads = usable_cores()
    python = [sys.executable]
    systems: dict[str, System] = {"step": Step(python, step_model(directory))}
    single, batched = (
        shlex.split(command) if command else None for command in (args.llama_bench, args.llama_batched_bench)
    )
    for name in SHAPES:
        shape = Shape(name, directory)
        for kind, quantization in QUANTIZATIONS.items():
            options = {**COMMON, **OURS_SHAPES, **quantization, "model": str(shape.path)}
            systems[f"{name} {kind}"] = Made(shape.checkpoint, Engine(python, "vllmlite", options))
            peer = LlamaBench(single, batched, str(shape.gguf_path(kind)), threads)
            systems[f"llama.cpp {name} {kind}"] = Made(partial(shape.gguf, kind), peer)
    if args.model is None:
        return systems
    models = Models(args.model, directory)
    ours = {"model": str(models.base), **COMMON, **OURS}
    systems |= {
        "bf16": Engine(python, "vllmlite", ours),
        "int8": Engine(python, "vllmlite", {**ours, "quantization": "int8"}),
        "int4": Engine(python, "vllmlite", {**ours, "quantization": "int4"}),
        "awq": Engine(python, "vllmlite", {**ours, "model": str(models.awq()), "load_format": "dummy"}),
        "limits": Limits(models, threads, directory),
        "programs": programs(models),
    }
    if args.vllm:
        theirs = {"model": str(models.base), **COMMON, **VLLM}
        for mode, eager in (("eager", True), ("compiled", False)):
            options = {**theirs, "enforce_eager": eager}
            systems[f"vllm {mode}"] = Engine(shlex.split(args.vllm), "vllm", options, VLLM_ENVIRONMENT)
    if args.gguf_q4_k_m:
        systems["Q4_K_M"] = Engine(python, "vllmlite", {**ours, "model": args.gguf_q4_k_m, "dtype": "auto"})
    for name, gguf in (
        ("bf16", args.gguf),
        ("Q8_0", args.gguf_q8),
        ("Q4_0", args.gguf_q4),
        ("Q4_K_M", args.gguf_q4_k_m),
    ):
        if gguf:
            systems[f"llama.cpp {name}"] = LlamaBench(single, batched, gguf, threads)
    return systems


def _measure(
    rows: list[Row], systems: dict[str, System], rounds: int, around: str | None
) -> dict[Figure, float]:
    """Return the median of each figure that could be measured; print why others could not."""
    figures = list(dict.fromkeys(figure for row in rows for figure in (row.ours, *row.peers)))
    values: dict[Figure, list[float]] = {figure: [] for figure in figures}

    def attempt(figure: Figure, action: str) -> None:
        try:
            system = systems.get(figure.system)
            if system is None:
                raise RuntimeError("not given")
            value: float | None = getattr(system, action)(figure.work, **dict(figure.options))
            if value is not None:
                values[figure].append(value)
        except RuntimeError as error:
            print(f"{_described(figure)}: {error}", file=sys.stderr)
            del values[figure]

    for figure in figures:
        print(f"preparing {_described(figure)}", file=sys.stderr)
        attempt(figure, "prepare")
    for number in range(rounds):
        with _beside(around):
            print(f"round {number + 1}", file=sys.stderr)
            for system in systems.values():
                system.rest()
            for figure in list(values):
                attempt(figure, "measure")
    for figure, measured in values.items():
        print(f"{_described(figure):70} {' '.join(f'{value:.4g}' for value in measured)}")
    return {figure: statistics.median(measured) for figure, measured in values.items()}


def _compared(row: Row, found: dict[Figure, float]) -> dict[str, float | None]:
    """Print a row and return its entry."""
    ours = found.get(row.ours)
    peers = [found[peer] for peer in row.peers if peer in found]
    peer = row.limit if row.limit is not None else max(peers, default=None)
    ratio = None
    if ours is not None and peer is not None:
        ratio = ours / peer if row.limit is None else peer / max(ours, 1e-9)
    shown = ["-" if value is None else f"{value:.4g}" for value in (ours, peer, ratio)]
    verdict = "" if ratio is None else "met" if ratio >= row.bar else "missed"
    print(
        f"{row.name:26} {shown[0]:>9} {shown[1]:>9} {row.unit:6} ratio {shown[2]:>7} bar {row.bar} {verdict}"
    )
    return {"ours": ours, "peer": peer, "ratio": ratio, "bar": row.bar}


def _described(figure: Figure) -> str:
    return " ".join([figure.system, figure.work, *(f"{name}={value}" for name, value in figure.options)])


@contextmanager
def _beside(command: str | None) -> Iterator[None]:
    """Run ``command`` in the background, from its first line of output until its standard input is closed."""
    if command is None:
        yield
        return
    process: subprocess.Popen[Any] = subprocess.Popen(
        shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.communicate()


if __name__ == "__main__":
    main()
