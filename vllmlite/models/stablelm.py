"""StableLM 3B and StableLM 2 (Bellagente et al. 2024): Llama with layer norms, partial rotary embedding and optionally
parallel attention and MLP."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import decoder_spec, head_size, layer_norm
from vllmlite.models.hf_rope import rope_spec
from vllmlite.models.keys import Keys
from vllmlite.models.spec import DecoderSpec

KEYS = Keys(q_norm="self_attn.q_layernorm.norms", k_norm="self_attn.k_layernorm.norms")


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec. Parallel attention and MLP share a norm. The 12B model also has per-head q and k
    norms."""
    parallel = config.boolean("use_parallel_residual", False)
    base = decoder_spec(
        config,
        architecture,
        norm=layer_norm(config, "layer_norm_eps"),
        rope=rope_spec(config, head_size(config), partial=0.25),
    )
    return replace(
        base,
        parallel=parallel,
        mlp_norm=not parallel,
        qkv_bias=config.boolean("use_qkv_bias", False),
        qk_norm="layer" if config.boolean("qk_layernorm", False) else None,
        keys=KEYS,
    )
