"""The models: a registry of families, and the way from a directory to something that runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vllmlite.backends.base import ITEM_SIZE, KV_DTYPES, QUANTIZATIONS, Backend
from vllmlite.errors import BackendError, ParameterError
from vllmlite.models import llama, mistral, qwen2, qwen3
from vllmlite.models.decoder import Decoder
from vllmlite.models.gguf import open_gguf
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.spec import DecoderSpec, is_product
from vllmlite.weights.checkpoint import Weights, open_weights
from vllmlite.weights.quantized import stored_bytes

ARCHITECTURES: dict[str, tuple[str, Callable[[HfConfig, str], DecoderSpec]]] = {
    "LlamaForCausalLM": ("llama", llama.spec),
    "MistralForCausalLM": ("mistral", mistral.spec),
    "Qwen2ForCausalLM": ("qwen2", qwen2.spec),
    "Qwen3ForCausalLM": ("qwen3", qwen3.spec),
}
"""What ``architectures`` of a ``config.json`` may name: its ``model_type``, and the mapping onto a spec."""


def read_spec(path: Path) -> DecoderSpec:
    """The spec of the checkpoint in directory or GGUF file ``path``, from its configuration alone. ModelError if it is
    not one that can run; needs no backend."""
    config = HfConfig.read(path)
    named = config.get("architectures")
    if not named:
        by_type = {model_type: name for name, (model_type, _) in ARCHITECTURES.items()}
        name = config.choice("model_type", by_type)
    elif isinstance(named, list) and isinstance(named[0], str) and named[0] in ARCHITECTURES:
        name = named[0]
    else:
        raise config.error("architectures", ", ".join(ARCHITECTURES))
    return ARCHITECTURES[name][1](config, name)


def load_model(
    backend: Backend,
    path: Path,
    *,
    max_model_len: int,
    block_size: int,
    kv_cache_dtype: str = "auto",
    load_format: str = "auto",
    seed: int = 0,
) -> Decoder:
    """The model of directory ``path`` on ``backend``, for sequences of up to ``max_model_len`` tokens.

    ``kv_cache_dtype``: ``auto`` (the backend's) or one of ``KV_DTYPES``. ``load_format``: one of
    ``LOAD_FORMATS``: ``auto`` takes what is there; ``dummy`` needs only the configuration, and draws weights from
    ``seed``. ModelError, ParameterError or BackendError say what is wrong."""
    if kv_cache_dtype not in ("auto", *KV_DTYPES):
        raise ParameterError("kv_cache_dtype", kv_cache_dtype, ", ".join(("auto", *KV_DTYPES)))
    spec = read_spec(path)
    shapes = spec.weights()
    if spec.quantization not in (None, backend.quantization):
        raise BackendError(
            f"{path}: its weights are {spec.quantization}, the backend's {backend.quantization}"
        )
    if path.is_file() and load_format in ("auto", "gguf"):
        weights = open_gguf(path, shapes, backend.dtype, backend.quantization, backend.keeps_blocks)
    else:
        weights = open_weights(path, shapes, load_format, seed, spec.quantized_weights())
    needed, free = _bytes(weights, backend.dtype, backend.quantization), backend.memory().free
    if needed > free:
        raise BackendError(
            f"{path}: its weights take {needed} bytes in {backend.quantization or backend.dtype}; {free} are free"
            + (_what_fits(weights, free) if spec.quantization is None else "")
        )
    return Decoder(
        spec,
        backend,
        weights,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_dtype=backend.dtype if kv_cache_dtype == "auto" else kv_cache_dtype,
    )


def _what_fits(weights: Weights, free: int) -> str:
    """Which quantisations of ``weights`` take at most ``free`` bytes, in words."""
    sizes = {kind: _bytes(replace(weights, kinds={}), "bfloat16", kind) for kind in QUANTIZATIONS}
    fitting = [f"--quantization {kind} takes {size}" for kind, size in sizes.items() if size <= free]
    return ": " + ", ".join(fitting) if fitting else ", and too few for any quantisation"


def _bytes(weights: Weights, dtype: str, quantization: str | None) -> int:
    """What the weights take on a backend with dense ones in ``dtype``, and those of products in ``quantization``."""
    total = 0
    for name, shape in weights.shapes.items():
        kind = weights.kinds.get(name) or (quantization if is_product(name) else None)
        if kind is not None:
            total += stored_bytes(kind, shape)
        if kind is None or not is_product(
            name
        ):  # a table is looked up in floats, whatever a product makes of it
            total += math.prod(shape) * ITEM_SIZE[dtype]
    return total
