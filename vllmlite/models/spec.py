"""The description of a decoder as data: every family maps its Hugging Face configuration to a :class:`DecoderSpec`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllmlite.models.keys import LLAMA, Keys
from vllmlite.models.quantization import Quantization
from vllmlite.weights.parts import Span

VOCAB_UNIT = 16
"""The rows of the output layer are divided among ranks in multiples of this number."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. ``kind`` is one of ``models.rope.KINDS``; fields that a kind does not use keep their
    defaults."""

    rotary_dim: int
    """Number of leading elements of a head that are rotated; even."""
    theta: float
    kind: str = "default"
    factor: float = 1.0
    """Ratio of the extended context to ``original_max_position``."""
    original_max_position: int = 0
    """Number of positions that the model was first trained on."""
    attention_factor: float = 1.0
    """Factor by which cosines and sines are multiplied (yarn, longrope)."""
    beta_fast: float = 32.0
    """Number of rotations over the original context above which a frequency is unchanged (yarn)."""
    beta_slow: float = 1.0
    """Number of rotations below which a frequency is divided by ``factor`` (yarn)."""
    truncate: bool = True
    """Whether the bounds of the ramp between these two are rounded outwards to whole dimensions (yarn)."""
    low_freq_factor: float = 1.0
    """Wavelengths above ``original_max_position / low_freq_factor`` are stretched by ``factor`` (llama3)."""
    high_freq_factor: float = 1.0
    """Wavelengths below ``original_max_position / high_freq_factor`` are unchanged (llama3)."""
    short_factors: tuple[float, ...] = ()
    """Divisors of the frequencies in an engine for at most ``original_max_position`` positions (longrope)."""
    long_factors: tuple[float, ...] = ()
    """Divisors of the frequencies in an engine for more positions (longrope)."""


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A norm. ``kind`` is ``rms`` (root mean square) or ``layer`` (mean and variance)."""

    eps: float
    kind: str = "rms"
    bias: bool = False
    """Whether the norm adds a bias (``layer`` only)."""
    unit_offset: bool = False
    """Whether the checkpoint stores the weight minus one."""


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of gated experts in place of the MLP."""

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalise: bool
    """Whether the weights of the chosen experts are scaled to sum to one."""
    bias: bool = False
    """Whether the router and the experts have biases."""
    shared_intermediate_size: int = 0
    """Intermediate size of an expert for all tokens, which has its own gate; 0 if there is none."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The properties that may differ between layers."""

    window: int | None = None
    """Sliding window in tokens, or None for full attention."""
    rope: RopeSpec | None = None
    """The rotary embedding; None if q and k are not rotated."""
    moe: MoeSpec | None = None
    """The mixture of experts; None if the layer has an MLP instead."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that rank ``rank`` of ``world`` computes, as ranges within the whole model."""

    rank: int
    world: int
    heads: Span
    """Range of the query heads."""
    kv_heads: Span
    """Range of the key/value heads; if there are fewer heads than ranks, several ranks have the same one."""

    def part(self, size: int) -> Span:
        """Return the range of ``size`` elements that belongs to this rank; every rank has the same number."""
        return self.rank * size // self.world, (self.rank + 1) * size // self.world

    def uneven_part(self, size: int, rank: int | None = None) -> Span:
        """Return the range of ``size`` elements that belongs to ``rank``, by default this one. The first ranks have the
        same multiple of :data:`VOCAB_UNIT`, at which quantised weights can be split, and the last one has the rest."""
        rank = self.rank if rank is None else rank
        most = -(-size // (self.world * VOCAB_UNIT)) * VOCAB_UNIT
        return min(rank * most, size), min((rank + 1) * most, size)


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers of a model that one stage of a pipeline computes."""

    first: int = 0
    """Number of the stage's first layer in the whole model."""
    is_first: bool = True
    """Whether the stage computes the embeddings of tokens."""
    has_table: bool = True
    """Whether the stage has the table of embeddings, because it is the first or because its drafts read the table."""
    is_last: bool = True
    """Whether the stage has the final norm and the output layer."""


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder of blocks, each of grouped-query attention and an MLP. Defaults are Llama's."""

    architecture: str
    dtype: str
    """Dtype that the checkpoint's configuration gives, one of ``weights.host.FLOAT_DTYPES``."""
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
    """Whether there is a norm before attention."""
    attn_out_norm: bool = False
    """Whether there is a norm after attention, before the residual is added."""
    mlp_norm: bool = True
    """Whether there is a norm before the MLP; without it, a parallel MLP has the same input as attention."""
    mlp_out_norm: bool = False
    """Whether there is a norm after the MLP, before the residual is added."""
    parallel: bool = False
    """Whether the MLP has the same input as attention, instead of attention's result."""
    post_norm: bool = False
    """Whether ``attn_norm`` and ``mlp_norm`` come after adding the residual, and their results replace it."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    """Whether the MLP multiplies its input by two weights, one of which gates the other."""
    qk_norm: str | None = None
    """Norms of q and k before rotation: ``head`` is an RMS norm of each head, ``whole`` one of all heads together,
    ``layer`` a layer norm with its own weight for each head. None if there are none."""
    attention_sinks: bool = False
    """Whether each head has a learnt score of one more key, whose value is zero (Xiao et al. 2023; OpenAI 2025)."""
    alibi: tuple[float, ...] = ()
    """ALiBi (Press et al. 2021): the slope of each head, by which distances are multiplied and added to the scaled
    scores. Empty if the model has none."""
    learned_positions: int = 0
    """Number of rows of a table of position embeddings, or 0 if there is none."""
    position_offset: int = 0
    """The row of that table for position 0."""
    embedding_norm: bool = False
    """Whether there is a norm after the embedding."""
    embedding_size: int | None = None
    """Size of the embeddings if it is not ``hidden_size``: they are projected to that, and the input of the output
    layer is projected back. None if the sizes are equal."""
    final_norm: bool = True
    """Whether there is a norm after the last block."""

    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """Factor of attention scores, or None for ``head_dim ** -0.5``."""
    residual_scale: float = 1.0
    """Factor of the outputs of attention and of the MLP, before the residual is added."""
    logit_scale: float = 1.0
    attention_soft_cap: float | None = None
    """The c of ``c * tanh(score / c)``, applied to attention scores (Bello et al. 2016), or None if they are not
    capped."""
    logit_soft_cap: float | None = None

    keys: Keys = field(default=LLAMA)
    """Names of the checkpoint's tensors."""
    quantization: Quantization | None = None
    """The quantisation schemes of the checkpoint's weights, or None if all of them are floats."""
    shard: Shard | None = None
    """The part of the model that this spec describes, or None if it describes the whole model."""
    stage: Stage = Stage()
    """Which of the whole model's layers ``layers`` are."""
    whole: DecoderSpec | None = None
    """The spec of the whole model, if this is a part of it."""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def output_size(self) -> int:
        """Number of elements of the output layer's input."""
        return self.embedding_size or self.hidden_size

    @property
    def tied_head(self) -> bool:
        """Whether the output layer is the embedding table itself, neither quantised nor split."""
        own = self.quantization is not None and self.quantization.own
        return self.tie_word_embeddings and not own and self.shard is None
