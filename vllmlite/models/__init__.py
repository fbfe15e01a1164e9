"""The models: a registry of families, and the way from a directory to something that runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllmlite.backends.base import ITEM_SIZE, KV_DTYPES, QUANTIZATIONS, Backend, Model
from vllmlite.errors import BackendError, ParameterError
from vllmlite.models.decoder import Decoder
from vllmlite.models.families import read_spec
from vllmlite.models.gguf import open_gguf
from vllmlite.models.plan import Plan, plan_model
from vllmlite.models.spec import DecoderSpec
from vllmlite.weights.checkpoint import open_weights
from vllmlite.weights.parts import ModelWeights
from vllmlite.weights.quantized import stored_bytes

__all__ = ["load_model", "load_planned", "open_model", "plan_model", "read_spec"]


def open_model(path: Path, spec: DecoderSpec, load_format: str = "auto", seed: int = 0) -> ModelWeights:
    """The weights of ``spec`` in directory ``path``, after checking that it holds exactly these. ModelError or
    ParameterError as :func:`open_weights` has them."""
    sources, keys = spec.tensors(), spec.keys
    stored = open_weights(
        path,
        spec.weights(),
        load_format,
        seed,
        spec.quantized_weights(),
        prefix=keys.prefix,
        computed=keys.computed,
        tied=(f"{keys.head}.weight", sources["embedding.weight"].key),
    )
    return ModelWeights(sources, stored)


def load_model(
    backend: Backend,
    path: Path,
    *,
    max_model_len: int,
    block_size: int,
    kv_cache_dtype: str = "auto",
    load_format: str = "auto",
    seed: int = 0,
    spec: DecoderSpec | None = None,
) -> Decoder:
    """The model of directory ``path`` on ``backend``, for sequences of up to ``max_model_len`` tokens.

    ``kv_cache_dtype``: ``auto`` (the backend's) or one of ``KV_DTYPES``. ``load_format``: one of
    ``LOAD_FORMATS``: ``auto`` takes what is there; ``dummy`` needs only the configuration, and draws weights from
    ``seed``. ``spec``: what :func:`read_spec` finds, where that has been called. ModelError, ParameterError or
    BackendError say what is wrong."""
    if kv_cache_dtype not in ("auto", *KV_DTYPES):
        raise ParameterError("kv_cache_dtype", kv_cache_dtype, ", ".join(("auto", *KV_DTYPES)))
    spec = spec or read_spec(path)
    if spec.quantization not in (None, backend.quantization):
        raise BackendError(
            f"{path}: its weights are {spec.quantization}, the backend's {backend.quantization}"
        )
    if path.is_file() and load_format in ("auto", "gguf"):
        stored = open_gguf(path, spec, backend)
        weights = ModelWeights(spec.tensors(), stored)
    else:
        weights = open_model(path, spec, load_format, seed)
    needed, free = _bytes(weights, backend.dtype, backend.quantization), backend.memory().free
    if needed > free:
        raise BackendError(
            f"{path}: its weights take {needed} bytes in {backend.quantization or backend.dtype}; {free} are free"
            + (_what_fits(weights, free) if spec.quantization is None else "")
        )
    position = sum(4 * rope.rotary_dim for rope in {layer.rope for layer in spec.layers} if rope is not None)
    if position * max_model_len > free:
        raise ParameterError(
            "max_model_len",
            max_model_len,
            f"its rotations take {position * max_model_len} bytes; {free} are free: lower it to {free // position}",
        )
    return Decoder(
        spec,
        backend,
        weights,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_dtype=backend.dtype if kv_cache_dtype == "auto" else kv_cache_dtype,
    )


def load_planned(plan: Plan, backend: Backend, path: Path, *, max_model_len: int, **options: Any) -> Model:
    """The model of directory ``path`` in the implementation that ``plan`` says; the other arguments are
    :func:`load_model`'s."""
    if plan.implementation == "native":
        return load_model(backend, path, max_model_len=max_model_len, spec=plan.spec, **options)
    from vllmlite.models.hf_model import load_hf_model

    del options["seed"]
    return load_hf_model(backend, path, max_positions=plan.max_position_embeddings, **options)


def _what_fits(weights: ModelWeights, free: int) -> str:
    """Which quantisations of ``weights`` take at most ``free`` bytes, in words."""
    floats = replace(weights, stored=replace(weights.stored, kinds={}))
    sizes = {kind: _bytes(floats, "bfloat16", kind) for kind in QUANTIZATIONS}
    fitting = [f"--quantization {kind} takes {size}" for kind, size in sizes.items() if size <= free]
    return ": " + ", ".join(fitting) if fitting else ", and too few for any quantisation"


def _bytes(weights: ModelWeights, dtype: str, quantization: str | None) -> int:
    """What the weights take on a backend with dense ones in ``dtype``, and those of products in ``quantization``."""
    total = 0
    for source in weights.sources.values():
        kind = weights.stored.kinds.get(source.key) or (quantization if source.product else None)
        if kind is not None:
            total += stored_bytes(kind, source.shape)
        # A table is looked up in floats, whatever a product makes of it.
        if kind is None or not source.product:
            total += math.prod(source.shape) * ITEM_SIZE[dtype]
    return total
