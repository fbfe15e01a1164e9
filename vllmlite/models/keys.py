"""How families name their checkpoints' tensors, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fused:
    """A module whose rows are those of several of the model's, one after the other or alternating by head.

    Their order is the model's: q, k, v, or gate, up. ``by_group``: they repeat for each key/value head, with the query
    heads that share it."""

    module: str
    by_group: bool = False


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of modules, to which ``.weight`` and ``.bias`` are added. Only those that a model has are asked for."""

    prefix: str = "model."
    """Of all but the output layer. Checkpoints of the base model leave it out, or its first word."""
    layer: str = "layers."
    """With its number and a dot behind it, of a layer's modules."""
    embedding: str = "embed_tokens"
    positions: str = "embed_positions"
    embedding_norm: str = "embed_layernorm"
    project_in: str = "project_in"
    project_out: str = "project_out"
    final_norm: str = "norm"
    head: str = "lm_head"
    attn_norm: str = "input_layernorm"
    attn_out_norm: str = "post_self_attn_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str = "post_mlp_layernorm"
    qkv: Fused | tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gate_up: Fused | tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    up: str = "mlp.up_proj"
    """Of an MLP without a gate."""
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert: str = "mlp.experts."
    """With its number and a dot behind it, of an expert's modules."""
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked_experts: tuple[str, str, str] | None = None
    """Modules with the parts of all experts of a layer, one expert's rows after the other's; None: ``expert`` has
    them."""
    shared_expert: str = "mlp.shared_expert."
    shared_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_gate: str = "mlp.shared_expert_gate"
    transposed: bool = False
    """Whether layers' weights of products are stored ``[in, out]``."""
    unread: str = ""
    """A regular expression of tensors that checkpoints may have and that are not needed: every loader computes them, or
    they belong to another part of the model."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions of other names that checkpoints have, and what they are here; the first match counts."""


LLAMA = Keys()
SANDWICH = Keys(
    attn_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
"""Where norms stand behind attention and MLP, as Gemma and OLMo name them."""
