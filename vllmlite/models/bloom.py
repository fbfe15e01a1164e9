"""BLOOM (BigScience 2022): ALiBi instead of position embeddings, and a norm after the token embeddings."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import alibi_slopes, decoder_spec, layer_norm
from vllmlite.models.keys import Fused, Keys
from vllmlite.models.spec import DecoderSpec

KEYS = Keys(
    prefix="transformer.",
    layer="h.",
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    final_norm="ln_f",
    qkv=Fused("self_attention.query_key_value", by_group=True),
    o="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)
TRAINED_POSITIONS = 2048
"""Context length of the published models, for configurations that do not state it."""


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec; the MLP is four times as wide as the hidden states."""
    config.require("apply_residual_connection_post_layernorm", False)
    if config.get("n_embed") is not None:
        config.without_effect("hidden_size")
        config = config.spelling(hidden_size="n_embed")
    config = config.spelling(
        num_hidden_layers="n_layer", num_attention_heads="n_head", max_position_embeddings="seq_length"
    )
    config = config.default(max_position_embeddings=TRAINED_POSITIONS).fixed(
        num_key_value_heads=config.get("num_attention_heads"),
        intermediate_size=4 * config.integer("hidden_size"),
    )
    base = decoder_spec(config, architecture, norm=layer_norm(config), rotated=False, tied=True)
    return replace(
        base,
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        alibi=alibi_slopes(base.num_heads),
        embedding_norm=True,
        keys=KEYS,
    )
