#!/usr/bin/env python3
"""Measure the cost of scheduling: the nano workload through engine, runner and output processing on a backend that
computes nothing. Prints microseconds of CPU time per decode row and step; the last line is JSON.

    PYTHONPATH=. python3 scripts/bench_scheduler.py [--requests 256] [--bar 5]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import ForwardBatch
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.backends.sampling import Sampled
from vllmlite.engine.engine import Engine
from vllmlite.engine.scheduler import Limits
from vllmlite.output_processor import OutputProcessor
from vllmlite.runner.runner import ModelRunner
from vllmlite.sampling_params import RequestOutputKind, SamplingParams

VOCAB = 128_256


@dataclass
class NullModel:
    """A model that computes nothing."""

    kv_spec = KVSpec(num_layers=1, num_kv_heads=1, head_dim=1, block_size=16, dtype="float32")
    vocab_size = VOCAB

    def forward(self, batch: ForwardBatch, kv: Any) -> Any:
        """Return nothing."""
        return None

    def logits(self, hidden: Any) -> Any:
        """Return nothing."""
        return None


class NullBackend:
    """A backend with minimal cost: ops return nothing, and sampling returns id 5."""

    def __getattr__(self, name: str) -> Any:
        """Return a function for any op."""
        return lambda *_args, **_kwargs: None

    def upload(self, batch: ForwardBatch, *_args: Any) -> ForwardBatch:
        """Return the batch unchanged."""
        return batch

    def sample(self, _logits: Any, _slots: Any, batch: ForwardBatch) -> Sampled:
        """Return id 5 for every row."""
        return Sampled(np.full(len(batch.logits_rows), 5, np.int32))

    def to_host(self, array: Any) -> Any:
        """Return the array unchanged."""
        return array

    def graph_rows(self, _most: int) -> tuple[int, ...]:
        """Capture no steps."""
        return ()


def measure(lengths: Sequence[tuple[int, int]], depth: int) -> dict[str, float]:
    """Run requests of (input, output) lengths; return microseconds per decode row in steps that only decode."""
    limits = Limits(
        max_num_seqs=len(lengths),
        max_num_batched_tokens=8192,
        max_mixed_prefill_tokens=2048,
        max_model_len=2048,
        block_size=16,
        num_blocks=128 * len(lengths),
    )
    runner = ModelRunner(
        cast(Backend, NullBackend()), NullModel(), num_blocks=1, max_num_seqs=len(lengths), max_model_len=2048
    )
    engine = Engine(limits, runner, vocab_size=VOCAB, steps_in_flight=depth)
    processor = OutputProcessor(None)
    for index, (num_in, num_out) in enumerate(lengths):
        prompt = [10 + index] * num_in
        params = SamplingParams(
            temperature=0,
            max_tokens=num_out,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        for child, child_params in processor.add(str(index), None, prompt, params).items():
            engine.add_request(child, prompt, child_params)
    spent, rows = 0.0, 0
    while engine.has_unfinished_requests():
        waiting = engine.scheduler.num_waiting
        start = time.process_time()
        outputs = engine.step()
        processor.settle(processor.process(outputs))
        took = time.process_time() - start
        if not waiting:
            spent += took
            rows += len(outputs)
    return {"us_per_row": spent / rows * 1e6, "rows": rows}


def main() -> None:
    """Measure pipeline depths 1 and 2 three times each and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--bar", type=float, default=5.0, help="microseconds per row that meet the bar")
    args = parser.parse_args()
    rng = random.Random(0)
    lengths = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(args.requests)]
    result: dict[str, Any] = {"requests": args.requests, "bar": args.bar}
    for depth in (1, 2):
        runs = sorted(measure(lengths, depth)["us_per_row"] for _ in range(3))
        result[f"us_per_row_depth{depth}"] = round(runs[1], 2)
        print(
            f"steps in flight {depth}: {runs[1]:.2f} us a decode row a step (min {runs[0]:.2f}, max {runs[2]:.2f})"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
