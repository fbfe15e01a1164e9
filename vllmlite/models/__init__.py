"""Models: load a checkpoint directory or GGUF file as a model that runs on a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllmlite.backends.base import Backend
from vllmlite.backends.kv_cache import KV_DTYPES, KVSpec
from vllmlite.config.engine_config import AT_LOAD
from vllmlite.errors import BackendError, ModelError, ParameterError
from vllmlite.models.cache_scales import layer_scales
from vllmlite.models.decoder import Decoder
from vllmlite.models.families import read_spec
from vllmlite.models.gguf import open_gguf
from vllmlite.models.interface import Model
from vllmlite.models.keys import MTP_TENSORS
from vllmlite.models.plan import Plan, plan_model
from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources, stored_schemes, stored_shapes
from vllmlite.weights.checkpoint import Weights, open_weights
from vllmlite.weights.packing import LOAD_SCHEMES, Packing
from vllmlite.weights.parts import HEAD, TABLE, ModelWeights, Source

__all__ = ["load_model", "load_planned", "open_model", "open_stored", "plan_model", "read_spec"]


def open_model(
    path: Path, spec: DecoderSpec, packing: Packing, load_format: str = "auto", seed: int = 0
) -> ModelWeights:
    """Open the weights of ``spec`` as :func:`open_stored` does, in the form that ``packing`` gives them."""
    return ModelWeights(*open_stored(path, spec, load_format, seed), packing)


def open_stored(
    path: Path, spec: DecoderSpec, load_format: str = "auto", seed: int = 0
) -> tuple[Mapping[str, Source], Weights]:
    """Open the weights of ``spec`` in the directory or GGUF file ``path``, after checking that exactly these tensors
    are stored. Returns where each tensor of the model is stored, and the stored tensors.

    If the output layer is tied to the embedding but stored with other values, the stored values are used, as in
    transformers. Raises ModelError or ParameterError as :func:`open_weights` does."""
    if path.is_file() and load_format in ("auto", "gguf"):
        return sources(spec), open_gguf(path, spec)
    tensors, keys = sources(spec), spec.keys
    head, schemes = f"{keys.head}.weight", stored_schemes(spec)
    stored = open_weights(
        path,
        stored_shapes(spec),
        load_format,
        seed,
        schemes,
        prefix=keys.prefix,
        renames=keys.renames,
        unread="|".join(filter(None, (keys.unread, MTP_TENSORS))),
        tied=(head, f"{keys.prefix}{keys.embedding}.weight"),
    )
    lost = [] if load_format == "dummy" else sorted(schemes.keys() - stored.schemes.keys())
    if keys.transposed and lost:
        # A square weight does not show whether it is stored transposed.
        expected = schemes[lost[0]].name
        raise ModelError(
            f"{path}: tensor {lost[0]!r}: is stored as floats; expected {expected} according to the configuration"
        )
    if head in stored.shapes and spec.stage.is_last:
        tensors[HEAD] = replace(tensors[HEAD if HEAD in tensors else TABLE], key=head, product=True)
    return tensors, stored


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
    packing: Packing | None = None,
    num_positions: int | None = None,
) -> Decoder:
    """Load the model of directory or GGUF file ``path`` on ``backend``.

    ``max_model_len`` is the longest sequence; positions below ``num_positions`` (default: all) can be computed.
    ``kv_cache_dtype`` is ``auto`` (what the checkpoint is made for, by default the backend's dtype) or one of
    ``KV_DTYPES``; ``load_format`` is one of
    ``LOAD_FORMATS``, where ``dummy`` needs only the configuration and draws random weights from ``seed``. ``spec`` is
    the result of :func:`read_spec`, if known; ``packing`` (default: ``Packing(backend)``) decides the form of the
    weights. Raises ModelError, ParameterError or BackendError."""
    spec = spec or read_spec(path)
    cache = kv_spec(spec, backend, block_size, kv_cache_dtype)
    num_positions = max_model_len if num_positions is None else num_positions
    packing = packing or Packing(backend)
    weights = open_model(path, spec, packing, load_format, seed)
    if cache.format is not None and not cache.format.head_scales:
        cache = replace(
            cache, scales=layer_scales(weights.stored.cache_scales, spec.stage.first, spec.num_layers)
        )
    needed, free = weights.num_bytes(), backend.memory().free
    if needed > free:
        raise BackendError(
            f"{path}: its weights take {needed} bytes in {packing.quantization or backend.dtype}; {free} are free"
            + (_fitting_quantizations(weights, free) if spec.quantization is None else "")
        )
    position = sum(4 * rope.rotary_dim for rope in {layer.rope for layer in spec.layers} if rope is not None)
    if position * num_positions > free:
        raise ParameterError(
            "max_model_len",
            max_model_len,
            f"the rotary tables take {position * num_positions} bytes; {free} are free: lower it to {free // position}",
        )
    return Decoder(
        spec,
        backend,
        weights,
        max_model_len=max_model_len,
        num_positions=num_positions,
        kv_spec=cache,
    )


def kv_spec(spec: DecoderSpec, backend: Backend, block_size: int, kv_cache_dtype: str) -> KVSpec:
    """Return the key/value cache's spec for a model, without scales; ``kv_cache_dtype`` is as in :func:`load_model`.

    Raises ParameterError for an unknown ``kv_cache_dtype``."""
    if kv_cache_dtype not in ("auto", *KV_DTYPES):
        raise ParameterError("kv_cache_dtype", kv_cache_dtype, ", ".join(("auto", *KV_DTYPES)))
    dtype = kv_cache_dtype
    if dtype == "auto":
        dtype = (spec.quantization and spec.quantization.kv_cache_dtype) or backend.dtype
    return KVSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, block_size, dtype)


def load_planned(
    plan: Plan,
    backend: Backend,
    *,
    max_model_len: int,
    packing: Packing,
    num_positions: int | None = None,
    **options: Any,
) -> Model:
    """Load the model of ``plan`` with the implementation that it names.

    The other arguments are those of :func:`load_model`."""
    if plan.implementation == "native":
        return load_model(
            backend,
            plan.path,
            max_model_len=max_model_len,
            spec=plan.spec,
            packing=packing,
            num_positions=num_positions,
            **options,
        )
    if packing.quantization is not None:
        raise BackendError(
            f"quantization {packing.quantization}: transformers' models run with float weights only"
        )
    from vllmlite.models.hf_model import load_hf_model

    del options["seed"]
    return load_hf_model(backend, plan.path, max_positions=plan.max_position_embeddings, **options)


def _fitting_quantizations(weights: ModelWeights, free: int) -> str:
    """Return the end of an error message: the quantisations with which ``weights`` fit into ``free`` bytes."""
    backend = weights.packing.backend
    sizes = {
        name: replace(weights, packing=Packing(backend, name)).num_bytes()
        for name in AT_LOAD
        if LOAD_SCHEMES[name].name in backend.schemes
    }
    fitting = [f"--quantization {name} takes {size}" for name, size in sizes.items() if size <= free]
    return ": " + ", ".join(fitting) if fitting else ", and too few for any quantisation"
