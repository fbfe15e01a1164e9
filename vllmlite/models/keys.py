"""The names of checkpoint tensors per family, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fused:
    """A module that holds the rows of several projections, in the order q, k, v or gate, up.

    ``by_group``: the order repeats for each key/value head, with the query heads that share it; otherwise the
    projections are consecutive."""

    module: str
    by_group: bool = False


@dataclass(frozen=True, slots=True)
class Keys:
    """Module names, without ``.weight`` and ``.bias``. Only the names of modules that a model has are used."""

    prefix: str = "model."
    """Prefix of all modules but the output layer. Checkpoints of the base model omit it, or its first word."""
    layer: str = "layers."
    """Prefix of a layer's modules, followed by the layer's number and a dot."""
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
    sinks: str = "self_attn.sinks"
    """The tensor of attention sinks."""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gate_up: Fused | tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    up: str = "mlp.up_proj"
    """Up projection of an MLP without a gate."""
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert: str = "mlp.experts."
    """Prefix of an expert's modules, followed by the expert's number and a dot."""
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked_experts: tuple[str, str, str] | None = None
    """Modules that hold the gate, up and down projections of all experts of a layer, one expert's rows after another's;
    None: each expert has modules named by ``expert``."""
    interleaved_experts: tuple[str, str] | None = None
    """Modules that hold all experts of a layer: gate and up projections, whose rows alternate, and down projections. As
    floats they are stored as ``[experts, in, out]``, quantised as ``[experts, out, in]``. None: not stored so."""
    shared_expert: str = "mlp.shared_expert."
    shared_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_gate: str = "mlp.shared_expert_gate"
    transposed: bool = False
    """Whether the layers' weight matrices are stored as ``[in, out]``."""
    unread: str = ""
    """Regular expression of tensors that may be stored but are not needed: constants, or parts of another model."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions of alternative names with their replacements; the first match counts."""


LLAMA = Keys()
SANDWICH = Keys(
    attn_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
"""Names of families with norms after attention and MLP, as Gemma and OLMo name them."""
MTP_TENSORS = r"(^|\.)mtp(_layers)?\."
"""Regular expression of the tensors of MTP layers, which only propose drafts: see ``models/mtp.py``."""
MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Names of the number of MTP layers in configurations."""
