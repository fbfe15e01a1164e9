#!/usr/bin/env python3
"""Compare the native CUDA backend with the limits of its GPU.

    PYTHONPATH=. scripts/bench_cuda.py [--small DIR] [--large DIR] [--dummy] [--rounds N] [--only ROW...]

DIR are bfloat16 checkpoints with llama1b's and llama8b's shapes (``../shared/peers/gpu/mkmodels.py`` writes them);
without one, its rows stay empty; with --dummy a config.json is enough. "w4a16" and "fp8" rows are those of the large
model with random weights of 4 bits in groups of 128, and of 8-bit floats whose products quantise activations, "w8a8"
rows the same of 8-bit integers, "cache"
rows those with a quantised key/value cache. First, read bandwidth and bfloat16 matrix products are measured (needs
nvcc).
Decode rate = B * (n - 1) / (t_n - t_1) with 128 tokens in and n = 256 out, greedy, new random prompts each round,
medians. "invariant" rows show the cost of `--batch-invariant`, "diverging" rows its use: the probability that a token
of the built-in model differs between a batch and a single request. "ready" is the time from the start of a process,
with the checkpoint in the page cache. "step" rows time captured steps of a few tokens a row, as when drafts are
verified. The last line is JSON: {row: {"ours": ..., "bar": ..., "ratio": ..., "limit":
...}}.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from vllmlite import LLM, SamplingParams
from vllmlite.backends.base import Backend
from vllmlite.backends.batch import ForwardBatch, SlotParams, SlotSpec
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.kv_cache import QUANTIZED_KV, KVSpec
from vllmlite.runner.runner import ModelRunner

HERE = Path(__file__).resolve().parent
BARS: dict[str, dict[str, float]] = {
    "small": {
        "decode 1": 1200, "decode 8": 7500, "decode 64": 32000, "decode 256": 60000, "decode 32 at 8192": 9500,
        "nano": 37000, "first token ms": 4, "shared prefix s": 0.72, "ready s": 5,
    },
    "large": {
        "decode 1": 240, "decode 8": 1750, "decode 64": 11200, "decode 256": 24600, "decode 32 at 8192": 2450,
        "nano": 10450, "prefill 1 x 8192": 0.9 * 38300, "prefill 16 x 2048": 0.9 * 43325, "ready s": 10,
    },
    "large w4a16": {"decode 1": 540, "decode 8": 3700, "decode 64": 14000, "decode 256": 29000, "ready s": 4},
    "large fp8": {"decode 1": 400, "decode 8": 2850, "decode 64": 16000, "decode 256": 31000, "nano": 13000},
    "large fp8 blocks": {}, "large w8a8": {},
}  # fmt: skip
"""Lower bounds of the rows; upper bounds for times."""
PACKED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "w4a16": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128},
        None,
    ),
    "w8a8": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    ),
    "fp8": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    ),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    ),
}
"""Formats of packed weights as compressed-tensors names them: the format, and how weights and activations are
quantised."""
DECODED = 256
OPTIONS: dict[str, Any] = {
    "device": "cuda", "backend": "cuda", "skip_tokenizer_init": True, "max_model_len": 8192 + 512,
}  # fmt: skip
QUERY_LENGTHS = (1, 2, 4, 8)
CACHE_ROWS = ("decode 1", "decode 64", "decode 32 at 8192", "prefill 1 x 8192", "prefill 16 x 2048")
STEPS = ("step 1 x 8192", "step 32 x 8192")
REPLAYS = 10
"""Consecutive replays of a graph, to amortise its launch."""


def main() -> None:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", type=Path)
    parser.add_argument("--large", type=Path)
    parser.add_argument("--dummy", action="store_true", help="random weights; DIR holds only a config.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="rows whose names begin with one of these")
    args = parser.parse_args()
    if args.dummy:
        OPTIONS["load_format"] = "dummy"
    limits = _probe()
    print(limits, flush=True)
    table: dict[str, dict[str, float | None]] = {}

    def note(name: str, value: float, bar: float | None, limit: float | None = None) -> None:
        ratio = None if bar is None else value / bar
        if ratio is not None and (name.endswith(" s") or name.endswith(" ms")):
            ratio = 1 / ratio
        table[name] = {"ours": value, "bar": bar, "ratio": ratio, "limit": limit}
        print(
            f"{name:34} {value:12.4g}  bar {bar or '-'}  ratio {ratio and round(ratio, 3)}  limit {limit}",
            flush=True,
        )

    def wanted(name: str) -> bool:
        return args.only is None or any(name.startswith(begin) for begin in args.only)

    read = limits["read_gb_s"]
    for size, batch, context in ((128, 64, 4096), (128, 8, 4096), (64, 64, 4096), (64, 256, 1024)):
        name = f"attention {size} {batch} x {context} GB/s"
        if wanted(name):
            note(name, _attention(size, batch, context), 0.9 * read, read)
    for batch in (1, 32):
        for queries in QUERY_LENGTHS:
            name = f"attention 128 {batch} x 8192, {queries} queries GB/s"
            if wanted(name):
                note(name, _attention(128, batch, 8192, queries=queries), None, read)
    for kv_dtype in QUANTIZED_KV:
        for queries in QUERY_LENGTHS:
            name = f"attention 128 32 x 8192, {queries} queries, {kv_dtype} GB/s"
            if wanted(name):
                note(name, _attention(128, 32, 8192, queries=queries, kv_dtype=kv_dtype), None, read)
    for which in ("small", "large"):
        model = getattr(args, which)
        if model is None:
            continue
        if wanted(f"{which} ready"):
            _ready(model)
            note(f"{which} ready s", _ready(model), BARS[which]["ready s"])
        if any(wanted(f"{which} {name}") for name in (*BARS["small"], *BARS["large"], *STEPS)):
            llm = LLM(str(model), **OPTIONS)
            for name, value in _rows(llm, args.rounds, lambda row, which=which: wanted(f"{which} {row}")):
                note(f"{which} {name}", value, BARS[which].get(name))
            del llm
            gc.collect()
        if wanted(f"{which} invariant"):
            llm = LLM(str(model), batch_invariant=True, **OPTIONS)
            for name, value in _invariant_rows(llm, args.rounds):
                note(f"{which} invariant {name}", value, None)
            del llm
            gc.collect()
    for kv_dtype in ("int8", "fp8_e4m3"):
        if args.large is None or not wanted(f"large {kv_dtype} cache"):
            continue
        llm = LLM(str(args.large), kv_cache_dtype=kv_dtype, **OPTIONS)
        for name, value in _rows(llm, args.rounds, CACHE_ROWS.__contains__):
            note(f"large {kv_dtype} cache {name}", value, None)
        del llm
        gc.collect()
    for kind in PACKED:
        row = f"large {kind}"
        if args.large is None or not any(wanted(f"{row} {name}") for name in ("", "ready", *BARS["large"])):
            continue
        with tempfile.TemporaryDirectory() as directory:
            _write_packed_config(args.large, Path(directory), kind)
            OPTIONS["load_format"] = "dummy"
            if wanted(f"{row} ready"):
                _ready(Path(directory))
                note(f"{row} ready s", _ready(Path(directory)), BARS[row].get("ready s"))
            llm = LLM(directory, **OPTIONS)
            for name, value in _rows(llm, args.rounds, lambda each, row=row: wanted(f"{row} {each}")):
                note(f"{row} {name}", value, BARS[row].get(name))
            del llm
            gc.collect()
    if wanted("diverging"):
        for name, options in (("default", {}), ("invariant", {"batch_invariant": True})):
            note(f"diverging tokens, {name} %", 100 * _divergence(**options), None)
    print(json.dumps({"limits": limits, **table}))


def _write_packed_config(model: Path, target: Path, kind: str) -> None:
    """The configuration of ``model`` with packed weights."""
    config = json.loads((model / "config.json").read_bytes())
    form, weights, activations = PACKED[kind]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        },
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))


def _rows(llm: LLM, rounds: int, wanted: Any) -> Iterator[tuple[str, float]]:
    draw = random.Random(0)
    for batch in (1, 8, 64, 256):
        if wanted(f"decode {batch}"):
            yield f"decode {batch}", _decode(llm, draw, batch, 128, rounds)
    if wanted("decode 32 at 8192"):
        yield "decode 32 at 8192", _decode(llm, draw, 32, 8192, 1, 128)
    for batch, length in ((1, 8192), (16, 2048)):
        if wanted(f"prefill {batch} x {length}"):
            taken = [_seconds(llm, _prompts(draw, batch, length), 1) for _ in range(rounds + 1)][1:]
            yield f"prefill {batch} x {length}", batch * length / statistics.median(taken)
    if wanted("first token ms"):
        taken = [_seconds(llm, _prompts(draw, 1, 128), 1) for _ in range(10)]
        yield "first token ms", 1e3 * statistics.median(taken)
    for batch in (1, 32):
        if wanted(f"step {batch} x 8192"):
            for queries in QUERY_LENGTHS:
                yield f"step {batch} x 8192, {queries} tokens ms", _step(llm, batch, 8192, queries)
    if wanted("nano"):
        yield "nano", _nano(llm)
    if wanted("shared prefix s"):
        shared = _prompts(draw, 1, 2048)[0]
        prompts = [shared + own for own in _prompts(draw, 256, 128)]
        yield "shared prefix s", _seconds(llm, prompts, 64)


def _invariant_rows(llm: LLM, rounds: int) -> Iterator[tuple[str, float]]:
    draw = random.Random(0)
    for batch in (1, 8, 64, 256):
        yield f"decode {batch}", _decode(llm, draw, batch, 128, rounds)
    taken = [_seconds(llm, _prompts(draw, 16, 2048), 1) for _ in range(rounds + 1)][1:]
    yield "prefill 16 x 2048", 16 * 2048 / statistics.median(taken)


def _ready(model: Path) -> float:
    """Return the seconds from the start of a process until its engine accepts requests."""
    code = "import sys, json; from vllmlite import LLM; LLM(sys.argv[1], **json.loads(sys.argv[2]))"
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code + "; print(flush=True)", str(model), json.dumps(OPTIONS)],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit("the engine did not start")
        return time.perf_counter() - began


def _divergence(**options: Any) -> float:
    """Return the probability that a token of the built-in model in bfloat16 differs between a batch of 128 and a single
    request, given equal preceding tokens."""
    prompts = _prompts(random.Random(0), 128, 64)
    params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    llm = LLM(device="cuda", backend="cuda", dtype="bfloat16", enable_prefix_caching=False, **options)
    vocabulary = llm.llm_engine.engine.bounds.vocab_size
    given: list[Any] = [{"prompt_token_ids": [i % vocabulary for i in prompt]} for prompt in prompts]
    together = [output.outputs[0].token_ids for output in llm.generate(given, params, use_tqdm=False)]
    seen = parted = 0
    for prompt, batched in zip(given, together, strict=True):
        alone = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
        same = next(
            (i for i, pair in enumerate(zip(alone, batched, strict=True)) if len(set(pair)) > 1), None
        )
        seen += len(alone) if same is None else same + 1
        parted += same is not None
    return parted / seen


def _prompts(draw: random.Random, count: int, length: int) -> list[list[int]]:
    return [[draw.randrange(10, 100000) for _ in range(length)] for _ in range(count)]


def _seconds(llm: LLM, prompts: list[list[int]], tokens: int | list[int]) -> float:
    counts = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in counts]
    given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    start = time.perf_counter()
    llm.generate(given, params, use_tqdm=False)
    return time.perf_counter() - start


def _decode(
    llm: LLM, draw: random.Random, batch: int, length: int, rounds: int, tokens: int = DECODED
) -> float:
    rates = []
    for _ in range(rounds):
        first = _seconds(llm, _prompts(draw, batch, length), 1)
        rates.append(batch * (tokens - 1) / (_seconds(llm, _prompts(draw, batch, length), tokens) - first))
    return statistics.median(rates)


def _nano(llm: LLM) -> float:
    """Return output tokens per second for 256 simultaneous requests with lengths uniform in 100 to 1024, in and out."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10000) for _ in range(draw.randint(100, 1024))] for _ in range(256)]
    counts = [draw.randint(100, 1024) for _ in range(256)]
    return sum(counts) / _seconds(llm, prompts, counts)


def _step(llm: LLM, batch: int, context: int, queries: int) -> float:
    """Return the milliseconds of a captured step of ``queries`` tokens a row; the cache holds any values."""
    runner = cast(ModelRunner, llm.llm_engine.engine.runner)
    backend, slots, spec = runner.backend, runner.slots, runner.model.kv_spec
    columns = np.arange(context // spec.block_size, dtype=np.int32)
    for slot in range(batch):
        backend.set_slot(slots, slot, SlotParams())
        blocks = slot * len(columns) + columns
        backend.append_blocks(slots, np.full_like(columns, slot), columns, blocks)
    if not runner.graphs.record(batch, queries):
        raise SystemExit(f"{batch} rows of {queries} tokens cannot be captured")
    host = _going_on(batch, queries, context)
    key = runner.graphs.find(host)
    assert key is not None
    device = backend.upload(host, slots, spec, key)
    return 1e3 * _replayed(backend, lambda: runner.graphs.run(key, device))


def _replayed(backend: Backend, run: Callable[[], Any]) -> float:
    """Return the seconds of one replay of a graph."""
    taken = []
    for _ in range(11):
        cast(Any, backend)._runtime.synchronize()
        start = time.perf_counter()
        for _ in range(REPLAYS):
            run()
        cast(Any, backend)._runtime.synchronize()
        taken.append((time.perf_counter() - start) / REPLAYS)
    return statistics.median(taken[1:])


def _going_on(batch: int, count: int, ends: int) -> ForwardBatch:
    """Rows of ``count`` tokens up to position ``ends``, which go on from sampled ids; all are sampled from."""
    rows, tokens = np.arange(batch, dtype=np.int32), np.arange(batch * count, dtype=np.int32)
    positions = np.tile(np.arange(ends - count, ends, dtype=np.int32), batch)
    return ForwardBatch(
        num_tokens=batch * count, num_rows=batch, max_query_len=count, max_context=ends,
        token_ids=np.where(tokens % count, 1, -1).astype(np.int32), positions=positions,
        query_start_loc=np.arange(batch + 1, dtype=np.int32) * count, slots=rows,
        context_lens=np.full(batch, ends, np.int32), logits_rows=tokens, sample_slots=np.repeat(rows, count),
        sample_positions=positions.astype(np.int64) + 1,
    )  # fmt: skip


def _attention(size: int, batch: int, context: int, *, queries: int = 1, kv_dtype: str = "bfloat16") -> float:
    """Return GB/s of keys and values read by attention of ``queries`` tokens a row.

    There are enough layers to exceed all caches and to amortise the graph's launch. Rows go on from sampled ids, as in
    decoding."""
    backend = CudaBackend("cuda", "bfloat16")
    heads, kv_heads, blocks = 32, 8, batch * context // 16
    spec = KVSpec(1, kv_heads, size, 16, kv_dtype)
    layers = max(8, int(2e9 / (blocks * backend.kv_bytes_per_block(spec))))
    spec = replace(spec, num_layers=layers)
    kv = backend.alloc_kv(spec, blocks)
    slots = backend.alloc_slots(SlotSpec(batch, context // 16, context, 1000, batch * context // 16))
    order = np.random.default_rng(0).permutation(blocks).astype(np.int32)
    for slot in range(batch):
        backend.set_slot(slots, slot, SlotParams())
    columns = np.tile(np.arange(context // 16, dtype=np.int32), batch)
    backend.append_blocks(slots, np.repeat(np.arange(batch, dtype=np.int32), context // 16), columns, order)

    width = (heads + 2 * kv_heads) * size
    noise = np.random.default_rng(1).standard_normal((batch * 256, width)).astype(np.float32)
    qkv = backend.tensor(noise, "bfloat16")
    for end in range(256, context + 1, 256):
        piece = backend.upload(_going_on(batch, 256, end), slots, spec)
        for layer in range(layers):
            backend.attn_prep(qkv, heads, None, kv, layer, piece)
    last = backend.upload(_going_on(batch, queries, context), slots, spec)
    q = backend.attn_prep(backend.tensor(noise[: batch * queries], "bfloat16"), heads, None, kv, 0, last)

    def attend() -> list[Any]:
        return [backend.paged_attention(q, kv, layer, last, size**-0.5) for layer in range(layers)][-1:]

    attend()
    graph = backend._runtime.capture(last.backend, attend)
    taken = _replayed(backend, lambda: backend._runtime.replay(graph, last.backend))
    return blocks * backend.kv_bytes_per_block(spec) / taken / 1e9


def _probe() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory) / "cuda_probe"
        command = ["nvcc", "-O2", "-std=c++17", "-arch=native", str(HERE / "cuda_probe.cu"), "-lcublasLt"]
        subprocess.run([*command, "-o", str(binary)], check=True)
        done = subprocess.run([str(binary)], check=True, capture_output=True, text=True)
    values: dict[str, float] = json.loads(done.stdout)
    return values


if __name__ == "__main__":
    main()
