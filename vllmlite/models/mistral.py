"""Mistral (Jiang et al. 2023): Llama without biases, with a sliding window in every layer if one is set; and
Mixtral (Jiang et al. 2024): Mistral with experts."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import decoder_spec, expert_count
from vllmlite.models.keys import Keys
from vllmlite.models.spec import DecoderSpec, MoeSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return Mistral's decoder spec; a null ``sliding_window`` means full attention."""
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    return decoder_spec(config, architecture, windows=(window,) * config.integer("num_hidden_layers"))


def mixtral(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return Mixtral's decoder spec: experts in every layer, whose size is ``intermediate_size``."""
    base = spec(config, architecture)
    experts = expert_count(config, "num_local_experts", 8)
    moe = MoeSpec(
        num_experts=experts,
        top_k=config.integer("num_experts_per_tok", 2, maximum=experts),
        intermediate_size=base.intermediate_size,
        renormalise=True,
    )
    return replace(
        base,
        layers=tuple(replace(layer, moe=moe) for layer in base.layers),
        keys=Keys(
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.",
            expert_parts=("w1", "w3", "w2"),
        ),
    )
