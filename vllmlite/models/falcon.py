"""Falcon (Almazrouei et al. 2023): attention and an ungated MLP in parallel; the newer layout (40B) with a norm for
each; Falcon RW with ALiBi and sequential layers."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import ACTIVATIONS, alibi_slopes, decoder_spec, layer_norm
from vllmlite.models.keys import Fused, Keys
from vllmlite.models.spec import DecoderSpec

KEYS = Keys(
    prefix="transformer.",
    layer="h.",
    embedding="word_embeddings",
    final_norm="ln_f",
    qkv=Fused("self_attention.query_key_value", by_group=True),
    o="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def refined_web(config: HfConfig) -> HfConfig:
    """Return a configuration of the first Falcon files (``RWForCausalLM``) with today's keys."""
    renamed = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
    values = {renamed.get(key, key): value for key, value in config.remaining().items()}
    newer = values.get("model_type") == "RefinedWeb"
    return HfConfig({"new_decoder_architecture": newer, **values}, config.where)


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec. The newer layout (40B) has several key/value heads and by default two parallel norms."""
    newer = config.boolean("new_decoder_architecture", False)
    parallel = newer or config.boolean("parallel_attn", True)
    if newer:
        config.require("parallel_attn", True)
    norms = config.integer("num_ln_in_parallel_attn", 2 if newer else 1)
    if norms > (2 if newer else 1):
        raise config.error("num_ln_in_parallel_attn", "1, or 2 with new_decoder_architecture")
    config = config.spelling(num_key_value_heads="num_kv_heads", hidden_act="activation")
    heads = config.integer("num_attention_heads")
    config = config.fixed(
        intermediate_size=config.integer("ffn_hidden_size", 4 * config.integer("hidden_size"))
    )
    if not newer:
        if config.boolean("multi_query", True):
            config.without_effect("num_key_value_heads")
            config = config.fixed(num_key_value_heads=1)
        else:
            config.require("num_kv_heads", heads)
            config = config.fixed(num_key_value_heads=heads)
    alibi, bias = config.boolean("alibi", False), config.boolean("bias", False)
    if alibi:
        config.without_effect("rope_parameters", "rope_theta")
    base = decoder_spec(
        config.default(max_position_embeddings=2048),
        architecture,
        norm=layer_norm(config),
        activations=ACTIVATIONS,
        activation="gelu",
        rotated=not alibi,
        tied=True,
    )
    # Falcon adds the biases before it scales the scores.
    slopes = tuple(slope * base.head_dim**-0.5 for slope in alibi_slopes(heads)) if alibi else ()
    return replace(
        base,
        parallel=parallel,
        mlp_norm=not parallel or norms == 2,
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        alibi=slopes,
        keys=replace(KEYS, attn_norm="ln_attn", mlp_norm="ln_mlp") if parallel and norms == 2 else KEYS,
    )
