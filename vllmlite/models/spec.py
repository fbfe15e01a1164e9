"""What a decoder is, as data: every family maps its Hugging Face configuration onto a :class:`DecoderSpec`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllmlite.models.keys import LLAMA, Keys
from vllmlite.models.quantization import Quantization
from vllmlite.weights.parts import Span

VOCAB_UNIT = 16
"""Rows of the output layer are given to ranks in multiples of this number."""


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
    """Multiplies cosines and sines (yarn, longrope)."""
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
    short_factors: tuple[float, ...] = ()
    """What frequencies are divided by in an engine for at most ``original_max_position`` positions (longrope)."""
    long_factors: tuple[float, ...] = ()
    """What they are divided by in one for more (longrope)."""


@dataclass(frozen=True, slots=True)
class NormSpec:
    """``kind`` is ``rms`` or ``layer``: root mean square, or mean and variance."""

    eps: float
    kind: str = "rms"
    bias: bool = False
    """Whether it adds one (layer)."""
    unit_offset: bool = False
    """Whether the checkpoint has the weight minus one."""


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of gated experts in place of the MLP."""

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalise: bool
    """Whether the weights of the chosen experts are made to sum to one."""
    shared_intermediate_size: int = 0
    """Of an expert for all tokens, behind a gate of its own; 0: there is none."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    window: int | None = None
    """Sliding window in tokens; None: full attention."""
    rope: RopeSpec | None = None
    """None: q and k are not rotated."""
    moe: MoeSpec | None = None
    """None: the layer has an MLP."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that rank ``rank`` of ``world`` computes, in terms of the whole model's sizes."""

    rank: int
    world: int
    heads: Span
    """Query heads."""
    kv_heads: Span
    """Key/value heads; where there are fewer than ranks, several ranks have the same one."""

    def part(self, size: int) -> Span:
        """The part of this rank of ``size`` elements, of which every rank gets the same number."""
        return self.rank * size // self.world, (self.rank + 1) * size // self.world

    def uneven_part(self, size: int) -> Span:
        """The part of this rank of ``size`` elements. The first ranks get the same multiple of :data:`VOCAB_UNIT`, at
        which our quantisation schemes can be sliced, and the last ones what is left."""
        most = -(-size // (self.world * VOCAB_UNIT)) * VOCAB_UNIT
        return min(self.rank * most, size), min((self.rank + 1) * most, size)


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder of blocks, each of grouped-query attention and an MLP. Defaults are Llama's."""

    architecture: str
    dtype: str
    """Dtype the checkpoint says it is meant for, one of ``backends.base.FLOAT_DTYPES``."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: NormSpec
    activation: str
    layers: tuple[LayerSpec, ...]
    tie_word_embeddings: bool = False

    attn_norm: bool = True
    """Whether a norm stands before attention."""
    attn_out_norm: bool = False
    """Whether one stands behind it, before the residual is added."""
    mlp_norm: bool = True
    """Whether one stands before the MLP; without it, a parallel MLP reads what attention reads."""
    mlp_out_norm: bool = False
    """Whether one stands behind it."""
    parallel: bool = False
    """Whether attention and MLP read the same residual, instead of the MLP what attention left."""
    post_norm: bool = False
    """Whether ``attn_norm`` and ``mlp_norm`` stand behind the residual, and become it."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    """Whether the MLP's input meets two weights, one of which gates the other."""
    qk_norm: str | None = None
    """``head``, ``whole`` or ``layer``: whether each head of q and k, or all heads as one, are normed by RMS before
    rotation, or each head by a layer norm of its own."""
    alibi: tuple[float, ...] = ()
    """Linear biases (Press et al. 2021): a head's slope, as added to scaled scores."""
    learned_positions: int = 0
    """Rows of a table of position embeddings; 0: there is none."""
    position_offset: int = 0
    """Its row of position 0."""
    embedding_norm: bool = False
    """Whether embeddings are normed."""
    embedding_size: int | None = None
    """Of embeddings that are projected to ``hidden_size``, as what the output layer meets is from it; None: they have
    that size."""
    final_norm: bool = True
    """Whether one stands behind the last block."""

    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """What scores are multiplied by; None: ``head_dim ** -0.5``."""
    residual_scale: float = 1.0
    """What attention's and the MLP's output are multiplied by."""
    logit_scale: float = 1.0
    attention_soft_cap: float | None = None
    """c of scores' ``c * tanh(score / c)`` (Bello et al. 2016); None: they are not capped."""
    logit_soft_cap: float | None = None

    keys: Keys = field(default=LLAMA)
    """Names of the checkpoint's tensors."""
    quantization: Quantization | None = None
    """In which schemes the checkpoint stores the weights of products; None: all of them are floats."""
    shard: Shard | None = None
    """The part of the model that this spec describes; None: all of it."""
    whole: DecoderSpec | None = None
    """The spec of the whole model, if this is a part of it."""

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return len(self.layers)

    @property
    def output_size(self) -> int:
        """Elements of what the output layer meets."""
        return self.embedding_size or self.hidden_size

    @property
    def tied_head(self) -> bool:
        """Whether the output layer is the embedding table itself, neither quantised nor a part of it."""
        own = self.quantization is not None and self.quantization.own
        return self.tie_word_embeddings and not own and self.shard is None
