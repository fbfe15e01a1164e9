"""What is asked of an engine with vLLM's interface, this one or vLLM itself: a program for the Python that has it.

    python engine.py MODULE OPTIONS      MODULE: vllmlite or vllm; OPTIONS: keywords of its LLM, a JSON object

It answers ``{}`` when the engine is up, then each line of standard input, ``{"work": NAME, ...}``, with a line
``{"value": X}``. Both engines do the same work, timed by the same lines, so this file imports nothing of either.
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
"""What prompts are drawn from: ids that every vocabulary has."""


class Work:
    """The kinds of work; each returns one figure."""

    def __init__(self, module: Any, engine: Any) -> None:
        self._params: Callable[..., Any] = module.SamplingParams
        self._engine = engine
        self._count = 0

    def decode(
        self, batch: int, context: int, steps: int = 24, seed: int | None = None, detokenize: bool = False
    ) -> float:
        """Tokens a second of ``batch`` sequences after ``context`` tokens, by the median time of a step in which all
        decode; ``seed`` gives the same prompts each time, so that they come out of the prefix cache."""
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
        """How often a second a token could attend to ``context`` tokens: what a step takes longer for them."""
        longer = 1 / self.decode(1, context, seed=1) - 1 / self.decode(1, 16, seed=1)
        return 1 / longer

    def prefill(self, length: int) -> float:
        """Prompt tokens a second, until the first token is out."""
        self._add(random.Random(), length, 1)
        start = time.perf_counter()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return length / (time.perf_counter() - start)

    def mixed(self, requests: int, shortest: int, longest: int) -> float:
        """Output tokens a second of ``requests`` that come at once, lengths in and out uniform in that range."""
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
    """Start the engine and answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines write to standard output what they like
    module = importlib.import_module(sys.argv[1])
    work = Work(module, module.LLM(**json.loads(sys.argv[2])).llm_engine)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"value": getattr(work, asked.pop("work"))(**asked)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
