"""OPT (Zhang et al. 2022): GPT-2 with separate projections, ReLU, and positions counted from two."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import ACTIVATIONS, decoder_spec
from vllmlite.models.keys import Keys
from vllmlite.models.spec import DecoderSpec, NormSpec

KEYS = Keys(
    prefix="model.decoder.",
    final_norm="final_layer_norm",
    attn_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    o="self_attn.out_proj",
    up="fc1",
    down="fc2",
    unread=r"(^|\.)decoder\.version$",
)
OFFSET = 2


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec. Only OPT-350m has norms after the residual, no final norm, and narrower embeddings."""
    config.require("layer_norm_elementwise_affine", True)
    width, before = config.integer("hidden_size"), config.boolean("do_layer_norm_before", True)
    embedded = config.integer("word_embed_proj_dim", width)
    config = config.spelling(intermediate_size="ffn_dim", hidden_act="activation_function").fixed(
        num_key_value_heads=config.get("num_attention_heads")
    )
    base = decoder_spec(
        config,
        architecture,
        norm=NormSpec(1e-5, "layer", bias=True),
        activations=ACTIVATIONS,
        activation="relu",
        rotated=False,
        tied=True,
    )
    bias = config.boolean("enable_bias", True)
    last = not config.boolean("_remove_final_layer_norm", False)
    return replace(
        base,
        learned_positions=base.max_position_embeddings,
        position_offset=OFFSET,
        post_norm=not before,
        final_norm=before and last,
        embedding_size=None if embedded == width else embedded,
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        keys=KEYS,
    )
