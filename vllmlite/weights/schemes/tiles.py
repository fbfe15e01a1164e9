"""Schemes that store weights in tiles of 16 rows: int8 and int4, and the forms that ggml's blocks are repacked into.

A weight ``[out, in]`` is divided into groups of :data:`GROUP` elements along ``in``. An element is its group's scale
times (its code minus the scheme's ``zero``), plus an offset if the scheme has offsets. :data:`TILE_ROWS` rows are
stored together, and both dimensions are padded with elements that mean zero, so that a tile is read sequentially:

- ``qweight`` with 8-bit codes: uint8 ``[tiles, groups, GROUP * TILE_ROWS]``, within a group ``[quad][row][4]``:
  elements ``4 * quad`` to ``4 * quad + 3`` of each row;
- ``qweight`` with 4-bit codes: uint8 ``[tiles, groups, GROUP * TILE_ROWS / 2]``, within a group ``[pair][row][4]``:
  quad ``2 * pair`` in the low and ``2 * pair + 1`` in the high nibbles;
- ``qweight`` with 5-bit and 6-bit codes: the lowest four bits as above; after them, within the group, the highest bits
  ``[part][row][4]``, the first quad's in the lowest bits of the first part's bytes;
- ``scales``: bfloat16 ``[tiles, groups, TILE_ROWS]``; or float16 ``[tiles, units, TILE_ROWS]``, with offsets
  ``[tiles, units, 2, TILE_ROWS]``. A unit is one group, or :data:`UNIT_GROUPS` groups if there are sub-scales;
- ``sub_scales``, which multiply the scales of a unit: int8 ``[tiles, groups, n, TILE_ROWS]``, one for each of a group's
  one or two scales, then one for its offset.

``int8`` and ``int4`` are made from floats (symmetric round-to-nearest quantisation; Jacob et al. 2018). An int8 scale
maps the element of the largest magnitude to -128. An int4 scale has the least squared error of :data:`SCALE_TRIES`
candidates around the scale that maps that element to -8, each refitted to its codes. The other schemes are made from
ggml's blocks (:mod:`vllmlite.weights.schemes.gguf_blocks`). Matrix products quantise activations as int8 does the rows
of a weight, with float32 scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import (
    ITEM_SIZE,
    Floats,
    HostTensor,
    PackedWeight,
    Part,
    Scheme,
    Shape,
    rounded_to_bf16,
)

GROUP = 32
TILE_ROWS = 16
UNIT_GROUPS = 8
"""Groups in a unit, which share one scale that sub-scales multiply."""
SCALE_TRIES = 9
QWEIGHT, SCALES, SUB_SCALES = "qweight", "scales", "sub_scales"


@dataclass(frozen=True, slots=True)
class TileScheme(Scheme):
    """One of the schemes that store weights in tiles. ``layout_of`` in ``csrc/cpu/kernels.hpp`` has the same values."""

    name: str
    bits: int
    """Bits per code: 4, 5, 6 or 8."""
    zero: int
    """The code that stands for 0."""
    scale_dtype: str = "float16"
    offsets: bool = False
    """Whether each group has an offset, which is added to its elements."""
    sub_scales: bool = False
    """Whether the groups of a unit share a scale, which integer sub-scales multiply."""
    elements_per_scale: int = GROUP
    """Number of elements with a common scale: GROUP, or half of it."""
    row_unit: int = TILE_ROWS
    column_unit: int = GROUP

    @property
    def input_dtype(self) -> str:
        """The dtype to which products quantise activations; None: activations stay in the backend's dtype."""
        return "int8"

    @property
    def scales_per_group(self) -> int:
        """Number of scales in a group, 1 or 2."""
        return GROUP // self.elements_per_scale

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        tiles, groups = -(-shape[0] // TILE_ROWS), -(-shape[1] // GROUP)
        units = -(-groups // UNIT_GROUPS) if self.sub_scales else groups
        scales = (tiles, units, 2, TILE_ROWS) if self.offsets else (tiles, units, TILE_ROWS)
        parts = {
            QWEIGHT: Part((tiles, groups, GROUP * TILE_ROWS * self.bits // 8), "uint8"),
            SCALES: Part(scales, self.scale_dtype),
        }
        if self.sub_scales:
            parts[SUB_SCALES] = Part((tiles, groups, self.scales_per_group + self.offsets, TILE_ROWS), "int8")
        return parts

    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""
        codes, scales, offsets = unpack(weight)
        whole: Floats = np.multiply(codes, scales[..., None], dtype=np.float32).reshape(len(codes), -1)
        if offsets is not None:
            whole = whole + np.repeat(offsets, GROUP, axis=1)
        return whole[:, : weight.shape[1]]

    def take_rows(self, weight: PackedWeight, spans: Sequence[tuple[int, int]]) -> PackedWeight:
        """Return the rows of the spans ``(first, last)``, ``last`` excluded, one span after another. Bounds are
        multiples of :attr:`row_unit`, or the number of rows."""
        spans = list(spans)
        if len(spans) > 1 and any(last % TILE_ROWS for _, last in spans[:-1]):
            raise ValueError("only the last span may end inside a tile")
        rows = sum(last - first for first, last in spans)
        parts = {
            suffix: np.concatenate(
                [_elements(part)[first // TILE_ROWS : -(-last // TILE_ROWS)] for first, last in spans]
            )
            for suffix, part in weight.parts.items()
        }
        return self.assembled((rows, weight.shape[1]), parts)

    def take_columns(self, weight: PackedWeight, first: int, last: int) -> PackedWeight:
        """Return columns ``first`` to ``last`` - 1. Bounds are multiples of :attr:`column_unit`, or the number of
        columns."""
        groups = first // GROUP, -(-last // GROUP)
        units = first // (GROUP * UNIT_GROUPS), -(-last // (GROUP * UNIT_GROUPS))
        parts = {
            suffix: _elements(part)[:, slice(*(units if self.sub_scales and suffix == SCALES else groups))]
            for suffix, part in weight.parts.items()
        }
        return self.assembled((weight.shape[0], last - first), parts)

    def assembled(self, shape: tuple[int, int], parts: dict[str, NDArray[Any]]) -> PackedWeight:
        """Return the weight of ``shape`` with the elements ``parts``; bfloat16 is given as unsigned integers."""
        return PackedWeight(
            self,
            shape,
            {
                suffix: HostTensor(
                    part.dtype, part.shape, np.ascontiguousarray(parts[suffix]).reshape(-1).view(np.uint8)
                )
                for suffix, part in self.parts(shape).items()
            },
        )


_WHOLE_UNITS = GROUP * UNIT_GROUPS
TILES = {
    scheme.name: scheme
    for scheme in (
        TileScheme("int8", 8, 128, "bfloat16"),
        TileScheme("int4", 4, 8, "bfloat16"),
        TileScheme("q4_1", 4, 0, offsets=True),
        TileScheme("q5_0", 5, 16),
        TileScheme("q5_1", 5, 0, offsets=True),
        TileScheme("q4_k", 4, 0, offsets=True, sub_scales=True, column_unit=_WHOLE_UNITS),
        TileScheme("q5_k", 5, 0, offsets=True, sub_scales=True, column_unit=_WHOLE_UNITS),
        TileScheme("q6_k", 6, 32, sub_scales=True, elements_per_scale=16, column_unit=_WHOLE_UNITS),
    )
}
"""int8 and int4, which checkpoints store, and the forms that ggml's blocks are repacked into."""


def quantize(weight: Floats, name: str) -> PackedWeight:
    """Quantise ``weight [out, in]``, whose values must be finite, to the scheme ``int8`` or ``int4``."""
    scheme = TILES[name]
    rows, size = weight.shape
    groups = np.pad(weight, ((0, 0), (0, -size % GROUP))).reshape(rows, -1, GROUP)
    scales = _int8_scales(groups) if name == "int8" else _int4_scales(groups)
    codes = (_codes(groups, scales, scheme.zero) + scheme.zero).astype(np.uint8)
    return pack(scheme, (rows, size), codes, scales[..., None])


def pack(
    scheme: TileScheme,
    shape: tuple[int, int],
    codes: NDArray[np.uint8],
    scales: Floats,
    sub_scales: NDArray[np.int8] | None = None,
) -> PackedWeight:
    """Return a weight ``[out, in]`` from row-major arrays.

    These are codes ``[out, groups, GROUP]``, scales ``[out, units, 1]`` (with offsets ``[out, units, 2]``) that are
    exact in the scheme's dtype, and sub-scales ``[out, groups, n]``."""
    parts = _parts(scheme, codes)
    padding = _parts(scheme, np.full((1, 1, GROUP), scheme.zero, np.uint8))
    return packed_weight(
        scheme,
        shape,
        _to_tiles(parts.view("<u4")[..., 0], padding.view("<u4")[..., 0]).view(np.uint8),
        _to_tiles(scales),
        None if sub_scales is None else _to_tiles(sub_scales),
    )


def packed_weight(
    scheme: TileScheme,
    shape: tuple[int, int],
    codes: NDArray[np.uint8],
    scales: Floats,
    sub_scales: NDArray[np.int8] | None = None,
) -> PackedWeight:
    """Return a weight ``[out, in]`` from codes, scales (exact in the scheme's dtype) and sub-scales in tile order."""
    if scheme.scale_dtype == "bfloat16":
        bits = (np.ascontiguousarray(scales).view(np.uint32) >> 16).astype("<u2")
    else:
        bits = scales.astype("<f2").view("<u2")
    arrays = {QWEIGHT: codes, SCALES: bits} | ({} if sub_scales is None else {SUB_SCALES: sub_scales})
    return scheme.assembled(shape, arrays)


def unpack(weight: PackedWeight) -> tuple[NDArray[np.int8], Floats, Floats | None]:
    """Return codes minus the scheme's zero, int8 ``[out, n, elements_per_scale]``; scales, float32 ``[out, n]``; and
    offsets, float32 ``[out, groups]``, or None if the scheme has none."""
    scheme = weight.scheme
    assert isinstance(scheme, TileScheme)
    codes_part, scales_part = weight.parts[QWEIGHT], weight.parts[SCALES]
    rows, tiles = weight.shape[0], codes_part.shape[0]
    stored = codes_part.data.reshape(tiles, -1, GROUP * scheme.bits // 32, TILE_ROWS, 4)
    codes = _rows(_quads(scheme, stored), rows).astype(np.int16) - scheme.zero
    bits = scales_part.data.view("<u2")
    wide = (
        (bits.astype(np.uint32) << 16).view(np.float32)
        if scheme.scale_dtype == "bfloat16"
        else bits.view("<f2")
    )
    found = _rows(wide.astype(np.float32).reshape(tiles, -1, 1 + scheme.offsets, TILE_ROWS), rows)
    scales, offsets = found[..., :1], found[..., 1:]
    if scheme.sub_scales:
        factors = weight.parts[SUB_SCALES]
        by = _rows(factors.data.view(np.int8).reshape(*factors.shape), rows)
        scales, offsets = (np.repeat(one, UNIT_GROUPS, 1)[:, : by.shape[1]] for one in (scales, offsets))
        scales = scales * by[..., : scheme.scales_per_group]
        offsets = offsets * by[..., scheme.scales_per_group :] if scheme.offsets else offsets
    return (
        codes.astype(np.int8).reshape(rows, -1, scheme.elements_per_scale),
        np.ascontiguousarray(scales.reshape(rows, -1)),
        offsets.reshape(rows, -1) if scheme.offsets else None,
    )


def _elements(part: HostTensor) -> NDArray[Any]:
    """Return the elements of ``part`` in its shape, as unsigned integers of the same size."""
    return part.data.view(f"u{ITEM_SIZE[part.dtype]}").reshape(part.shape)


def _parts(scheme: TileScheme, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return codes ``[out, groups, GROUP]`` packed as in a tile's row: ``[out, groups, parts, 4]``."""
    quads = codes.reshape(*codes.shape[:2], GROUP // 4, 4)
    if scheme.bits == 8:
        return np.ascontiguousarray(quads)
    low: NDArray[np.uint8] = quads[:, :, ::2] & np.uint8(15) | quads[:, :, 1::2] << np.uint8(4)
    high = scheme.bits - 4
    if high == 0:
        return low
    shifts = np.arange(0, 8, high, dtype=np.uint8)[:, None]
    split = (quads >> 4).reshape(*quads.shape[:2], -1, len(shifts), 4)
    return np.concatenate((low, np.bitwise_or.reduce(split << shifts, axis=3)), axis=2)


def _quads(scheme: TileScheme, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return codes ``[tiles, groups, GROUP / 4, TILE_ROWS, 4]`` from parts ``[tiles, groups, parts, TILE_ROWS, 4]``."""
    if scheme.bits == 8:
        return stored
    low, rest = stored[:, :, : GROUP // 8], stored[:, :, GROUP // 8 :, None]
    quads = np.stack((low & 15, low >> 4), axis=3).reshape(*low.shape[:2], -1, TILE_ROWS, 4)
    high = scheme.bits - 4
    if high == 0:
        return quads
    shifts = np.arange(0, 8, high, dtype=np.uint8)[:, None, None]
    highest: NDArray[np.uint8] = rest >> shifts & np.uint8((1 << high) - 1)
    joined: NDArray[np.uint8] = quads | highest.reshape(quads.shape) << np.uint8(4)
    return joined


def _to_tiles(values: NDArray[Any], filling: NDArray[Any] | None = None) -> NDArray[Any]:
    """Return ``[rows, groups, n]`` as ``[tiles, groups, n, TILE_ROWS]``, padded with ``filling [1, 1, n]`` or zeros."""
    missing = -len(values) % TILE_ROWS, *values.shape[1:]
    padding = np.zeros(missing, values.dtype) if filling is None else np.broadcast_to(filling, missing)
    padded = np.concatenate((values, padding)).reshape(-1, TILE_ROWS, *values.shape[1:])
    return np.ascontiguousarray(padded.transpose(0, 2, 3, 1))


def _rows(values: NDArray[Any], rows: int) -> NDArray[Any]:
    """Return ``[tiles, groups, n, TILE_ROWS, ...]`` as ``[rows, groups, n, ...]``."""
    return np.moveaxis(values, 3, 1).reshape(-1, *values.shape[1:3], *values.shape[4:])[:rows]


def _extremes(groups: Floats) -> Floats:
    """Return each group's element of the largest magnitude; of two equal ones, the positive one."""
    high, low = groups.max(-1), groups.min(-1)
    found: Floats = np.where(high > -low, high, low)
    return found


def _codes(groups: Floats, scales: Floats, zero: int) -> Floats:
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes: Floats = np.clip(np.rint(groups * inverse[..., None]), -zero, zero - 1)
    return codes


def _int8_scales(groups: Floats) -> Floats:
    return rounded_to_bf16(_extremes(groups) * np.float32(-1 / 128) + np.float32(0))  # no -0


def _int4_scales(groups: Floats) -> Floats:
    extremes = _extremes(groups)
    best = rounded_to_bf16(extremes * np.float32(-1 / 8) + np.float32(0))
    least = np.full_like(extremes, np.inf)
    for step in range(SCALE_TRIES):
        codes = _codes(groups, extremes / np.float32(-7 - step / 4), TILES["int4"].zero)
        squares = np.square(codes).sum(-1)
        fitted = rounded_to_bf16(
            np.divide((codes * groups).sum(-1), squares, out=np.zeros_like(squares), where=squares != 0)
        )
        with np.errstate(over="ignore"):  # values too large to square keep the first scale
            error = np.square(groups - _codes(groups, fitted, TILES["int4"].zero) * fitted[..., None]).sum(-1)
        better = error < least
        best, least = np.where(better, fitted, best), np.where(better, error, least)
    return best
