"""The experts of Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import expert_count
from vllmlite.models.spec import DecoderSpec, MoeSpec


def with_experts(
    base: DecoderSpec, config: HfConfig, shared_intermediate_size: int, num_experts: int, top_k: int
) -> DecoderSpec:
    """Return ``base`` with experts in every ``decoder_sparse_step``-th layer that is not in ``mlp_only_layers``.

    ``num_experts`` and ``top_k`` are the family's defaults."""
    if config.get("num_local_experts") is not None:
        config = config.spelling(num_experts="num_local_experts")
    experts = expert_count(config, "num_experts", num_experts, minimum=0)
    plain = config.get("mlp_only_layers") or []
    if not isinstance(plain, list) or any(type(layer) is not int for layer in plain):
        raise config.error("mlp_only_layers", "a list of layer numbers")
    if not experts:
        config.without_effect("decoder_sparse_step", "num_experts_per_tok", "moe_intermediate_size")
        config.without_effect("norm_topk_prob")
        return base
    step = config.integer("decoder_sparse_step", 1)
    moe = MoeSpec(
        num_experts=experts,
        top_k=config.integer("num_experts_per_tok", top_k, maximum=experts),
        intermediate_size=config.integer("moe_intermediate_size"),
        renormalise=config.boolean("norm_topk_prob", False),
        shared_intermediate_size=shared_intermediate_size,
    )
    return replace(
        base,
        layers=tuple(
            layer if index in plain or (index + 1) % step else replace(layer, moe=moe)
            for index, layer in enumerate(base.layers)
        ),
    )
