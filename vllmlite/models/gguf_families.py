"""GGUF's architectures as data: the family of each, the metadata keys of its configuration values, and the names
and layout that llama.cpp's converter gives its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllmlite.models.keys import Fused, Keys

KEYS = Keys(
    prefix="",
    layer="blk.",
    embedding="token_embd",
    positions="position_embd",
    embedding_norm="token_embd_norm",
    final_norm="output_norm",
    head="output",
    attn_norm="attn_norm",
    attn_out_norm="post_attention_norm",
    mlp_norm="ffn_norm",
    mlp_out_norm="post_ffw_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    o="attn_output",
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    gate_up=("ffn_gate", "ffn_up"),
    up="ffn_up",
    down="ffn_down",
    router="ffn_gate_inp",
    stacked_experts=("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    shared_expert="",
    shared_parts=("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    shared_gate="ffn_gate_inp_shexp",
)
FUSED = replace(KEYS, qkv=Fused("attn_qkv"))
"""Names with q, k and v in one tensor. The converter stores them consecutively, even if the family interleaves
heads."""


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """How GGUF files store the models of one family."""

    architecture: str
    """The Hugging Face architecture."""
    model_type: str
    values: Mapping[str, str] = field(default_factory=dict)
    """Metadata keys by configuration key; absent metadata are left out of the configuration."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Configuration values that llama.cpp assumes for every model of the family."""
    biases: Mapping[str, str] = field(default_factory=dict)
    """Tensor names by configuration key; the value is whether the tensor exists."""
    keys: Keys = KEYS
    reordered: bool = False
    """Whether rows of q and k are reordered for a rotary embedding of neighbouring elements."""
    rotates_part: bool = False
    """Whether ``rope.dimension_count`` may be smaller than the head size."""
    alternates: bool = False
    """Whether only some layers have the window; ``attention.sliding_window_pattern`` may say which."""


_RMS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_LAYER = {
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
}
_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_WINDOW = {"sliding_window": "attention.sliding_window"}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
_LLAMA_BIASES = {**_ATTENTION_BIAS, "mlp_bias": "blk.0.ffn_gate.bias"}

FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("LlamaForCausalLM", "llama", _RMS, biases=_LLAMA_BIASES, reordered=True),
    "mistral": GgufFamily("MistralForCausalLM", "mistral", {**_RMS, **_WINDOW}, reordered=True),
    "mixtral": GgufFamily(
        "MixtralForCausalLM",
        "mixtral",
        {**_RMS, **_WINDOW, "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        reordered=True,
    ),
    "qwen2": GgufFamily("Qwen2ForCausalLM", "qwen2", _RMS),
    "qwen2moe": GgufFamily(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {**_RMS, **_EXPERTS, "shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        fixed={"norm_topk_prob": False},
        biases={"qkv_bias": "blk.0.attn_q.bias"},
    ),
    "qwen3": GgufFamily("Qwen3ForCausalLM", "qwen3", _RMS, biases=_ATTENTION_BIAS),
    "qwen3moe": GgufFamily(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {**_RMS, **_EXPERTS},
        fixed={"norm_topk_prob": True},
        biases=_ATTENTION_BIAS,
    ),
    "phi3": GgufFamily(
        "Phi3ForCausalLM",
        "phi3",
        {**_RMS, **_WINDOW, "original_max_position_embeddings": "rope.scaling.original_context_length"},
        keys=replace(FUSED, gate_up=Fused("ffn_up")),
        rotates_part=True,
    ),
    "gemma": GgufFamily("GemmaForCausalLM", "gemma", _RMS),
    "gemma2": GgufFamily("Gemma2ForCausalLM", "gemma2", {**_RMS, **_WINDOW, **_CAPS}, alternates=True),
    "gemma3": GgufFamily(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {**_RMS, **_WINDOW, **_CAPS, "rope_local_base_freq": "rope.freq_base_swa"},
        alternates=True,
    ),
    "olmo2": GgufFamily("Olmo2ForCausalLM", "olmo2", _RMS, biases=_ATTENTION_BIAS),
    "granite": GgufFamily(
        "GraniteForCausalLM",
        "granite",
        {
            **_RMS,
            "embedding_multiplier": "embedding_scale",
            "attention_multiplier": "attention.scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        biases=_LLAMA_BIASES,
        reordered=True,
    ),
    "smollm3": GgufFamily("SmolLM3ForCausalLM", "smollm3", _RMS, biases=_LLAMA_BIASES, reordered=True),
    "gpt-oss": GgufFamily(
        "GptOssForCausalLM",
        "gpt_oss",
        {
            **_RMS,
            **_WINDOW,
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "intermediate_size": "expert_feed_forward_length",
        },
        biases=_ATTENTION_BIAS,
        keys=replace(KEYS, mlp_norm="post_attention_norm", sinks="attn_sinks.weight"),
        alternates=True,
    ),
    "stablelm": GgufFamily(
        "StableLmForCausalLM",
        "stablelm",
        {**_LAYER, "use_parallel_residual": "use_parallel_residual"},
        biases={"use_qkv_bias": "blk.0.attn_q.bias"},
        rotates_part=True,
    ),
    "gpt2": GgufFamily("GPT2LMHeadModel", "gpt2", _LAYER, keys=FUSED),
    "gptneox": GgufFamily(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        {**_LAYER, "use_parallel_residual": "use_parallel_residual"},
        biases={"attention_bias": "blk.0.attn_qkv.bias"},
        keys=FUSED,
        rotates_part=True,
    ),
    "falcon": GgufFamily(
        "FalconForCausalLM",
        "falcon",
        {**_LAYER, "num_kv_heads": "attention.head_count_kv"},
        biases={"bias": "blk.0.attn_qkv.bias"},
        keys=FUSED,
    ),
    "bloom": GgufFamily("BloomForCausalLM", "bloom", _LAYER, keys=FUSED),
}
"""Families by ``general.architecture``; files of ``mistral`` and ``mixtral`` have ``llama`` there."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_sparsity_scale": (0.0,), "altup.num_inputs": (0,), "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,), "attention.group_norm_groups": (0,), "attention.indexer.head_count": (0,),
    "attention.indexer.top_k": (0,), "attention.key_length_mla": (0,), "attention.kv_lora_rank": (0,),
    "attention.max_alibi_bias": (0.0,), "attention.output_scale": (0.0, 1.0), "attention.q_lora_rank": (0,),
    "attention.relative_buckets_count": (0,), "attention.scale": (0.0,), "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,), "attention.temperature_length": (0,), "attention.temperature_scale": (0.0,),
    "attention.value_length_mla": (0,), "attn_logit_softcapping": (0.0,), "decoder_block_count": (0,),
    "embedding_length_out": (0,), "embedding_length_per_layer_input": (0,), "embedding_scale": (0.0, 1.0),
    "expert_count": (0,), "expert_gating_func": (0, 1), "expert_group_count": (0, 1), "expert_group_scale": (0.0, 1.0),
    "expert_group_used_count": (0, 1), "expert_weights_scale": (0.0, 1.0), "experts_per_group": (0,),
    "final_logit_softcapping": (0.0,), "full_attention_interval": (0,), "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,), "logit_scale": (0.0, 1.0), "moe_every_n_layers": (0, 1), "moe_latent_size": (0,),
    "n_deepstack_layers": (0,), "nextn_predict_layers": (0,), "rescale_every_n_layers": (0,),
    "residual_scale": (0.0, 1.0), "rope.scaling.alpha": (0.0, 1.0), "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,), "router_logit_softcapping": (0.0,), "swiglu_clamp_exp": (0.0,),
    "swiglu_clamp_shexp": (0.0,), "swin_norm": (False,), "token_shift_count": (0,), "use_parallel_residual": (False,),
}  # fmt: skip
"""Metadata that change the computation, with the values that do not. Other values are refused unless the family
supports them. (``expert_gating_func`` 1 is softmax.)"""

WITHOUT_EFFECT = frozenset((
    "vocab_size", "tensor_data_layout", "pooling_type", "decoder_start_token_id", "expert_shared_count",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_used_count", "rope.scaling.finetuned",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear",
    "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.freq_base",
    "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.group_norm_epsilon",
))  # fmt: skip
"""Metadata that have no effect if the family's code does not read them."""
