#!/usr/bin/env python3
"""Measure the loss of quality by a dtype or quantisation for the built-in model: perplexity of two texts that it was
not trained on, and mean Kullback-Leibler divergence of its next-token distributions from the float32 reference.

    PYTHONPATH=. scripts/compare_quality.py [CONFIGURATION...] [--gguf FILE...]

A CONFIGURATION is a list of engine options such as `quantization=int8` or `dtype=bfloat16,kv_cache_dtype=int8`; by
default, the list below is run. `max_num_batched_tokens=1` feeds one token per step, as decoding does, which may use
other kernels. `format=awq,method=awq,group_size=32` are options of `quantize`: the checkpoint that it writes is
dequantised and run by the float32 reference, as GGUF files are, which shows the loss by the weights alone. To compare
with Q4_K of llama.cpp, which has 4.5 bits as groups of 32 do:

    python3 -m vllmlite quantize --format gguf-q8_0 --output q8_0.gguf
    llama-quantize --allow-requantize --pure --token-embedding-type q8_0 q8_0.gguf q4_k.gguf Q4_K_S
    PYTHONPATH=. scripts/compare_quality.py format=gptq,method=gptq,group_size=32 --gguf q4_k.gguf

The texts: `licence` is this repository's LICENSE (the training corpus excludes licences), English far from what the
model knows; `own` is written by the reference at temperature 1 after the beginnings below, so that float32 must be best
and any loss shows. Both are cut into windows of 512 tokens. Every token of a window but the first is predicted from
those before it, and the log-probabilities of the whole vocabulary are compared.

The last line is JSON: {configuration: {text: {"perplexity": ..., "kl": mean nats, "kl_99": their 99th percentile,
"same_top": fraction of positions with the reference's most likely token}}}; null for a refused configuration.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite import LLM, SamplingParams
from vllmlite.errors import VllmliteError
from vllmlite.hub import BUILT_IN
from vllmlite.quantize import quantize_checkpoint

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 512
REFERENCE = {"backend": "torch", "device": "cpu", "dtype": "float32"}
CONFIGURATIONS = [
    "dtype=float32",
    "dtype=bfloat16",
    "quantization=int8",
    "quantization=int8,max_num_batched_tokens=1",
    "quantization=int4",
    "quantization=int4,max_num_batched_tokens=1",
    "kv_cache_dtype=int8",
    "kv_cache_dtype=fp8_e4m3",
    "kv_cache_dtype=fp8_e5m2",
    "kv_cache_dtype=fp8_per_token_head",
    "dtype=bfloat16,kv_cache_dtype=int8",
]

BEGINNINGS = [
    "The Debian Project is",
    "A package manager",
    "This program reads",
    "To install it,",
    "The default value of this option",
    "Copyright and authors:",
]


def main() -> None:
    """Compare the configurations and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configurations", nargs="*", metavar="CONFIGURATION", default=CONFIGURATIONS)
    parser.add_argument(
        "--gguf", nargs="+", default=[], metavar="FILE", help="GGUF files of the built-in model"
    )
    args = parser.parse_args()
    reference = LLM(**REFERENCE, **_limits({}))
    texts = {"licence": _licence(reference), "own": _own(reference)}
    result: dict[str, Any] = {}
    for name, windows in texts.items():
        digest = hashlib.sha256(json.dumps(windows).encode()).hexdigest()[:16]
        result[name] = {"tokens": sum(map(len, windows)), "sha256": digest}
    print(json.dumps(result))
    expected = {
        name: [_log_probabilities(reference, ids) for ids in windows] for name, windows in texts.items()
    }

    def compare(name: str, options: dict[str, Any]) -> None:
        try:
            llm = LLM(**options, **_limits(options))
        except VllmliteError as error:
            print(f"{name}: {error}")
            result[name] = None
            return
        result[name] = {
            text: _compared(expected[text], [_log_probabilities(llm, ids) for ids in windows], windows)
            for text, windows in texts.items()
        }
        print(f"{name}: {json.dumps(result[name])}", flush=True)

    compare("reference", REFERENCE)
    for configuration in args.configurations:
        options = _options(configuration)
        if "format" not in options:
            compare(configuration, {"backend": "cpu", **options})
            continue
        with tempfile.TemporaryDirectory() as directory:
            made = Path(directory, "x.gguf" if str(options["format"]).startswith("gguf") else "x")
            quantize_checkpoint(BUILT_IN, made, **options)
            compare(configuration, {"model": str(made), **REFERENCE})
    for file in args.gguf:
        compare(Path(file).name, {"model": file, **REFERENCE})
    print(json.dumps(result))


def _limits(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of every engine here: space for one window, and all log-probabilities."""
    room = {"max_model_len": WINDOW + 1, "max_num_batched_tokens": WINDOW, "kv_cache_memory_bytes": 64 << 20}
    every = {"max_logprobs": -1, "enable_prefix_caching": False}
    return {name: value for name, value in {**room, **every}.items() if name not in options}


def _options(configuration: str) -> dict[str, Any]:
    """Parse ``name=value,...`` into keyword arguments; integers become int."""
    pairs = (option.split("=", 1) for option in configuration.split(","))
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def _licence(llm: LLM) -> list[list[int]]:
    """Return the windows of LICENSE."""
    ids = llm.get_tokenizer().encode((ROOT / "LICENSE").read_text(encoding="utf-8"))
    return [ids[at : at + WINDOW] for at in range(0, len(ids) - 1, WINDOW)]


def _own(llm: LLM) -> list[list[int]]:
    """Return a window for each beginning, written by the model."""
    prompts = [llm.get_tokenizer().encode(text) for text in BEGINNINGS]
    params = [
        SamplingParams(temperature=1, max_tokens=WINDOW - len(ids), ignore_eos=True, seed=seed)
        for seed, ids in enumerate(prompts)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [ids + output.outputs[0].token_ids for ids, output in zip(prompts, outputs, strict=True)]


def _log_probabilities(llm: LLM, ids: list[int]) -> NDArray[np.float32]:
    """Return log-probabilities ``[len(ids) - 1, vocabulary]`` of the token after each token, from the engine core."""
    engine = llm.llm_engine.engine
    engine.add_request("0", ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1))
    found = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.error is not None:
                raise RuntimeError(output.error)
            found = output.prompt_logprobs or found
    assert found is not None
    values = np.array([position.top for position in found], np.float32)
    order = np.array([position.top_ids for position in found], np.int64)
    table = np.empty_like(values)
    np.put_along_axis(table, order, values, axis=1)
    return table


def _compared(
    expected: list[NDArray[np.float32]], found: list[NDArray[np.float32]], windows: list[list[int]]
) -> dict[str, float]:
    """Return the perplexity of the windows by ``found``, and its divergence from ``expected``."""
    losses, divergences, same = [], [], []
    for p, q, ids in zip(expected, found, windows, strict=True):
        losses.append(-np.take_along_axis(q, np.array(ids[1:])[:, None], axis=1)[:, 0])
        divergences.append((np.exp(p.astype(np.float64)) * (p.astype(np.float64) - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    kl = np.concatenate(divergences)
    return {
        "perplexity": round(math.exp(np.concatenate(losses).mean()), 4),
        "kl": float(f"{kl.mean():.3g}"),
        "kl_99": float(f"{np.quantile(kl, 0.99):.3g}"),
        "same_top": round(float(np.concatenate(same).mean()), 4),
    }


if __name__ == "__main__":
    main()
