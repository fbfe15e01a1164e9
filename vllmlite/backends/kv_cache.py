"""The format of a key/value cache: dtypes, quantised formats, and what a cache holds for each token and layer."""

from __future__ import annotations

from dataclasses import dataclass

from vllmlite.weights.host import FLOAT_DTYPES, ITEM_SIZE

SCALE_SIZE = ITEM_SIZE["float32"]
"""Bytes of a scale in a quantised key/value cache."""
LEAST_SCALE = 2.0**-126
"""Smallest scale of a head of a token."""


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Format of a quantised key/value cache, whose elements take one byte each."""

    element: str
    """Dtype of the elements, as in :data:`~vllmlite.weights.host.ITEM_SIZE`."""
    largest: float
    """Largest finite element that is stored."""
    head_scales: bool
    """Whether each head of a token has a scale, stored beside it; otherwise all keys of a layer share one scale, and so
    do its values."""


QUANTIZED_KV = {
    "int8": KVFormat("int8", 127.0, head_scales=True),
    "fp8_e4m3": KVFormat("float8_e4m3", 448.0, head_scales=False),
    "fp8_e5m2": KVFormat("float8_e5m2", 57344.0, head_scales=False),
    "fp8_per_token_head": KVFormat("float8_e4m3", 448.0, head_scales=True),
}
"""Formats of quantised caches, by dtype; :class:`KVSpec` describes their arithmetic."""
KV_DTYPES = (*FLOAT_DTYPES, *QUANTIZED_KV)
"""Dtypes of a key/value cache."""


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The contents of a model's key/value cache: for each token and layer, K and V of ``[num_kv_heads, head_dim]``.

    ``dtype`` is one of :data:`KV_DTYPES`. In a quantised format, every head ``x [head_dim]`` of a token, of K and of V,
    is written as ``q = round(x / scale)``, in float32, halves to even, and is read as ``scale * q``. With head scales,
    ``scale = max(absmax(x) / largest, 2**-126)`` is stored as float32; if an element is infinite or NaN, none of the
    head is finite when it is read. With layer scales, what exceeds ``largest`` is stored as ``largest``, NaN as NaN.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    scales: tuple[tuple[float, float], ...] = ()
    """Scales of each layer's keys and values, for formats without head scales; empty: all are 1."""

    @property
    def format(self) -> KVFormat | None:
        """The format of a quantised cache, or None for floats."""
        return QUANTIZED_KV.get(self.dtype)

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one token, including its scale, without padding."""
        if self.format is None:
            return self.head_dim * ITEM_SIZE[self.dtype]
        return self.head_dim + SCALE_SIZE * self.format.head_scales
