#!/usr/bin/env python3
"""What a dtype or a quantisation costs the built-in model: perplexity of a text that it was not trained on, and the
mean Kullback-Leibler divergence of its next-token distributions from those of the reference in float32.

    PYTHONPATH=. scripts/compare_quality.py [CONFIGURATION...] [--gguf FILE...] [--tokens 6144]

A CONFIGURATION is options of the engine, such as `quantization=int8` or `dtype=bfloat16,kv_cache_dtype=int8`; without
any, the list below is run. `max_num_batched_tokens=1` feeds a token a step, as decoding does, where products may be
computed otherwise. The text is this repository's own English: README.md, debian/README.source and the docstrings of
the package, cut into windows of 512 tokens, each fed from its beginning; every token but a window's first is predicted
from those before it, and all of the vocabulary's log-probabilities are compared. A GGUF file of the same model is
dequantised (python3-gguf, python3-safetensors) and run by the reference in float32: what its weights cost, without what
llama.cpp adds by rounding activations to 8 bits. The last line is JSON: {configuration: {"perplexity": ..., "kl": mean
nats, "kl_99": the 99th percentile, "same_top": part of positions whose most likely token is the reference's}}.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite import LLM, SamplingParams
from vllmlite.errors import VllmliteError
from vllmlite.hub import BUILT_IN

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
    "dtype=bfloat16,kv_cache_dtype=int8",
]

LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
"""GGUF's names of tensors, and the checkpoint's."""


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configurations", nargs="*", metavar="CONFIGURATION", default=CONFIGURATIONS)
    parser.add_argument(
        "--gguf", nargs="+", default=[], metavar="FILE", help="GGUF files of the built-in model"
    )
    parser.add_argument("--tokens", type=int, default=6144, help="most tokens of the text")
    args = parser.parse_args()
    text = "\n\n".join(_prose())
    reference = LLM(**REFERENCE, **_limits({}))
    ids = reference.get_tokenizer().encode(text)[: args.tokens]
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - 1, WINDOW)]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
    print(f"{len(ids)} tokens in {len(windows)} windows, sha256 {digest}")
    expected = [_log_probabilities(reference, window) for window in windows]
    result: dict[str, Any] = {"reference": _compared(expected, expected, windows)}

    def compare(name: str, options: dict[str, Any]) -> None:
        try:
            llm = LLM(**options, **_limits(options))
        except VllmliteError as error:
            print(f"{name}: {error}")
            result[name] = None
            return
        result[name] = _compared(expected, [_log_probabilities(llm, window) for window in windows], windows)
        print(f"{name:45} {json.dumps(result[name])}", flush=True)

    for configuration in args.configurations:
        compare(configuration, {"backend": "cpu", **_options(configuration)})
    for file in args.gguf:
        with tempfile.TemporaryDirectory() as directory:
            _dequantise(Path(file), Path(directory))
            compare(Path(file).name, {"model": directory, **REFERENCE})
    print(json.dumps({"tokens": len(ids), "sha256": digest, **result}))


def _limits(options: dict[str, Any]) -> dict[str, Any]:
    """What every engine here has: room for one window, and all log-probabilities."""
    room = {"max_model_len": WINDOW + 1, "max_num_batched_tokens": WINDOW, "kv_cache_memory_bytes": 64 << 20}
    every = {"max_logprobs": -1, "enable_prefix_caching": False}
    return {name: value for name, value in {**room, **every}.items() if name not in options}


def _options(configuration: str) -> dict[str, Any]:
    """``name=value,...`` as keywords; a whole number is one."""
    pairs = (option.split("=", 1) for option in configuration.split(","))
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def _prose() -> Iterator[str]:
    """The text: paragraphs of English about this program, which no model has been trained on here."""
    for name in ("README.md", "debian/README.source"):
        yield (ROOT / name).read_text(encoding="utf-8")
    for file in sorted((ROOT / "vllmlite").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                text := ast.get_docstring(node)
            ):
                yield text


def _log_probabilities(llm: LLM, ids: list[int]) -> NDArray[np.float32]:
    """``[len(ids) - 1, vocabulary]``: of what follows each token, by the engine below the text side."""
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
    """Perplexity of the windows by ``found``, and how far it is from ``expected``."""
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


def _dequantise(file: Path, directory: Path) -> None:
    """A checkpoint of float32 weights out of a GGUF file of the built-in model."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    config = json.loads((BUILT_IN / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in GGUFReader(file).tensors:
        weights = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        *layer, name, kind = tensor.name.split(".")
        if not layer:
            tensors[f"{OUTSIDE[name]}.{kind}"] = weights
            continue
        if name in heads:  # GGUF rotates neighbours: undo the order of rows that this needs
            shape = heads[name], weights.shape[0] // heads[name] // 2, 2, weights.shape[1]
            weights = weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)
        tensors[f"model.layers.{layer[-1]}.{LAYERS[name]}.{kind}"] = np.ascontiguousarray(weights)
    save_file(tensors, directory / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILT_IN / name, directory)


if __name__ == "__main__":
    main()
