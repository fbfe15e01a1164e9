"""SmolLM3 (Hugging Face 2025): Llama without rotary embedding in every fourth layer (Yang et al. 2025)."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import decoder_spec, head_size, layer_types
from vllmlite.models.hf_rope import rope_spec
from vllmlite.models.spec import DecoderSpec, LayerSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec. ``no_rope_layers`` is 1 for layers with rotary embedding; only the others may have
    windows."""
    count, bias = config.integer("num_hidden_layers"), config.boolean("attention_bias", False)
    every = config.integer("no_rope_layer_interval", 4)
    rotates = config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(count)]
    if not isinstance(rotates, list) or len(rotates) < count or any(flag not in (0, 1) for flag in rotates):
        raise config.error("no_rope_layers", f"a list of {count} entries 0 or 1")
    used = config.boolean("use_sliding_window", False) and config.get("sliding_window") is not None
    default = ["sliding_attention" if used and not flag else "full_attention" for flag in rotates[:count]]
    types = layer_types(config, default)
    config.without_effect("sliding_window")  # unused if no layer has a window
    window = config.integer("sliding_window") if "sliding_attention" in types else None
    rope = rope_spec(config, head_size(config), theta=2e6)
    return replace(
        decoder_spec(config, architecture, rope=rope, tied=True),
        layers=tuple(
            LayerSpec(window if kind == "sliding_attention" else None, rope if flag else None)
            for kind, flag in zip(types, rotates, strict=False)
        ),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )
