#!/usr/bin/env python3
"""Measure the cost of guided decoding: steps of a batch with a JSON schema against steps without.

    PYTHONPATH=. scripts/bench_guided.py [--model DIR] [--batch N] [--output-len N] [--repeat N]

Both run alternately with the same number of tokens and seeds; the means of the middle four fifths of the steps are
compared. The last line is JSON; ``cost`` is the fraction of a step added by the grammar.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from vllmlite import LLM, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 20},
            "kind": {"enum": ["file", "directory", "link"]},
            "size": {"type": "integer", "minimum": 0},
            "owner": {"anyOf": [{"type": "string", "pattern": "^[a-z]{1,8}$"}, {"type": "null"}]},
        },
        "required": ["name", "kind", "size", "owner"],
    },
}
"""Longer than any output, so that no sequence ends early."""


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    llm = LLM(args.model, max_model_len=1024, max_num_seqs=args.batch)
    structures = {"free": None, "guided": StructuredOutputsParams(json=SCHEMA)}
    steps: dict[str, list[float]] = {name: [] for name in structures}
    for index in range(args.repeat + 1):
        for name, structure in structures.items():
            params = [
                SamplingParams(
                    temperature=1.0,
                    seed=seed,
                    max_tokens=args.output_len,
                    ignore_eos=structure is None,
                    structured_outputs=structure,
                )
                for seed in range(args.batch)
            ]
            taken = decode_steps(llm, params)
            if len(taken) != args.output_len - 1:
                raise SystemExit(f"{name}: an output ended early")
            if index:  # the first round compiles the grammar and fills caches
                steps[name] += taken
    result: dict[str, float] = {"batch": args.batch, "output_len": args.output_len}
    for name, taken in steps.items():
        result[f"{name}_ms_per_step"] = round(middle(taken) * 1e3, 3)
    result["cost"] = round(middle(steps["guided"]) / middle(steps["free"]) - 1, 4)
    print(json.dumps(result))


def decode_steps(llm: LLM, params: list[SamplingParams]) -> list[float]:
    """Return the seconds of each step in which every sequence of the batch decodes."""
    engine = llm.llm_engine
    for index, each in enumerate(params):
        engine.add_request(str(index), "A list of files:", each)
    engine.step()
    taken = []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - begin)
    return taken


def middle(values: list[float]) -> float:
    """Return the mean without the fastest and the slowest tenth, which other programs disturb."""
    cut = len(values) // 10
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


if __name__ == "__main__":
    main()
