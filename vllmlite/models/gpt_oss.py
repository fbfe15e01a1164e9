"""gpt-oss (OpenAI 2025): attention with sinks, a window in every other layer, and experts with biases and a clamped
gated activation. Published checkpoints store the experts as MXFP4."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import decoder_spec, expert_count, layer_types
from vllmlite.models.hf_rope import rope_spec
from vllmlite.models.keys import Keys
from vllmlite.models.spec import DecoderSpec, MoeSpec

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The family's default of ``rope_parameters``."""


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return gpt-oss's spec; ``intermediate_size`` is that of an expert."""
    config.require("hidden_act", "silu")
    config.require("swiglu_alpha", 1.702)
    config.require("swiglu_limit", 7.0)
    # Published configurations repeat these two under other names.
    config.without_effect("experts_per_token", "initial_context_length")
    if config.get("rope_scaling") is None:
        config = config.default(rope_parameters=ROPE)
    layers = config.integer("num_hidden_layers")
    default = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    sliding = [kind == "sliding_attention" for kind in layer_types(config, default)]
    if window is None and any(sliding):
        raise config.error("sliding_window", "a window, as some layers have sliding_attention")
    bias = config.boolean("attention_bias", True)
    experts = expert_count(config, "num_local_experts", 128)
    base = decoder_spec(
        config,
        architecture,
        head_dim=64,
        windows=[window if slides else None for slides in sliding],
        rope=rope_spec(config, config.integer("head_dim", 64), theta=150000.0),
    )
    moe = MoeSpec(
        num_experts=experts,
        top_k=config.integer("num_experts_per_tok", 4, maximum=experts),
        intermediate_size=base.intermediate_size,
        renormalise=True,
        bias=True,
    )
    return replace(
        base,
        activation="clamped_swiglu",
        attention_sinks=True,
        qkv_bias=bias,
        o_bias=bias,
        layers=tuple(replace(layer, moe=moe) for layer in base.layers),
        keys=Keys(
            router="mlp.router",
            interleaved_experts=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            renames=(
                (r"(\.mlp\.experts\.\w+_proj)_(blocks|scales|bias)$", r"\1.\2"),
                (r"(\.mlp\.experts\.\w+_proj)$", r"\1.weight"),
            ),
        ),
    )
