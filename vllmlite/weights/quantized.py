"""Weights in 8 or 4 bits: the one layout that checkpoints and backends share, and its reference in numpy.

A weight ``[out, in]`` is cut into groups of :data:`GROUP` elements along ``in``, each with a bfloat16 scale; an element
is its group's scale times a signed code (symmetric round-to-nearest quantisation; Jacob et al. 2018). Rows are taken
:data:`STRIP` at a time and both sizes are filled up with zeros, so that a strip is read from its first byte to its
last:

- ``scales``: bfloat16 ``[strips, groups, STRIP]``;
- ``codes`` of ``int8``: uint8 ``[strips, groups, GROUP * STRIP]``, inside a group ``[quad][row][4]``: elements
  ``4 * quad`` to ``4 * quad + 3`` of each row, as code + 128;
- ``codes`` of ``int4``: uint8 ``[strips, groups, GROUP * STRIP / 2]``, inside a group ``[pair][row][4]``: quad
  ``2 * pair`` in the low and ``2 * pair + 1`` in the high nibbles, as code + 8.

An int8 scale makes the element of the largest magnitude -128. An int4 scale is the one of least squared error among
:data:`SCALE_TRIES` around the one that makes it -8, each fitted to its codes. Activations meet such weights quantised
like an int8 weight a row, with float32 scales.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import HostTensor, QuantizedTensor

GROUP = 32
STRIP = 16
ZERO = {"int8": 128, "int4": 8}
"""The stored code of nought, by kind: codes reach from minus this to one less than it."""
ZERO_WORD = {"int8": 0x80808080, "int4": 0x88888888}
"""Four, or eight, of them."""
SCALE_TRIES = 9
QWEIGHT, SCALES = ".qweight", ".scales"
"""What takes the place of ``.weight`` in a checkpoint's tensor names."""

Floats: TypeAlias = NDArray[np.float32]


def stored_shapes(kind: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and of the scales of a weight ``[out, in]``."""
    strips, groups = -(-shape[0] // STRIP), -(-shape[1] // GROUP)
    return (strips, groups, GROUP * STRIP * (2 if kind == "int8" else 1) // 2), (strips, groups, STRIP)


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of codes and scales of a weight ``[out, in]``."""
    codes, scales = stored_shapes(kind, shape)
    return math.prod(codes) + 2 * math.prod(scales)


def quantize(weight: Floats, kind: str) -> QuantizedTensor:
    """``weight [out, in]``, whose values must be finite, in ``kind``."""
    rows, size = weight.shape
    padded = np.pad(weight, ((0, -rows % STRIP), (0, -size % GROUP))).reshape(
        -1, STRIP, -(-size // GROUP), GROUP
    )
    scales = _int8_scales(padded) if kind == "int8" else _int4_scales(padded)
    codes = _codes(padded, scales, ZERO[kind])
    stored = (codes + ZERO[kind]).astype(np.uint8).reshape(-1, scales.shape[-1], GROUP)
    quads = stored.view("<u4")
    words = quads if kind == "int8" else quads[..., ::2] | quads[..., 1::2] << 4
    return pack(kind, (rows, size), words[:rows], scales.reshape(-1, scales.shape[-1])[:rows])


def pack(kind: str, shape: tuple[int, int], words: NDArray[np.uint32], scales: Floats) -> QuantizedTensor:
    """A weight ``[out, in]`` from its stored codes, row by row, and its scales float32 ``[out, groups]``, of no more
    digits than bfloat16 has. ``words [out, groups, words of a group]`` are the layout's ``[4]``, little-endian."""
    rows, groups, size = words.shape
    strips = -(-rows // STRIP)
    codes = np.full((strips, groups * size, STRIP), ZERO_WORD[kind], "<u4")
    ordered = np.zeros((strips, groups, STRIP), np.float32)
    for source, target in ((words.reshape(rows, -1), codes), (scales, ordered)):
        whole = rows // STRIP
        target[:whole] = source[: whole * STRIP].reshape(whole, STRIP, source.shape[1]).swapaxes(1, 2)
        if whole < strips:
            target[whole, :, : rows % STRIP] = source[whole * STRIP :].T
    return quantized_tensor(kind, shape, codes.view(np.uint8), ordered)


def quantized_tensor(
    kind: str, shape: tuple[int, int], codes: NDArray[np.uint8], scales: Floats
) -> QuantizedTensor:
    """A weight ``[out, in]`` from codes and scales (of no more digits than bfloat16 has) in the order of the layout."""
    code_shape, scale_shape = stored_shapes(kind, shape)
    bits = np.ascontiguousarray(scales).view(np.uint32) >> 16
    return QuantizedTensor(
        kind,
        shape,
        HostTensor("uint8", code_shape, np.ascontiguousarray(codes).reshape(-1)),
        HostTensor("bfloat16", scale_shape, bits.astype("<u2").reshape(-1).view(np.uint8)),
    )


def unpack(weight: QuantizedTensor) -> tuple[NDArray[np.int8], Floats]:
    """Codes int8 ``[out, groups, GROUP]`` and scales float32 ``[out, groups]``."""
    strips, groups, _ = weight.codes.shape
    stored = weight.codes.data.reshape(strips, groups, -1, STRIP, 4)
    if weight.kind == "int4":
        stored = np.stack((stored & 15, stored >> 4), axis=3).reshape(strips, groups, -1, STRIP, 4)
    codes = stored.transpose(0, 3, 1, 2, 4).reshape(strips * STRIP, groups, GROUP)
    bits = weight.scales.data.view("<u2").astype(np.uint32) << 16
    scales = bits.view(np.float32).reshape(strips, groups, STRIP).transpose(0, 2, 1).reshape(-1, groups)
    rows = weight.shape[0]
    signed = (codes[:rows].astype(np.int16) - ZERO[weight.kind]).astype(np.int8)
    return signed, np.ascontiguousarray(scales[:rows])


def dequantize(weight: QuantizedTensor) -> Floats:
    """The weight ``[out, in]``."""
    codes, scales = unpack(weight)
    whole: Floats = np.multiply(codes, scales[..., None], dtype=np.float32)
    trimmed: Floats = whole.reshape(len(codes), -1)[:, : weight.shape[1]]
    return trimmed


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
        codes = _codes(groups, extremes / np.float32(-7 - step / 4), ZERO["int4"])
        squares = np.square(codes).sum(-1)
        fitted = rounded_to_bf16(
            np.divide((codes * groups).sum(-1), squares, out=np.zeros_like(squares), where=squares != 0)
        )
        with np.errstate(over="ignore"):  # what is too large to be squared is left to the first scale
            error = np.square(groups - _codes(groups, fitted, ZERO["int4"]) * fitted[..., None]).sum(-1)
        better = error < least
        best, least = np.where(better, fitted, best), np.where(better, error, least)
    return best


def rounded_to_bf16(values: Floats) -> Floats:
    """Finite or infinite numbers to the nearest bfloat16, even ones between two."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
