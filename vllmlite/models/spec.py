"""What a decoder is, as data: every family maps its Hugging Face configuration onto a :class:`DecoderSpec`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: ``kind`` is one of ``models.rope.KINDS``; a field that a kind has no use for keeps
    its default."""

    rotary_dim: int
    """Leading elements of a head that are rotated; even."""
    theta: float
    kind: str = "default"
    factor: float = 1.0
    """How much longer than ``original_max_position`` the stretched context is."""
    original_max_position: int = 0
    """Positions the model was first trained on."""
    attention_factor: float = 1.0
    """Multiplies cosines and sines (yarn)."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is left alone (yarn)."""
    beta_slow: float = 1.0
    """Rotations below which it is divided by ``factor`` (yarn)."""
    truncate: bool = True
    """Whether the bounds of the ramp between the two are rounded outwards to whole dimensions (yarn)."""
    low_freq_factor: float = 1.0
    """Wavelengths above ``original_max_position / low_freq_factor`` are stretched by ``factor`` (llama3)."""
    high_freq_factor: float = 1.0
    """Wavelengths below ``original_max_position / high_freq_factor`` are left alone (llama3)."""


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder of pre-norm blocks: grouped-query attention with rotary embedding, then a gated MLP."""

    architecture: str
    dtype: str
    """Dtype the checkpoint says it is meant for, one of ``backends.base.FLOAT_DTYPES``."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    activation: str
    rope: RopeSpec
    windows: tuple[int | None, ...]
    """A layer's sliding window in tokens; None: full attention."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Whether each head of q and k is normed before it is rotated."""
    tie_word_embeddings: bool
    quantization: str | None = None
    """In which of ``backends.base.QUANTIZATIONS`` the checkpoint has the weights of products; None: as floats."""

    @property
    def tied_head(self) -> bool:
        """Whether the output layer is the embedding table itself, which a quantised one cannot be."""
        return self.tie_word_embeddings and self.quantization is None

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of this model holds, or of the floats it was made of."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        linears = {
            "self_attn.q_proj": (q, hidden, self.qkv_bias),
            "self_attn.k_proj": (kv, hidden, self.qkv_bias),
            "self_attn.v_proj": (kv, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, q, self.o_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if self.qk_norm:
            norms |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, (rows, columns, bias) in linears.items():
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (rows,)
            for name, size in norms.items():
                shapes[f"{prefix}{name}.weight"] = (size,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def quantized_weights(self) -> dict[str, str]:
        """The tensors of :meth:`weights` that the checkpoint has quantised, and their kind: those of products."""
        if self.quantization is None:
            return {}
        return {name: self.quantization for name in self.weights() if is_product(name)}


def is_product(name: str) -> bool:
    """Whether the tensor of that name is the weight of a product, which is what quantisation applies to."""
    return name.endswith("_proj.weight") or name == "lm_head.weight"
