"""Weights in 8 to 4 bits: the one layout that checkpoints and backends share, and its reference in numpy.

A weight ``[out, in]`` is cut into groups of :data:`GROUP` elements along ``in``. An element is a scale times (its code
less the kind's zero), plus an offset where the kind has such; what :data:`LAYOUTS` says of a kind is what tells it from
others. Rows are taken :data:`STRIP` at a time and both sizes are filled up, with what means zero, so that a strip is
read from its first byte to its last:

- ``codes`` of 8 bits: uint8 ``[strips, groups, GROUP * STRIP]``, inside a group ``[quad][row][4]``: elements
  ``4 * quad`` to ``4 * quad + 3`` of each row;
- ``codes`` of 4 bits: uint8 ``[strips, groups, GROUP * STRIP / 2]``, inside a group ``[pair][row][4]``: quad
  ``2 * pair`` in the low and ``2 * pair + 1`` in the high nibbles;
- ``codes`` of 5 and 6 bits: their lowest four bits like those of 4 bits; and behind them, inside the group, their
  highest ones ``[part][row][4]``, the first quad's in the lowest bits of the first part's bytes;
- ``scales``: bfloat16 ``[strips, groups, STRIP]``; or float16 ``[strips, units, STRIP]``, with offsets
  ``[strips, units, 2, STRIP]``, a unit being one group, or :data:`UNIT_GROUPS` where there are factors;
- ``factors`` of the scales of a unit: int8 ``[strips, groups, n, STRIP]``, those of a group's one or two scales, and
  behind them its offset's.

``int8`` and ``int4`` are made from floats (symmetric round-to-nearest quantisation; Jacob et al. 2018). An int8 scale
makes the element of the largest magnitude -128. An int4 scale is the one of least squared error among
:data:`SCALE_TRIES` around the one that makes it -8, each fitted to its codes. The other kinds are made of ggml's blocks
(:mod:`vllmlite.weights.gguf_blocks`). Activations meet such weights quantised like an int8 weight a row, with float32
scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import ITEM_SIZE, HostTensor, QuantizedTensor

GROUP = 32
STRIP = 16
UNIT_GROUPS = 8
"""Groups that share a scale which factors multiply."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What tells a kind from others; ``layout_of`` in ``csrc/cpu/kernels.hpp`` has the same."""

    bits: int
    """Of a code: 4, 5, 6 or 8."""
    zero: int
    """The code of nought."""
    dtype: str = "float16"
    """Of scales."""
    offsets: bool = False
    """Whether each group has one."""
    factors: bool = False
    """Whether groups share scales, which whole numbers multiply."""
    sharing: int = GROUP
    """Elements with one scale: a group, or half of one."""

    @property
    def scales_a_group(self) -> int:
        """One or two."""
        return GROUP // self.sharing


LAYOUTS = {
    "int8": Layout(8, 128, "bfloat16"),
    "int4": Layout(4, 8, "bfloat16"),
    "q4_1": Layout(4, 0, offsets=True),
    "q5_0": Layout(5, 16),
    "q5_1": Layout(5, 0, offsets=True),
    "q4_k": Layout(4, 0, offsets=True, factors=True),
    "q5_k": Layout(5, 0, offsets=True, factors=True),
    "q6_k": Layout(6, 32, factors=True, sharing=16),
}
"""Kinds of quantised weights: our own two, and ggml's."""
SCALE_TRIES = 9
QWEIGHT, SCALES = ".qweight", ".scales"
"""What takes the place of ``.weight`` in a checkpoint's tensor names."""

Floats: TypeAlias = NDArray[np.float32]


def stored_shapes(kind: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of the codes, of the scales and, where the kind has them, of the factors of a weight ``[out, in]``."""
    layout = LAYOUTS[kind]
    strips, groups = -(-shape[0] // STRIP), -(-shape[1] // GROUP)
    units = -(-groups // UNIT_GROUPS) if layout.factors else groups
    codes = strips, groups, GROUP * STRIP * layout.bits // 8
    scales = (strips, units, 2, STRIP) if layout.offsets else (strips, units, STRIP)
    if not layout.factors:
        return codes, scales
    return codes, scales, (strips, groups, layout.scales_a_group + layout.offsets, STRIP)


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes that a weight ``[out, in]`` takes."""
    codes, scales, *factors = map(math.prod, stored_shapes(kind, shape))
    return codes + ITEM_SIZE[LAYOUTS[kind].dtype] * scales + sum(factors)


def quantize(weight: Floats, kind: str) -> QuantizedTensor:
    """``weight [out, in]``, whose values must be finite, in ``int8`` or ``int4``."""
    rows, size = weight.shape
    groups = np.pad(weight, ((0, 0), (0, -size % GROUP))).reshape(rows, -1, GROUP)
    scales = _int8_scales(groups) if kind == "int8" else _int4_scales(groups)
    zero = LAYOUTS[kind].zero
    codes = (_codes(groups, scales, zero) + zero).astype(np.uint8)
    return pack(kind, (rows, size), codes, scales[..., None])


def pack(
    kind: str,
    shape: tuple[int, int],
    codes: NDArray[np.uint8],
    scales: Floats,
    factors: NDArray[np.int8] | None = None,
) -> QuantizedTensor:
    """A weight ``[out, in]`` from its codes ``[out, groups, GROUP]``, its scales ``[out, units, 1]`` or with offsets
    ``[out, units, 2]``, of no more digits than their dtype has, and its factors ``[out, groups, n]``."""
    parts = _parts(LAYOUTS[kind], codes)
    nought = _parts(LAYOUTS[kind], np.full((1, 1, GROUP), LAYOUTS[kind].zero, np.uint8))
    return quantized_tensor(
        kind,
        shape,
        _in_strips(parts.view("<u4")[..., 0], nought.view("<u4")[..., 0]).view(np.uint8),
        _in_strips(scales),
        None if factors is None else _in_strips(factors),
    )


def quantized_tensor(
    kind: str,
    shape: tuple[int, int],
    codes: NDArray[np.uint8],
    scales: Floats,
    factors: NDArray[np.int8] | None = None,
) -> QuantizedTensor:
    """A weight ``[out, in]`` from codes, scales (of no more digits than their dtype has) and factors in the order of
    the layout."""
    dtype = LAYOUTS[kind].dtype
    code_shape, scale_shape, *factor_shape = stored_shapes(kind, shape)
    if dtype == "bfloat16":
        bits = (np.ascontiguousarray(scales).view(np.uint32) >> 16).astype("<u2")
    else:
        bits = scales.astype("<f2").view("<u2")
    return QuantizedTensor(
        kind,
        shape,
        HostTensor("uint8", code_shape, np.ascontiguousarray(codes).reshape(-1)),
        HostTensor(dtype, scale_shape, bits.reshape(-1).view(np.uint8)),
        None if factors is None else HostTensor("int8", factor_shape[0], factors.reshape(-1).view(np.uint8)),
    )


def unpack(weight: QuantizedTensor) -> tuple[NDArray[np.int8], Floats, Floats | None]:
    """Codes less their zero, int8 ``[out, n, elements with one scale]``, scales float32 ``[out, n]`` and offsets
    float32 ``[out, groups]`` where there are such."""
    layout = LAYOUTS[weight.kind]
    rows, strips = weight.shape[0], weight.codes.shape[0]
    stored = weight.codes.data.reshape(strips, -1, GROUP * layout.bits // 32, STRIP, 4)
    codes = _rows(_quads(layout, stored), rows).astype(np.int16) - layout.zero
    bits = weight.scales.data.view("<u2")
    wide = (bits.astype(np.uint32) << 16).view(np.float32) if layout.dtype == "bfloat16" else bits.view("<f2")
    found = _rows(wide.astype(np.float32).reshape(strips, -1, 1 + layout.offsets, STRIP), rows)
    scales, offsets = found[..., :1], found[..., 1:]
    if weight.factors is not None:
        by = _rows(weight.factors.data.view(np.int8).reshape(*weight.factors.shape), rows)
        scales, offsets = (np.repeat(one, UNIT_GROUPS, 1)[:, : by.shape[1]] for one in (scales, offsets))
        scales = scales * by[..., : layout.scales_a_group]
        offsets = offsets * by[..., layout.scales_a_group :] if layout.offsets else offsets
    return (
        codes.astype(np.int8).reshape(rows, -1, layout.sharing),
        np.ascontiguousarray(scales.reshape(rows, -1)),
        offsets.reshape(rows, -1) if layout.offsets else None,
    )


def dequantize(weight: QuantizedTensor) -> Floats:
    """The weight ``[out, in]``."""
    codes, scales, offsets = unpack(weight)
    whole: Floats = np.multiply(codes, scales[..., None], dtype=np.float32).reshape(len(codes), -1)
    if offsets is not None:
        whole = whole + np.repeat(offsets, GROUP, axis=1)
    return whole[:, : weight.shape[1]]


def _parts(layout: Layout, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes ``[out, groups, GROUP]`` as a row's share of the layout, ``[out, groups, parts, 4]``."""
    quads = codes.reshape(*codes.shape[:2], GROUP // 4, 4)
    if layout.bits == 8:
        return np.ascontiguousarray(quads)
    low: NDArray[np.uint8] = quads[:, :, ::2] & np.uint8(15) | quads[:, :, 1::2] << np.uint8(4)
    high = layout.bits - 4
    if high == 0:
        return low
    shifts = np.arange(0, 8, high, dtype=np.uint8)[:, None]
    split = (quads >> 4).reshape(*quads.shape[:2], -1, len(shifts), 4)
    return np.concatenate((low, np.bitwise_or.reduce(split << shifts, axis=3)), axis=2)


def _quads(layout: Layout, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes ``[strips, groups, GROUP / 4, STRIP, 4]`` of parts ``[strips, groups, parts, STRIP, 4]``."""
    if layout.bits == 8:
        return stored
    low, rest = stored[:, :, : GROUP // 8], stored[:, :, GROUP // 8 :, None]
    quads = np.stack((low & 15, low >> 4), axis=3).reshape(*low.shape[:2], -1, STRIP, 4)
    high = layout.bits - 4
    if high == 0:
        return quads
    shifts = np.arange(0, 8, high, dtype=np.uint8)[:, None, None]
    highest: NDArray[np.uint8] = rest >> shifts & np.uint8((1 << high) - 1)
    joined: NDArray[np.uint8] = quads | highest.reshape(quads.shape) << np.uint8(4)
    return joined


def _in_strips(values: NDArray[Any], filling: NDArray[Any] | None = None) -> NDArray[Any]:
    """``[rows, groups, n]`` as ``[strips, groups, n, STRIP]``, filled up with ``filling [1, 1, n]``, or zeros."""
    missing = -len(values) % STRIP, *values.shape[1:]
    padding = np.zeros(missing, values.dtype) if filling is None else np.broadcast_to(filling, missing)
    padded = np.concatenate((values, padding)).reshape(-1, STRIP, *values.shape[1:])
    return np.ascontiguousarray(padded.transpose(0, 2, 3, 1))


def _rows(values: NDArray[Any], rows: int) -> NDArray[Any]:
    """``[strips, groups, n, STRIP, ...]`` as ``[rows, groups, n, ...]``."""
    return np.moveaxis(values, 3, 1).reshape(-1, *values.shape[1:3], *values.shape[4:])[:rows]


def _extremes(groups: Floats) -> Floats:
    """Of each group the element of the largest magnitude, the positive one of two."""
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
        codes = _codes(groups, extremes / np.float32(-7 - step / 4), LAYOUTS["int4"].zero)
        squares = np.square(codes).sum(-1)
        fitted = rounded_to_bf16(
            np.divide((codes * groups).sum(-1), squares, out=np.zeros_like(squares), where=squares != 0)
        )
        with np.errstate(over="ignore"):  # what is too large to be squared is left to the first scale
            error = np.square(groups - _codes(groups, fitted, LAYOUTS["int4"].zero) * fitted[..., None]).sum(
                -1
            )
        better = error < least
        best, least = np.where(better, fitted, best), np.where(better, error, least)
    return best


def rounded_to_bf16(values: Floats) -> Floats:
    """Finite or infinite numbers to the nearest bfloat16, even ones between two."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
