"""Benchmark an engine with vLLM's interface, vllmlite or vLLM; run by the Python that has it installed.

    python engine.py MODULE OPTIONS      MODULE: vllmlite or vllm; OPTIONS: keywords of its LLM, as a JSON object

It prints ``{}`` when the engine is ready, then answers each line ``{"work": NAME, ...}`` of standard input with a line
``{"value": X}``. Both engines do the same work, timed by the same code, so this file imports nothing else of either.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

IDS = range(100, 6000)
"""Token ids to draw prompts from, which every vocabulary has."""


class Work:
    """The benchmarks; each returns one figure."""

    def __init__(self, module: Any, engine: Any) -> None:
        self._params: Callable[..., Any] = module.SamplingParams
        self._engine = engine
        self._count = 0

    def decode(
        self, batch: int, context: int, steps: int = 24, seed: int | None = None, detokenize: bool = False
    ) -> float:
        """Return tokens per second of ``batch`` sequences after ``context`` tokens, by the median of pure decode steps.

        ``seed`` makes the prompts the same each time, so that they hit the prefix cache."""
        rng = random.Random(seed)
        for _ in range(batch):
            self._add(rng, context, steps + 2, detokenize)
        full: list[float] = []
        before: float | None = None
        while self._engine.has_unfinished_requests():
            all_decode = len(self._engine.step()) == batch
            now = time.perf_counter()
            if all_decode and before is not None:
                full.append(now - before)
            before = now if all_decode else None
        return batch / statistics.median(full)

    def attention(self, context: int) -> float:
        """Return the reciprocal of the additional seconds that a decode step takes for ``context`` tokens."""
        longer = 1 / self.decode(1, context, seed=1) - 1 / self.decode(1, 16, seed=1)
        return 1 / longer

    def prefill(self, length: int) -> float:
        """Return prompt tokens per second until the first output token."""
        self._add(random.Random(), length, 1)
        start = time.perf_counter()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return length / (time.perf_counter() - start)

    def mixed(self, requests: int, shortest: int, longest: int) -> float:
        """Return output tokens per second of simultaneous ``requests`` with lengths uniform in the range, in and
        out."""
        rng = random.Random(0)
        total = 0
        start = time.perf_counter()
        for _ in range(requests):
            num_in, num_out = rng.randint(shortest, longest), rng.randint(shortest, longest)
            self._add(random.Random(), num_in, num_out)
            total += num_out
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return total / (time.perf_counter() - start)

    def _add(self, rng: random.Random, num_in: int, num_out: int, detokenize: bool = False) -> None:
        params = self._params(temperature=0, max_tokens=num_out, ignore_eos=True, detokenize=detokenize)
        ids = [rng.choice(IDS) for _ in range(num_in)]
        self._engine.add_request(str(self._count), {"prompt_token_ids": ids}, params)
        self._count += 1


def main() -> None:
    """Start the engine and answer requests."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print to standard output
    module = importlib.import_module(sys.argv[1])
    work = Work(module, module.LLM(**json.loads(sys.argv[2])).llm_engine)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"value": getattr(work, asked.pop("work"))(**asked)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
