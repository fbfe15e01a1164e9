#!/usr/bin/env python3
"""The native CPU backend beside the limits of the machine, and beside llama.cpp where it is given.

    PYTHONPATH=. scripts/bench_cpu.py MODEL [--llama-bench "COMMAND" --gguf FILE] [--rounds N]

MODEL is a checkpoint directory in bfloat16 (``../shared/peers/make_model.py`` writes one). Ours and the peer's runs
alternate, and the machine's read bandwidth and bfloat16 arithmetic are probed in between; medians are compared. The
last line is one JSON object: {row: {"ours": ..., "peer": ..., "ratio": ..., "bar": ...}}, null where nothing is known.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vllmlite import LLM, SamplingParams
from vllmlite.backends.cores import usable_cores

HERE = Path(__file__).resolve().parent
DECODED = 24
PREFILLED = 512
LONG = 8192


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench", help="command that starts llama.cpp's llama-bench")
    parser.add_argument("--gguf", help="the same weights for it")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    peer = _llama(args.llama_bench, args.gguf) if args.llama_bench and args.gguf else None
    if peer is None:
        print("llama.cpp: not given, its columns stay empty")
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as directory:
        probe = _probe(Path(directory))
        llm = LLM(
            str(args.model), backend="cpu", skip_tokenizer_init=True, max_model_len=LONG + 64,
            enable_prefix_caching=False, kv_cache_memory_bytes=1 << 30,
        )  # fmt: skip
        for _ in range(args.rounds):
            for name, value in probe().items():
                note(name, value)
            if peer is not None:
                for name, value in peer().items():
                    note(name, value)
            for batch in (1, 8, 16):
                note(f"decode {batch}", _decode(llm, batch, 16))
            note("prefill", PREFILLED / _seconds(llm, 1, PREFILLED, 1))
            if not found.get("decode long"):
                note("decode long", _decode(llm, 1, LONG))
                note("decode short", _decode(llm, 1, 16))
        note("start built-in", _start([]))
        note("start model", _start(["--model", str(args.model)]))
    print(json.dumps(_table({name: statistics.median(values) for name, values in found.items()}, args.model)))


def _table(found: dict[str, float], model: Path) -> dict[str, dict[str, float | None]]:
    """The rows of the bars, printed as they are made."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9
    config = json.loads((model / "config.json").read_text())
    kv = 2 * 2 * LONG * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] / 1e9
    per_token = (weights * 1e9 / 2 - config["vocab_size"] * config["hidden_size"]) * 2 / 1e9
    attention = 1 / (1 / found["decode long"] - 1 / found["decode short"])
    rows: list[tuple[str, float, float | None, float]] = [
        ("decode 1, tok/s, llama.cpp bf16", found["decode 1"], found.get("llama decode"), 0.97),
        ("decode 1, GB/s, read bandwidth", found["decode 1"] * weights, found["read_gb_s"], 0.90),
        ("decode 8, GB/s, read bandwidth", found["decode 8"] / 8 * weights, found["read_gb_s"], 0.90),
        ("decode 16, GB/s, read bandwidth", found["decode 16"] / 16 * weights, found["read_gb_s"], 0.75),
        ("prefill 512, tok/s, llama.cpp bf16", found["prefill"], found.get("llama prefill"), 4.0),
        (
            "prefill 512, GFLOP/s, arithmetic",
            found["prefill"] * per_token,
            found["bf16_gflop_s"] or None,
            0.85,
        ),
        ("attention at 8192, GB/s, read bandwidth", attention * kv, found["read_gb_s"], 0.80),
        ("built-in model, 1/s to first token", 1 / found["start built-in"], 1 / 0.6, 1.0),
        ("model, 1/s to first token", 1 / found["start model"], 1 / 1.5, 1.0),
    ]
    table = {}
    for name, ours, peer, bar in rows:
        ratio = None if peer is None else ours / peer
        table[name] = {"ours": ours, "peer": peer, "ratio": ratio, "bar": bar}
        shown = "-" if peer is None or ratio is None else f"{peer:10.1f} {ratio:6.2f}"
        print(f"{name:42} {ours:10.1f} {shown} (bar {bar})")
    for batch in (1, 8, 16):
        print(f"decode {batch}: {found[f'decode {batch}']:.1f} tok/s")
    return table


def _seconds(llm: LLM, batch: int, length: int, tokens: int) -> float:
    draw = np.random.default_rng(time.perf_counter_ns())
    prompts: list[Any] = [
        {"prompt_token_ids": draw.integers(10, 20_000, length).tolist()} for _ in range(batch)
    ]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def _decode(llm: LLM, batch: int, length: int) -> float:
    """Tokens a second after the first: stamped by the engine's own steps, so that prefilling does not count."""
    engine = llm.llm_engine
    draw = np.random.default_rng(time.perf_counter_ns())
    params = SamplingParams(temperature=0, max_tokens=DECODED + 2, ignore_eos=True)
    for index in range(batch):
        prompt: Any = {"prompt_token_ids": draw.integers(10, 20_000, length).tolist()}
        engine.add_request(str(index), prompt, params)
    stamps = []
    while engine.has_unfinished_requests():
        engine.step()
        stamps.append(time.perf_counter())
    steps: list[float] = np.diff(stamps)[-DECODED:].tolist()
    return batch / statistics.median(steps)


def _start(options: list[str]) -> float:
    """Seconds from process start to the end of a generation of one token; the better of three."""
    command = [
        sys.executable,
        "-m",
        "vllmlite",
        "generate",
        "--backend",
        "cpu",
        "--max-tokens",
        "1",
        *options,
    ]
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([*command, "Debian is"], check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _probe(directory: Path) -> Callable[[], dict[str, float]]:
    binary = directory / "cpu_probe"
    source = HERE / "cpu_probe.cpp"
    options = ["-O2", "-std=c++20", "-march=native", "-pthread"]
    subprocess.run(["c++", *options, str(source), "-o", str(binary)], check=True)

    def run() -> dict[str, float]:
        done = subprocess.run([str(binary), str(usable_cores())], check=True, capture_output=True, text=True)
        values: dict[str, float] = json.loads(done.stdout)
        return values

    return run


def _llama(command: str, gguf: str) -> Callable[[], dict[str, float]]:
    argv = [*shlex.split(command), "-m", gguf, "-t", str(usable_cores()), "-p", str(PREFILLED), "-n", "32"]

    def run() -> dict[str, float]:
        done = subprocess.run([*argv, "-r", "1", "-o", "json"], check=True, capture_output=True, text=True)
        results = json.loads(done.stdout)
        return {
            "llama decode" if result["n_gen"] else "llama prefill": float(result["avg_ts"])
            for result in results
        }

    return run


if __name__ == "__main__":
    main()
