"""StableLM 2 and StableLM 3B (Bellagente et al. 2024): Llama with layer norms, a quarter of each head rotated and, as
an option, attention and MLP side by side."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig, decoder_spec, head_size, layer_norm, rope_spec
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Side by side, both read one norm."""
    config.require("qk_layernorm", False, "layer norms of q and k, as in the 12B model, are not there yet")
    parallel = config.boolean("use_parallel_residual", False)
    base = decoder_spec(
        config,
        architecture,
        norm=layer_norm(config, "layer_norm_eps"),
        rope=rope_spec(config, head_size(config), partial=0.25),
    )
    return replace(
        base, parallel=parallel, mlp_norm=not parallel, qkv_bias=config.boolean("use_qkv_bias", False)
    )
