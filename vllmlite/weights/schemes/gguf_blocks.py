"""Schemes of GGUF files: rows of ggml's blocks, decoded to floats, or repacked into tiles without decoding.

A row is a sequence of blocks. ``d`` is a block's scale and ``m`` its minimum, both float16 (the layouts are ggml's:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). The bytes of a block:

- ``Q8_0``: d, 32 signed codes; ``Q4_0``: d, 32 nibbles (code + 8), the first 16 elements in the low nibbles;
- ``Q4_1``: d, m, nibbles; ``Q5_0`` (code + 16) and ``Q5_1``: the same with the codes' fifth bits in four bytes;
- ``Q4_K``, ``Q5_K``: 256 elements in 8 groups, each with a 6-bit scale and a 6-bit minimum, which d and m multiply;
  the minimum is subtracted;
- ``Q6_K``: 256 elements of 6 bits (code + 32) in 16 groups with 8-bit scales, which d multiplies.

``csrc/cpu/blocks.cpp`` has fast versions of these conversions; this module is their reference. Types without tiles are
decoded in :mod:`vllmlite.weights.schemes.gguf_lattices`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.weights.host import (
    Floats,
    HostTensor,
    HostWeight,
    PackedWeight,
    Part,
    Scheme,
    Shape,
    rounded_to_bf16,
)
from vllmlite.weights.schemes.gguf_lattices import DECODERS
from vllmlite.weights.schemes.tiles import GROUP, TILES, TileScheme, pack

Bytes: TypeAlias = NDArray[np.uint8]

NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Names of the format's type numbers."""

BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20),
    "Q5_0": (32, 22), "Q5_1": (32, 24), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17),
    "IQ3_S": (256, 110), "IQ3_XXS": (256, 98), "IQ2_S": (256, 82), "IQ2_XS": (256, 74), "IQ2_XXS": (256, 66),
    "IQ1_M": (256, 56), "IQ1_S": (256, 50), "TQ1_0": (256, 54), "TQ2_0": (256, 66),
}  # fmt: skip
"""Elements and bytes of a block, by supported type."""

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that need no decoding, with their dtypes."""

_FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}

BLOCK_DATA = "blocks"
"""Suffix of the single tensor that a GGUF file stores for a weight."""


@dataclass(frozen=True, slots=True)
class BlockScheme(Scheme):
    """Rows of ggml's blocks of one type."""

    name: str
    """The type's name."""
    tiles: TileScheme | None
    """The tile scheme with the same codes; None if there is none. Scales are kept exactly, except that int8 and int4
    round them to bfloat16 (a relative error of at most 2**-8)."""
    elements: int
    """Elements of a block."""
    block_bytes: int

    @property
    def column_unit(self) -> int:
        """The size of a block."""
        return self.elements

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        row_bytes = shape[-1] // self.elements * self.block_bytes
        return {BLOCK_DATA: Part((math.prod(shape[:-1]), row_bytes), "uint8")}

    def pack(self, shape: Shape, data: Bytes) -> PackedWeight:
        """Return a weight made of the flat bytes ``data`` of its blocks."""
        return PackedWeight(
            self, shape, {BLOCK_DATA: HostTensor("uint8", self.parts(shape)[BLOCK_DATA].shape, data)}
        )

    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""
        blocks = block_data(weight).reshape(-1, self.block_bytes)
        return _decoded(weight, blocks).reshape(weight.shape)

    def take_rows(self, weight: PackedWeight, spans: Sequence[tuple[int, int]]) -> PackedWeight:
        """Return the rows of the spans ``(first, last)``, ``last`` excluded, one span after another. Bounds are
        multiples of :attr:`row_unit`, or the number of rows."""
        rows = block_data(weight).reshape(weight.parts[BLOCK_DATA].shape)
        taken = [rows[first:last] for first, last in spans]
        chosen = taken[0] if len(taken) == 1 else np.concatenate(taken)
        return self.pack((len(chosen), weight.shape[-1]), chosen.reshape(-1))

    def take_columns(self, weight: PackedWeight, first: int, last: int) -> PackedWeight:
        """Return columns ``first`` to ``last`` - 1. Bounds are multiples of :attr:`column_unit`, or the number of
        columns."""
        rows = block_data(weight).reshape(weight.parts[BLOCK_DATA].shape)
        begin, end = (column // self.elements * self.block_bytes for column in (first, last))
        return self.pack(
            (*weight.shape[:-1], last - first), np.ascontiguousarray(rows[:, begin:end]).reshape(-1)
        )


_TILES = {
    "Q8_0": "int8", "Q4_0": "int4", "Q4_1": "q4_1", "Q5_0": "q5_0", "Q5_1": "q5_1", "Q4_K": "q4_k", "Q5_K": "q5_k",
    "Q6_K": "q6_k",
}  # fmt: skip
BLOCK_SCHEMES = {
    name: BlockScheme(name, TILES[_TILES[name]] if name in _TILES else None, *sizes)
    for name, sizes in BLOCKS.items()
    if name not in FLOATS
}
"""Quantised types, by name."""


def type_name(weight: HostWeight) -> str:
    """Return GGUF's name of a tensor's type."""
    return weight.scheme.name if isinstance(weight, PackedWeight) else _FLOAT_NAMES[weight.dtype]


def block_data(weight: PackedWeight) -> Bytes:
    """Return the bytes of a weight in a scheme of this module as a flat array."""
    return weight.parts[BLOCK_DATA].data


def to_tiles(weight: PackedWeight) -> PackedWeight:
    """Return the weight ``[out, in]`` with the same codes in the scheme :attr:`BlockScheme.tiles`.

    Raises ModelError for scales that are not finite."""
    scheme, tiles = weight.scheme, _tiles(weight)
    rows, size = weight.shape
    blocks = block_data(weight).reshape(-1, BLOCKS[scheme.name][1])
    codes, (halves, sub_scales) = _CODES[scheme.name](blocks), _block_scales(weight, blocks)
    return pack(
        tiles,
        (rows, size),
        codes.reshape(rows, -1, GROUP),
        (rounded_to_bf16(halves) if tiles.scale_dtype == "bfloat16" else halves).reshape(
            rows, -1, halves.shape[-1]
        ),
        None if sub_scales is None else sub_scales.reshape(rows, size // GROUP, -1),
    )


def _tiles(weight: PackedWeight) -> TileScheme:
    assert isinstance(weight.scheme, BlockScheme) and weight.scheme.tiles is not None
    return weight.scheme.tiles


def _decoded(weight: PackedWeight, blocks: Bytes) -> Floats:
    """Return the values ``[n, elements]`` of blocks ``[n, bytes]`` of ``weight``."""
    name = weight.scheme.name
    if name in DECODERS:
        with np.errstate(invalid="ignore", over="ignore"):
            values = DECODERS[name](blocks).reshape(len(blocks), -1)
        if not np.isfinite(values).all():
            raise _not_finite(weight)
        return values
    layout = _tiles(weight)
    whole, sub_scales = _block_scales(weight, blocks)
    scales = whole[:, None]
    if sub_scales is not None:
        split = layout.scales_per_group
        scales = np.concatenate(
            (
                (scales[..., :1] * sub_scales[..., :split]).reshape(len(blocks), -1, 1),
                *([(scales[..., 1:] * sub_scales[..., split:])] if layout.offsets else []),
            ),
            axis=-1,
        )
    codes = _CODES[name](blocks).reshape(len(blocks), -1, layout.elements_per_scale).astype(np.float32)
    values = scales[..., :1] * (codes - np.float32(layout.zero))
    if layout.offsets:
        values += scales[..., 1:]
    return values.reshape(len(blocks), -1)


def _block_scales(weight: PackedWeight, blocks: Bytes) -> tuple[Floats, NDArray[np.int8] | None]:
    """Return the blocks' float scales, and the integer sub-scales that multiply them."""
    halves, sub_scales = _SCALES[weight.scheme.name](blocks)
    whole = np.ascontiguousarray(halves).view("<f2").astype(np.float32)
    if not np.isfinite(whole).all():
        raise _not_finite(weight)
    return whole, sub_scales


def _not_finite(weight: PackedWeight) -> ModelError:
    return ModelError(f"a weight of shape {list(weight.shape)}: a block's scale is not finite")


# ---- Codes: uint8 [n, elements] from blocks [n, bytes]


def _nibbles(data: Bytes) -> Bytes:
    """Return the low nibbles, followed by the high nibbles."""
    return np.concatenate((data & np.uint8(15), data >> np.uint8(4)), axis=-1)


def _five_bits(high: Bytes, low: Bytes) -> Bytes:
    return _nibbles(low) | np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4)


def _groups_of_nibbles(data: Bytes) -> Bytes:
    """Return the nibbles of a ``Q4_K`` or ``Q5_K`` block as ``[n, 8, 32]``: per 32 bytes, the low ones, then the
    high."""
    return _nibbles(data.reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _q5_k(blocks: Bytes) -> Bytes:
    fifth: Bytes = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    return _groups_of_nibbles(blocks[:, 48:]) | fifth << np.uint8(4)


def _q6_k(blocks: Bytes) -> Bytes:
    low = blocks[:, :128].reshape(-1, 2, 2, 32)  # half, quarter of it, element
    low = np.concatenate((low & np.uint8(15), low >> np.uint8(4)), axis=2)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high: Bytes = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)
    return low | high << np.uint8(4)


_CODES: dict[str, Callable[[Bytes], Bytes]] = {
    "Q8_0": lambda blocks: blocks[:, 2:] ^ np.uint8(128),
    "Q4_0": lambda blocks: _nibbles(blocks[:, 2:]),
    "Q4_1": lambda blocks: _nibbles(blocks[:, 4:]),
    "Q5_0": lambda blocks: _five_bits(blocks[:, 2:6], blocks[:, 6:]),
    "Q5_1": lambda blocks: _five_bits(blocks[:, 4:8], blocks[:, 8:]),
    "Q4_K": lambda blocks: _groups_of_nibbles(blocks[:, 16:]),
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

# ---- Scales: the block's own, float16 [n, 2 or 4 bytes], and its sub-scales, int8 [n, groups, 1 or 2], or None

_Scales: TypeAlias = tuple[Bytes, NDArray[np.int8] | None]


def _scales_and_minima(blocks: Bytes) -> _Scales:
    """Return scales of a ``Q4_K`` or ``Q5_K`` block: 6 bits each for 8 groups, in 12 bytes. m is returned negated."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=1)
    minima = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=1)
    whole = blocks[:, :4] ^ np.array([0, 0, 0, 128], np.uint8)
    return whole, np.stack((scales, minima), axis=-1).view(np.int8)


_SCALES: dict[str, Callable[[Bytes], _Scales]] = {
    "Q8_0": lambda blocks: (blocks[:, :2], None),
    "Q4_0": lambda blocks: (blocks[:, :2], None),
    "Q4_1": lambda blocks: (blocks[:, :4], None),
    "Q5_0": lambda blocks: (blocks[:, :2], None),
    "Q5_1": lambda blocks: (blocks[:, :4], None),
    "Q4_K": _scales_and_minima,
    "Q5_K": _scales_and_minima,
    "Q6_K": lambda blocks: (blocks[:, 208:], blocks[:, 192:208].view(np.int8).reshape(-1, 8, 2)),
}
