"""GPT-2 (Radford et al. 2019): learned positions, layer norms, an ungated MLP, and weights stored transposed."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import ACTIVATIONS, decoder_spec, layer_norm
from vllmlite.models.keys import Fused, Keys
from vllmlite.models.spec import DecoderSpec

KEYS = Keys(
    prefix="transformer.",
    layer="h.",
    embedding="wte",
    positions="wpe",
    final_norm="ln_f",
    attn_norm="ln_1",
    mlp_norm="ln_2",
    qkv=Fused("attn.c_attn"),
    o="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    transposed=True,
    unread=r"\.attn\.(masked_)?bias$",
)


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec; the MLP is four times as wide as the hidden states unless ``n_inner`` is given."""
    config.require("scale_attn_weights", True)
    config.require("scale_attn_by_inverse_layer_idx", False)
    config.require("add_cross_attention", False)
    config = config.spelling(
        hidden_size="n_embd",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        max_position_embeddings="n_positions",
        hidden_act="activation_function",
    )
    config = config.fixed(
        num_key_value_heads=config.get("num_attention_heads"),
        intermediate_size=config.integer("n_inner", 4 * config.integer("hidden_size")),
    )
    base = decoder_spec(
        config,
        architecture,
        norm=layer_norm(config),
        activations=ACTIVATIONS,
        activation="gelu_new",
        rotated=False,
        tied=True,
    )
    return replace(
        base,
        learned_positions=base.max_position_embeddings,
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        keys=KEYS,
    )
