#!/usr/bin/env python3
"""Compare the torch backend with transformers' generate: same torch, same shape, alternating in one process.

Measures decode at batch 1 and 16 and prefill of 512 tokens, in tokens per second, with random bfloat16 weights. Prints
medians and their ratio; the last line is JSON. Needs transformers and, for the default shape, 8 GiB of memory.

    PYTHONPATH=. python3 scripts/bench_transformers.py [--shape llama1b] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from vllmlite import LLM, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "llama1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    },
}
ROWS = {"decode_batch_1": (1, 8, 17), "decode_batch_16": (16, 8, 17), "prefill_512": (1, 512, 1)}
"""By row: number of sequences, prompt tokens, output tokens."""
BAR = 0.9

Generate = Callable[[list[list[int]], int], object]


def rate(generate: Generate, batch: int, num_in: int, num_out: int, vocab_size: int, seed: int) -> float:
    """Return prompt tokens per second if there is one output token, else decoded tokens per second after the first."""
    rng = random.Random(seed)

    def prompts() -> list[list[int]]:
        return [[rng.randrange(100, vocab_size - 100) for _ in range(num_in)] for _ in range(batch)]

    def seconds(count: int) -> float:
        fresh = prompts()
        start = time.perf_counter()
        generate(fresh, count)
        return time.perf_counter() - start

    first = seconds(1)
    return batch * num_in / first if num_out == 1 else batch * (num_out - 1) / (seconds(num_out) - first)


def main() -> None:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama1b")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = transformers.LlamaConfig(
        **SHAPES[args.shape],
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(Path(folder))
        llm = LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, backend="torch", device="cpu", max_model_len=2048,
            enable_prefix_caching=False,
        )  # fmt: skip

    def ours(prompts: list[list[int]], count: int) -> object:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        return llm.generate(prompts, params, use_tqdm=False)

    def theirs(prompts: list[list[int]], count: int) -> object:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            return peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip

    for generate in (ours, theirs):
        generate([[5] * 8], 3)
    result: dict[str, Any] = {}
    for row, (batch, num_in, num_out) in ROWS.items():
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        for seed in range(args.rounds):
            for name, generate in (("ours", ours), ("peer", theirs)):
                rates[name].append(rate(generate, batch, num_in, num_out, config.vocab_size, seed))
        our, peers = (statistics.median(rates[name]) for name in ("ours", "peer"))
        result[row] = {
            "ours": round(our, 2),
            "peer": round(peers, 2),
            "ratio": round(our / peers, 3),
            "bar": BAR,
        }
        print(
            f"{row:16} ours {our:8.1f} tok/s   transformers {peers:8.1f} tok/s   ratio {our / peers:.2f}",
            flush=True,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
