"""Gemma 1 to 3 (Gemma Team 2024, 2024, 2025), text only.

Embeddings are multiplied by the square root of the hidden size, and norm weights are stored minus one. Gemma 2 and 3
have norms before and after attention and MLP, and sliding windows in most layers; Gemma 2 caps scores and logits,
Gemma 3 normalises q and k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import decoder_spec, layer_types
from vllmlite.models.hf_rope import rope_spec
from vllmlite.models.keys import SANDWICH
from vllmlite.models.spec import DecoderSpec, LayerSpec, NormSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return Gemma 1's spec; its ``gelu`` is the tanh approximation, whatever the configuration says."""
    if config.get("hidden_activation") is not None:
        config.without_effect("hidden_act")
        config = config.spelling(hidden_act="hidden_activation")
    base = _spec(config, architecture)
    return replace(base, activation="gelu_tanh" if base.activation == "gelu" else base.activation)


def gemma2(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return Gemma 2's spec: every other layer has a sliding window; scores and logits are soft-capped."""
    base = _sandwich(config, architecture, attention_cap=50.0, logit_cap=30.0)
    sliding = _sliding(config, every=2)
    rope = rope_spec(config, base.head_dim)
    window = config.integer("sliding_window", 4096)
    return replace(base, layers=tuple(LayerSpec(window if slides else None, rope) for slides in sliding))


def gemma3(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return Gemma 3's spec: five of six layers have a window and their own rotary base; q and k are normalised."""
    config.require("attn_logit_softcapping", None)
    base = _sandwich(config, architecture, attention_cap=None, logit_cap=None)
    sliding = _sliding(config, every=config.integer("sliding_window_pattern", 6))
    parameters = config.section("rope_parameters") or HfConfig({}, "")
    if any(parameters.get(kind) is not None for kind in ("full_attention", "sliding_attention")):
        full = rope_spec(config, base.head_dim, theta=1e6, kind="full_attention")
        local = rope_spec(config, base.head_dim, theta=1e4, kind="sliding_attention")
    else:
        full = rope_spec(config, base.head_dim, theta=1e6)
        local = replace(
            rope_spec(HfConfig({}, ""), base.head_dim), theta=config.number("rope_local_base_freq", 1e4)
        )
    window = config.integer("sliding_window", 4096)
    layers = tuple(LayerSpec(window, local) if slides else LayerSpec(None, full) for slides in sliding)
    return replace(base, layers=layers, qk_norm="head")


def _spec(config: HfConfig, architecture: str, rotated: bool = True) -> DecoderSpec:
    bias = config.boolean("attention_bias", False)
    base = decoder_spec(
        config,
        architecture,
        head_dim=256,
        norm=NormSpec(config.number("rms_norm_eps", 1e-6), unit_offset=True),
        activation="gelu_pytorch_tanh",
        rotated=rotated,
        tied=True,
    )
    return replace(base, embedding_scale=math.sqrt(base.hidden_size), qkv_bias=bias, o_bias=bias)


def _sandwich(
    config: HfConfig, architecture: str, attention_cap: float | None, logit_cap: float | None
) -> DecoderSpec:
    config.require("use_bidirectional_attention", False)
    config = config.spelling(hidden_act="hidden_activation")
    return replace(
        _spec(config, architecture, rotated=False),
        attn_out_norm=True,
        mlp_out_norm=True,
        attention_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_soft_cap=config.optional("attn_logit_softcapping", attention_cap),
        logit_soft_cap=config.optional("final_logit_softcapping", logit_cap),
        keys=SANDWICH,
    )


def _sliding(config: HfConfig, every: int) -> Sequence[bool]:
    layers = range(1, config.integer("num_hidden_layers") + 1)
    default = ["sliding_attention" if layer % every else "full_attention" for layer in layers]
    return [kind == "sliding_attention" for kind in layer_types(config, default)]
