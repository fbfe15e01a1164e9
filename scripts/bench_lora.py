#!/usr/bin/env python3
"""Compare decoding steps of rows with LoRA adapters with those of the base model.

    PYTHONPATH=. scripts/bench_lora.py DIR [--backend cpu|cuda] [--rank 16] [--rounds 20] [--only ROWS:ADAPTERS ...]

DIR holds a config.json; weights and adapters, which change all linear layers, are random. A case is a captured step of
one token for each of a number of rows, with contexts of 128 tokens, without sampling; the rows are divided among the
adapters. Steps with adapters, base steps of the same engine, and steps of an engine without LoRA take turns. Times are
CPU time of one thread for the CPU and elapsed time for a GPU. "ratio" is the time of a base step divided by that of a
step with adapters, "enabled" that of a step without LoRA divided by that of a base step, both of medians of the rounds;
"least" is the ratio of the least times. "load ms" is the time to load an adapter. The last line is JSON: {case:
{"ratio": ..., "bar": ...}}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import ForwardBatch, SlotParams
from vllmlite.config.engine_config import EngineConfig
from vllmlite.models.adapters import ability, places
from vllmlite.models.decoder import Decoder
from vllmlite.runner.build import build_runner, plan_for
from vllmlite.runner.runner import ModelRunner
from vllmlite.weights.adapter import Adapter, AdapterLimits, LowRank
from vllmlite.weights.host import HostTensor

BARS = {
    "cpu": {(1, 1): 0.93, (16, 8): 0.90},
    "cuda": {(1, 1): 0.93, (64, 8): 0.90, (256, 64): 0.80},
}
ENABLED = 0.99
CONTEXT = 128
REPLAYS = {"cpu": 1, "cuda": 10}
"""Steps that are timed together."""


def main() -> None:
    """Measure the cases and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--backend", choices=BARS, default="cpu")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="*", metavar="ROWS:ADAPTERS", help="cases other than the bars'")
    args = parser.parse_args()
    bars = BARS[args.backend]
    cases = [tuple(map(int, case.split(":"))) for case in args.only] if args.only else list(bars)
    limits = AdapterLimits(max(adapters for _, adapters in cases), args.rank)
    most_rows = max(rows for rows, _ in cases)
    config = EngineConfig(
        model=str(args.model),
        backend=args.backend,
        device=args.backend,
        dtype="bfloat16",
        load_format="dummy",
        max_model_len=2 * CONTEXT,
        max_num_seqs=most_rows,
        num_gpu_blocks_override=most_rows * CONTEXT // 16 + 16,
        skip_tokenizer_init=True,
        threads=1 if args.backend == "cpu" else None,
        enforce_eager=True,
    )
    first = build_runner(config, plan_for(config)).runner
    backend, model = first.backend, cast(Decoder, first.model)
    del first

    def runner(adapters: AdapterLimits | None) -> ModelRunner:
        return ModelRunner(
            backend,
            model,
            num_blocks=config.num_gpu_blocks_override or 0,
            max_num_seqs=most_rows,
            max_model_len=2 * CONTEXT,
            adapters=adapters,
        )

    off, on = runner(None), runner(limits)
    adapter = random_adapter(model, args.rank)
    taken = []
    for index in range(1, limits.max_adapters + 1):
        synchronize(backend)
        began = time.perf_counter()
        on.load_adapter(index, adapter)
        synchronize(backend)
        taken.append(time.perf_counter() - began)
    print(f"load ms {1e3 * statistics.median(taken):.1f}")
    table: dict[str, dict[str, float | None]] = {}
    for rows, count in cases:
        ids = np.arange(rows, dtype=np.int32) % count + 1
        steps = [captured(on, rows, ids), captured(on, rows, None), captured(off, rows, None)]
        clock = time.process_time if args.backend == "cpu" else time.perf_counter
        times: list[list[float]] = [[] for _ in steps]
        for _ in range(args.rounds + 1):
            for step, own in zip(steps, times, strict=True):
                synchronize(backend)
                began = clock()
                for _ in range(REPLAYS[args.backend]):
                    step()
                synchronize(backend)
                own.append((clock() - began) / REPLAYS[args.backend])
        adapted, base, without = (statistics.median(own[1:]) for own in times)
        least = min(times[1][1:]) / min(times[0][1:])
        table[f"{rows} rows, {count} adapters"] = {
            "adapted ms": 1e3 * adapted, "base ms": 1e3 * base, "off ms": 1e3 * without,
            "ratio": base / adapted, "least": least, "bar": bars.get((rows, count)),
            "enabled": without / base, "enabled bar": ENABLED,
        }  # fmt: skip
        print(rows, count, {key: value and round(value, 4) for key, value in [*table.values()][-1].items()})
    print(json.dumps({"load ms": 1e3 * statistics.median(taken), **table}))


def synchronize(backend: Backend) -> None:
    """Wait for all work of a backend."""
    runtime = cast(Any, backend)._runtime
    (runtime.synchronize if backend.name == "cuda" else runtime.flush)()


def random_adapter(model: Decoder, rank: int) -> Adapter:
    """Return an adapter of all linear layers; those of one shape have the same numbers."""
    draw, made = np.random.default_rng(0), {}

    def numbers(shape: tuple[int, int]) -> HostTensor:
        if shape not in made:
            bits = (draw.standard_normal(shape) * 0.01).astype(np.float32).view(np.uint32) >> 16
            made[shape] = bits.astype(np.uint16).reshape(-1).view(np.uint8)
        return HostTensor("bfloat16", shape, made[shape].copy())

    return Adapter(
        "random",
        {
            name: LowRank(numbers((rank, columns)), numbers((out, rank)), 0.5)
            for name, (out, columns) in places(model.spec).items()
            if ability(name) is None
        },
    )


def captured(runner: ModelRunner, rows: int, adapters: Any) -> Callable[[], object]:
    """Return a function that runs the captured step of ``rows`` rows; ``adapters`` are their indices, or None."""
    backend, slots, spec = runner.backend, runner.slots, runner.model.kv_spec
    columns = np.arange(CONTEXT // spec.block_size, dtype=np.int32)
    for slot in range(rows):
        backend.set_slot(slots, slot, SlotParams())
        backend.append_blocks(slots, np.full_like(columns, slot), columns, slot * len(columns) + columns)
    tokens = np.arange(rows, dtype=np.int32)
    host = ForwardBatch(
        num_tokens=rows, num_rows=rows, max_query_len=1, max_context=CONTEXT,
        token_ids=tokens % 100, positions=np.full(rows, CONTEXT - 1, np.int32),
        query_start_loc=np.arange(rows + 1, dtype=np.int32), slots=tokens,
        context_lens=np.full(rows, CONTEXT, np.int32), logits_rows=tokens, sample_slots=tokens,
        sample_positions=np.full(rows, CONTEXT, np.int64), adapters=adapters,
    )  # fmt: skip
    if not len(runner.graphs):
        for _ in runner.graphs.capture():
            pass
    key = runner.graphs.find(host)
    assert key is not None
    device = backend.upload(host, slots, spec, key)
    return lambda: runner.graphs.run(key, device)


if __name__ == "__main__":
    main()
