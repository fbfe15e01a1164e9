"""Tiny random models of the causal language models of transformers, made from their own default configurations.

Sizes are shrunk by the names of their attributes; ``EXTRA`` has what single models need besides.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_SIZES: dict[int, str] = {
    307: "vocab_size",
    64: "hidden_size d_model n_embd embedding_size",
    96: "intermediate_size ffn_dim decoder_ffn_dim",
    40: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size",
    256: "max_position_embeddings n_positions n_ctx",
    16: "head_dim v_head_dim qk_nope_head_dim kv_lora_rank",
    32: "q_lora_rank",
    8: "qk_rope_head_dim rotary_dim",
    5: "sliding_window attention_chunk_size",
    4: "num_hidden_layers num_layers n_layer n_layers decoder_layers num_attention_heads n_head n_heads "
    "decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_key_value_heads num_experts_per_tok moe_k moe_topk eos_token_id",
    1: "n_group topk_group bos_token_id",
    0: "pad_token_id",
}
EXTRA: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 307},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "llama4_text": {"num_local_experts": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "phimoe": {"sliding_window": 5},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "inkling2_text": {"unpadded_vocab_size": 307},
    "inkling2_loop_text": {"unpadded_vocab_size": 307},
}
"""Attributes of single models, by model type."""
MOST_PARAMETERS = 25_000_000


class Unshrinkable(Exception):
    """Raised with the reason why no tiny model can be made."""


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of ``model_type`` with transformers' eager attention."""
    try:
        config = _tiny_config(model_type, changes)
        with torch.device("meta"):
            outline = transformers.AutoModelForCausalLM.from_config(config)
        size = sum(parameter.numel() for parameter in outline.parameters())
        if size > MOST_PARAMETERS:
            raise Unshrinkable(f"{model_type} has {size} parameters")
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Unshrinkable:
        raise
    except Exception as error:
        raise Unshrinkable(f"{model_type}: {type(error).__name__}: {error}") from error
    one = 0.0 if "gemma" in model_type else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.normal_(one if re.search(r"norm|ln_", name) else 0.0, 0.1)
    return model.eval()


def _tiny_config(model_type: str, changes: dict[str, Any]) -> Any:
    default = CONFIG_MAPPING[model_type](**EXTRA.get(model_type, {})).get_text_config()
    sizes = {name: size for size, names in _SIZES.items() for name in names.split()}
    values = {name: size for name, size in sizes.items() if type(getattr(default, name, None)) is int}
    values |= {
        name: sizes[name] for name in ("pad_token_id", "num_key_value_heads") if hasattr(default, name)
    }
    if hasattr(default, "qk_rope_head_dim"):
        values["num_key_value_heads"] = 4
        values.pop("head_dim", None)
    return type(default)(**values | EXTRA.get(model_type, {}) | changes)
