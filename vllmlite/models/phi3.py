"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al. 2024): Llama with fused projections, partial rotary embedding, and long
contexts through LongRoPE (Ding et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import decoder_spec, head_size
from vllmlite.models.hf_rope import rope_spec
from vllmlite.models.keys import Fused, Keys
from vllmlite.models.spec import DecoderSpec

KEYS = Keys(qkv=Fused("self_attn.qkv_proj"), gate_up=Fused("mlp.gate_up_proj"))


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec; a null ``sliding_window`` means full attention."""
    config = _with_longrope(config)
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    base = decoder_spec(
        config,
        architecture,
        windows=(window,) * config.integer("num_hidden_layers"),
        rope=rope_spec(config, head_size(config), partial=1.0),
    )
    return replace(base, keys=KEYS)


def _with_longrope(config: HfConfig) -> HfConfig:
    """Return ``config`` with the type ``longrope``, which the first Phi-3 files call ``su`` or ``yarn``."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
            renamed = {name: value for name, value in rope.items() if name != "type"}
            config = config.fixed(**{key: renamed | {"rope_type": "longrope"}})
    return config
