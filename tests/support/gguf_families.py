"""Checkpoints of every family as llama.cpp's converter writes them: its names of tensors and metadata, and its changes
to rows."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from gguf_files import Stored, blocks, encode, reordered
from numpy.typing import NDArray

from vllmlite.backends.torch import TorchBackend
from vllmlite.models import open_model, read_spec
from vllmlite.models.spec import DecoderSpec
from vllmlite.weights.host import float_values
from vllmlite.weights.packing import Packing

TOP = {
    "embedding": "token_embd", "positions": "position_embd", "embedding_norm": "token_embd_norm",
    "final_norm": "output_norm", "head": "output",
}  # fmt: skip
LAYER = {
    "attn_norm": "attn_norm", "attn_out_norm": "post_attention_norm", "mlp_norm": "ffn_norm",
    "mlp_out_norm": "post_ffw_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "sinks": "attn_sinks", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down", "router": "ffn_gate_inp", "shared.gate": "ffn_gate_shexp", "shared.up": "ffn_up_shexp",
    "shared.down": "ffn_down_shexp", "shared_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
NEIGHBOURS = ("llama", "granite", "smollm3")
FUSED = ("gpt2", "gptneox", "falcon", "bloom", "phi3")


MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0],
        "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0, 9.0, 10.0],
    },
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 64,
}
GEMMA: dict[str, Any] = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 11}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "mistral": ("llama", "Mistral", {"sliding_window": 9}),
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen2moe": ("qwen2moe", "Qwen2Moe", MOE | {"shared_expert_intermediate_size": 96, "norm_topk_prob": False}),
    "qwen3": ("qwen3", "Qwen3", {}),
    "qwen3moe": ("qwen3moe", "Qwen3Moe", MOE | {"norm_topk_prob": True}),
    "phi3": ("phi3", "Phi3", {"sliding_window": 9}),
    "phi3-longrope": ("phi3", "Phi3", LONGROPE),
    "gemma": ("gemma", "Gemma", {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", "Gemma2", GEMMA),
    "gemma3": ("gemma3", "Gemma3", GEMMA | {"num_hidden_layers": 7}),
    "olmo2": ("olmo2", "Olmo2", {}),
    "granite": ("granite", "Granite", {"embedding_multiplier": 12.0, "attention_multiplier": 0.25,
                                       "residual_multiplier": 0.22, "logits_scaling": 8.0}),
    "smollm3": ("smollm3", "SmolLM3", {"num_hidden_layers": 5}),
    "gpt-oss": ("gpt-oss", "GptOss", {"head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "stablelm": ("stablelm", "StableLm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", "StableLm", {"use_parallel_residual": True}),
    "gpt2": ("gpt2", "GPT2", {"n_inner": None}),
    "gptneox": ("gptneox", "GPTNeoX", {}),
    "gptneox-serial": ("gptneox", "GPTNeoX", {"use_parallel_residual": False}),
    "falcon-7b": ("falcon", "Falcon", {}),
    "falcon-40b": ("falcon", "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": ("falcon", "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2,
                                        "num_ln_in_parallel_attn": 1}),
    "bloom": ("bloom", "Bloom", {}),
}  # fmt: skip
"""``general.architecture``, transformers' family, and its configuration."""


def tensors_of(source: Path, name: str, kind: str = "F32") -> dict[str, Stored]:
    """The GGUF tensors of the checkpoint in directory ``source`` as architecture ``name``, with matrices of type
    ``kind``."""
    spec = read_spec(source)
    weights = open_model(source, spec, Packing(TorchBackend()))
    found: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
    for ours in weights.sources:
        values = float_values(weights.floats(ours))
        module, part = ours.rsplit(".", 1)
        if part == "sinks":
            module, part = f"{module}.sinks", "weight"
        if module in TOP:
            stored = TOP[module]
        else:
            layer, module = module.split(".", 1)
            if name in NEIGHBOURS and module in ("q", "k"):
                values = reordered(values, spec.num_heads if module == "q" else spec.num_kv_heads)
            if name in FUSED and module in ("q", "k", "v"):
                stored = "attn_qkv"
            elif name == "phi3" and module == "gate":
                stored = "ffn_up"
            elif name == "falcon" and spec.mlp_norm and spec.parallel and module.endswith("_norm"):
                stored = {"attn_norm": "attn_norm_2", "mlp_norm": "attn_norm"}[module]
            elif name == "gpt-oss" and module == "mlp_norm":
                stored = "post_attention_norm"
            elif module.startswith("experts."):
                stored, values = f"ffn_{module.rsplit('.', 1)[1]}_exps", values[None]
            else:
                stored = LAYER[module]
            stored = f"blk.{layer}.{stored}"
        if spec.norm.unit_offset and module.endswith("norm"):
            values = values + np.float32(1)
        found[f"{stored}.{part}"].append(values[0] if module == "shared_gate" else values)
    made = {stored: np.concatenate(parts) for stored, parts in found.items()}
    return {
        stored: (
            of_kind := kind if values.ndim > 1 and not stored.endswith(".bias") else "F32",
            values.shape,
            blocks(of_kind, values),
        )
        for stored, values in made.items()
    }


def metadata_of(spec: DecoderSpec, name: str) -> dict[str, Any]:
    """The GGUF metadata that describe ``spec``."""
    layer, inner = spec.layers[0], spec.intermediate_size
    moes = [one.moe for one in spec.layers if one.moe is not None]
    ropes = [one.rope for one in spec.layers if one.rope is not None and one.window is None]
    found: dict[str, Any] = {
        "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": inner,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.layer_norm_rms_epsilon"
        if spec.norm.kind == "rms"
        else "attention.layer_norm_epsilon": spec.norm.eps,
    }
    if spec.head_dim * spec.num_heads != spec.hidden_size or name.startswith(("gemma", "qwen3")):
        found |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    if ropes:
        found |= {"rope.freq_base": ropes[0].theta, "rope.dimension_count": ropes[0].rotary_dim}
        if ropes[0].kind == "linear":
            found |= {"rope.scaling.type": "linear", "rope.scaling.factor": ropes[0].factor}
        if ropes[0].kind == "yarn":
            found |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": ropes[0].factor,
                "rope.scaling.original_context_length": ropes[0].original_max_position,
            }
        if ropes[0].kind == "longrope":
            found |= {
                "rope.scaling.original_context_length": ropes[0].original_max_position,
                "rope.scaling.attn_factor": ropes[0].attention_factor,
            }
    if layer.window is not None:
        found["attention.sliding_window"] = layer.window
    if name in ("stablelm", "gptneox"):
        found["use_parallel_residual"] = spec.parallel
    if name == "granite":
        found |= {
            "attention.scale": spec.attention_scale, "embedding_scale": spec.embedding_scale,
            "residual_scale": spec.residual_scale, "logit_scale": 1 / spec.logit_scale,
        }  # fmt: skip
    if name == "gemma2":
        found["attn_logit_softcapping"] = spec.attention_soft_cap
    if spec.logit_soft_cap is not None:
        found["final_logit_softcapping"] = spec.logit_soft_cap
    if moes:
        found |= {"expert_count": moes[0].num_experts, "expert_used_count": moes[0].top_k}
        if name != "llama":
            found["expert_feed_forward_length"] = moes[0].intermediate_size
        if moes[0].shared_intermediate_size:
            found["expert_shared_feed_forward_length"] = moes[0].shared_intermediate_size
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in found.items()}}


def converted_family(source: Path, target: Path, name: str, kind: str = "F32", **metadata: Any) -> Path:
    """Convert the checkpoint in directory ``source`` to the GGUF file ``target``."""
    spec, tensors = read_spec(source), tensors_of(source, name, kind)
    for part in ("long", "short"):
        factors = getattr(spec.layers[0].rope, f"{part}_factors", ())
        if factors:
            tensors[f"rope_factors_{part}.weight"] = (
                "F32",
                (len(factors),),
                np.array(factors, "<f4").tobytes(),
            )
    target.write_bytes(encode({**metadata_of(spec, name), **metadata}, tensors))
    return target
