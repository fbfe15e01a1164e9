#!/usr/bin/env python3
"""Compare a step of 8 beams with a decode step of 8 rows: CPU time on one thread, measured by turns.

PYTHONPATH=. scripts/bench_beams.py MODEL
"""

from __future__ import annotations

import argparse
import statistics
import time

from vllmlite import LLM, SamplingParams
from vllmlite.beam_params import BeamOptions
from vllmlite.llm_engine import LLMEngine


def step_seconds(engine: LLMEngine, steps: int) -> list[float]:
    """Run all requests to the end; return the CPU time of ``steps`` steps that compute one token a row."""
    times: list[float] = []
    while engine.has_unfinished_requests():
        begin = time.process_time()
        engine.step()
        times.append(time.process_time() - begin)
    return times[-steps - 1 : -1]


def main() -> None:
    """Print the medians and least times of a step of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="checkpoint (default: the built-in model)")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows, steps = args.rows, args.steps
    length = args.prompt_tokens + steps + 8
    llm = LLM(
        args.model, load_format=args.load_format, max_model_len=length, max_num_seqs=rows, threads=1,
        enable_prefix_caching=False, skip_tokenizer_init=True,
    )  # fmt: skip
    engine = llm.llm_engine
    prompt = [5 + index % 200 for index in range(args.prompt_tokens)]
    common = {"max_tokens": steps + 4, "temperature": 0, "ignore_eos": True, "detokenize": False}
    decode = SamplingParams(**common)
    beams = SamplingParams(**common, n=rows, beams=BeamOptions(rows))
    found: dict[str, list[float]] = {"decode": [], "beams": []}
    for number in range(args.rounds + 1):
        for row in range(rows):
            engine.add_request(f"{number}-{row}", prompt, decode)
        decoded = step_seconds(engine, steps)
        engine.add_request(f"{number}-beams", prompt, beams)
        searched = step_seconds(engine, steps)
        if number:  # the first round warms up
            found["decode"].append(statistics.median(decoded))
            found["beams"].append(statistics.median(searched))
            print(f"round {number}: {found['beams'][-1] / found['decode'][-1]:.3f}", flush=True)
    for name, medians in found.items():
        print(f"{name:6} {1e3 * statistics.median(medians):7.2f} ms a step (least {1e3 * min(medians):.2f})")
    ratio = statistics.median(found["beams"]) / statistics.median(found["decode"])
    print(f"beams / decode: {ratio:.3f} (of the least: {min(found['beams']) / min(found['decode']):.3f})")


if __name__ == "__main__":
    main()
