"""The metadata, tensor names and extra tensors with which a GGUF file describes a model: the inverse of
:mod:`vllmlite.models.gguf`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllmlite.errors import ModelError
from vllmlite.models.families import read_spec
from vllmlite.models.gguf import LONG_FACTORS, ROPE_FACTORS, SECOND_NORM, SHORT_FACTORS
from vllmlite.models.gguf_families import FAMILIES, KEYS, GgufFamily
from vllmlite.models.keys import Keys
from vllmlite.models.multimodal import family_of
from vllmlite.models.rope import inverse_frequencies
from vllmlite.models.spec import DecoderSpec, RopeSpec
from vllmlite.weights.host import Floats

_LLAMA_NAMES = ("mistral", "mixtral")
"""Families whose files have ``llama`` as their architecture."""
_OF_SPEC = ("keys", "quantization", "architecture", "dtype")
"""Fields of a spec that say where its tensors are stored, and not what the model computes."""


def gguf_family(source: Path, spec: DecoderSpec) -> tuple[str, GgufFamily]:
    """Return the value of ``general.architecture`` for a model, and its family. Raises ModelError if GGUF files cannot
    hold such a model."""
    name = family_of(spec.architecture)
    for kind, family in FAMILIES.items():
        if family.architecture == name:
            return "llama" if kind in _LLAMA_NAMES else kind, family
    known = ", ".join(family.architecture for family in FAMILIES.values())
    raise ModelError(f"{source}: architectures={name!r} cannot be stored as GGUF; accepted: {known}")


def written_keys(family: GgufFamily, spec: DecoderSpec) -> Keys:
    """Return the names of the model's tensors in a GGUF file."""
    if family.model_type == "falcon" and spec.parallel and spec.mlp_norm:
        return replace(family.keys, attn_norm=SECOND_NORM, mlp_norm=KEYS.attn_norm)
    return family.keys


def gguf_metadata(architecture: str, family: GgufFamily, spec: DecoderSpec) -> dict[str, Any]:
    """Return the metadata that describe ``spec``."""
    epsilon = "layer_norm_rms_epsilon" if spec.norm.kind == "rms" else "layer_norm_epsilon"
    found: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        f"attention.{epsilon}": spec.norm.eps,
    }
    rope = _rope(spec, windows=False)
    if rope is not None:
        found |= _rope_metadata(rope)
    local = _rope(spec, windows=True)
    if local is not None and local != rope:
        found["rope.freq_base_swa"] = local.theta
    windows = {layer.window for layer in spec.layers} - {None}
    if windows:
        found["attention.sliding_window"] = max(filter(None, windows))
    if "use_parallel_residual" in family.values:
        found["use_parallel_residual"] = spec.parallel
    if family.model_type == "granite":
        found |= {
            "attention.scale": spec.attention_scale,
            "embedding_scale": spec.embedding_scale,
            "residual_scale": spec.residual_scale,
            "logit_scale": 1 / spec.logit_scale,
        }
    caps = {"attn_logit_softcapping": spec.attention_soft_cap, "final_logit_softcapping": spec.logit_soft_cap}
    found |= {key: cap for key, cap in caps.items() if cap is not None}
    for moe in {layer.moe for layer in spec.layers} - {None}:
        assert moe is not None
        found |= {"expert_count": moe.num_experts, "expert_used_count": moe.top_k}
        if "moe_intermediate_size" in family.values:
            found["expert_feed_forward_length"] = moe.intermediate_size
        if moe.shared_intermediate_size:
            found["expert_shared_feed_forward_length"] = moe.shared_intermediate_size
    return {f"{architecture}.{key}": value for key, value in found.items()}


def extra_tensors(spec: DecoderSpec) -> dict[str, Floats]:
    """Return the divisors of the rotary frequencies that a GGUF file stores as tensors, by name."""
    rope = _rope(spec, windows=False)
    if rope is None:
        return {}
    if rope.kind == "llama3":
        plain = inverse_frequencies(replace(rope, kind="default"), spec.max_position_embeddings)
        return {ROPE_FACTORS: (plain / inverse_frequencies(rope, 0)).astype(np.float32)}
    factors = {LONG_FACTORS: rope.long_factors, SHORT_FACTORS: rope.short_factors}
    return {name: np.array(values, np.float32) for name, values in factors.items() if values}


def check_description(source: Path, spec: DecoderSpec, written: Path) -> None:
    """Raise ModelError if the file ``written`` does not describe ``spec``, the model of ``source``, completely."""
    try:
        found = read_spec(written)
    except ModelError as error:
        reason = str(error).removeprefix(f"{written}: ")
        raise ModelError(f"{source}: the model cannot be described as GGUF: {reason}") from error
    differing = next(_differences("", spec, found), None)
    if differing is not None:
        raise ModelError(f"{source}: the model cannot be described as GGUF: {differing}")


def _rope(spec: DecoderSpec, *, windows: bool) -> RopeSpec | None:
    """Return the rotary embedding of the layers with a window, or of those without one (``windows``); that of all
    layers if there are no such layers."""
    rotated = [layer for layer in spec.layers if layer.rope is not None]
    chosen = [layer for layer in rotated if (layer.window is not None) == windows] or rotated
    return chosen[0].rope if chosen else None


def _rope_metadata(rope: RopeSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"rope.freq_base": rope.theta, "rope.dimension_count": rope.rotary_dim}
    if rope.kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    if rope.kind in ("yarn", "longrope"):
        found["rope.scaling.original_context_length"] = rope.original_max_position
    if rope.kind == "yarn":
        found |= {
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
    if rope.kind == "longrope":
        found["rope.scaling.attn_factor"] = rope.attention_factor
    return found


def _differences(name: str, expected: Any, found: Any) -> Iterator[str]:
    """Yield a line for each value that differs by more than the rounding to float32."""
    if is_dataclass(expected) and type(expected) is type(found):
        for field in fields(expected):
            if field.name not in _OF_SPEC:
                inner = f"{name}.{field.name}".removeprefix(".")
                yield from _differences(inner, getattr(expected, field.name), getattr(found, field.name))
    elif isinstance(expected, tuple) and isinstance(found, tuple) and len(expected) == len(found):
        for index, pair in enumerate(zip(expected, found, strict=True)):
            yield from _differences(f"{name}[{index}]", *pair)
    elif isinstance(expected, float) and isinstance(found, float):
        if abs(expected - found) > 1e-5 * abs(expected):
            yield f"{name}={expected}; it would be read as {found}"
    elif expected != found:
        yield f"{name}={expected}; it would be read as {found}"
