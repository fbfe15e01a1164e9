#!/usr/bin/env python3
"""Send requests with random sampling parameters to the CUDA backend for a minute, to check that memory stays bounded.

    PYTHONPATH=. scripts/stress_cuda_sampling.py

The model has the shape of Llama 3.2 1B and random weights. 1 to 64 concurrent requests have random temperatures, top-k,
top-p, min-p, penalties, biases, allowed ids and numbers of log-probabilities. The exit status is 1 if there are more
than 40 graphs, or if the GPU's free memory falls by more than 16 MiB after the first 5 seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from vllmlite import LLM, SamplingParams
from vllmlite.runner.runner import ModelRunner

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128256, "tie_word_embeddings": True, "rope_theta": 500000.0, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
MOST_GRAPHS = 40
MOST_GROWTH = 16 << 20
WARM_UP = 5.0


def main() -> None:
    """Run the requests, print a line every 5 seconds, and check the limits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        llm = LLM(
            directory, device="cuda", backend="cuda", load_format="dummy", skip_tokenizer_init=True,
            max_num_seqs=256, max_model_len=2048, max_logprobs=20,
        )  # fmt: skip
    runner = cast(ModelRunner, llm.llm_engine.engine.runner)
    draw, began, calls, warm, least = random.Random(0), time.perf_counter(), 0, 0, 1 << 62
    most_graphs, shown = len(runner.graphs), 0.0
    while (passed := time.perf_counter() - began) < args.seconds:
        rows = draw.randint(1, 64)
        prompts: list[Any] = [
            {"prompt_token_ids": [draw.randrange(10, 128000) for _ in range(draw.randint(1, 40))]}
            for _ in range(rows)
        ]
        llm.generate(prompts, [_params(draw) for _ in range(rows)], use_tqdm=False)
        calls += 1
        free = runner.backend.memory().free
        if passed < WARM_UP:
            warm = free
        else:
            least = min(least, free)
        most_graphs = max(most_graphs, len(runner.graphs))
        if passed > shown:
            shown += WARM_UP
            print(
                f"{passed:5.1f} s: {calls} calls, {len(runner.graphs)} graphs, {free >> 20} MiB free",
                flush=True,
            )
    growth = max(0, warm - least)
    print(f"{calls} calls; at most {most_graphs} graphs; memory grew by {growth / 2**20:.1f} MiB")
    if most_graphs > MOST_GRAPHS or growth > MOST_GROWTH:
        raise SystemExit(f"more than {MOST_GRAPHS} graphs or {MOST_GROWTH >> 20} MiB")


def _params(draw: random.Random) -> SamplingParams:
    """Return random parameters for one request; each is off with probability 1/2."""

    def maybe(value: Any, off: Any) -> Any:
        return value if draw.random() < 0.5 else off

    return SamplingParams(
        temperature=maybe(draw.uniform(0.1, 2), 0.0),
        top_k=maybe(draw.randint(1, 200), 0),
        top_p=maybe(draw.uniform(0.1, 1), 1.0),
        min_p=maybe(draw.uniform(0, 0.3), 0.0),
        repetition_penalty=maybe(draw.uniform(0.8, 1.5), 1.0),
        presence_penalty=maybe(draw.uniform(-1, 1), 0.0),
        frequency_penalty=maybe(draw.uniform(-1, 1), 0.0),
        logit_bias=maybe({draw.randrange(128000): draw.uniform(-5, 5) for _ in range(5)}, None),
        allowed_token_ids=maybe([draw.randrange(128000) for _ in range(100)], None),
        logprobs=maybe(draw.randint(0, 20), None),
        seed=maybe(draw.randrange(2**32), None),
        max_tokens=draw.randint(1, 12),
        ignore_eos=True,
        detokenize=False,
    )


if __name__ == "__main__":
    main()
