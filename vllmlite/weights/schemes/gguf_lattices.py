"""Decoders of ggml's types that have no tile scheme: blocks of bytes to floats.

Codes are small numbers (``Q2_K``, ``Q3_K``, ``TQ1_0``, ``TQ2_0``), indices into a table (``IQ4_NL``, ``IQ4_XS``,
``MXFP4``), or indices into a grid of points of 8 or 4 elements with separately stored signs (the other ``IQ`` types;
the points of ``IQ1`` are signed, and 1/8 is added to or subtracted from every element). Blocks have 256 elements in
groups of 16 or 32 with a scale each, multiplied by the block's own float16 scale; or they have 32 elements. The
layouts are ggml's: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.schemes.gguf_grids import grid

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.unsignedinteger]

IQ4 = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)
"""Levels of ``IQ4_NL`` and ``IQ4_XS``."""
E2M1 = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)
"""The values of e2m1 floats (2 bits of exponent, 1 of mantissa), doubled."""
EIGHTH = np.float32(0.125)


def _half(blocks: Bytes, at: int) -> Floats:
    """Return the float16 number at byte ``at`` of each block, as ``[n, 1, 1]``."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)[:, :, None]


def _words(part: Bytes, dtype: str) -> Codes:
    """Return the bytes as numbers ``[n, m]`` of two or four bytes."""
    found: Codes = np.ascontiguousarray(part).view(dtype)
    return found


def _fields(numbers: Codes, width: int, count: int) -> Codes:
    """Return the ``count`` lowest fields of ``width`` bits of each number, lowest first, along a new last axis."""
    shifts = np.arange(0, width * count, width, dtype=numbers.dtype)
    found: Codes = numbers[..., None] >> shifts & numbers.dtype.type((1 << width) - 1)
    return found


def _rows(part: Bytes, width: int, size: int) -> Codes:
    """Return ``width``-bit fields of runs of ``size`` bytes as ``[n, runs, fields, size]``, lowest fields first."""
    found: Codes = _fields(part.reshape(len(part), -1, size), width, 8 // width).swapaxes(-1, -2)
    return found


@cache
def _signs() -> Floats:
    """Return ``[256, 8]``: -1 for each set bit of a byte and +1 for each clear one, lowest bit first."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.float32(-1), np.float32(1))


@cache
def _even_signs() -> Floats:
    """Return ``[128, 8]``: signs by 7 bits; the eighth sign makes the number of minus signs even."""
    return np.stack([_signs()[code | code.bit_count() % 2 << 7] for code in range(128)])


def _q2_k(blocks: Bytes) -> Floats:
    nibbles = _fields(blocks[:, :16, None], 4, 2).astype(np.float32)
    codes = _rows(blocks[:, 16:80], 2, 32).reshape(-1, 16, 16)
    values: Floats = _half(blocks, 80) * nibbles[..., 0] * codes - _half(blocks, 82) * nibbles[..., 1]
    return values


def _q3_k(blocks: Bytes) -> Floats:
    low = _fields(blocks[:, 96:104], 4, 2).swapaxes(1, 2).reshape(-1, 16)
    high = _fields(blocks[:, 104:108], 2, 4).swapaxes(1, 2).reshape(-1, 16)
    scales = (low | high << np.uint8(4)).astype(np.float32)[..., None] - 32
    codes = _rows(blocks[:, 32:96], 2, 32).reshape(-1, 8, 32)
    codes = codes | _rows(blocks[:, :32], 1, 32).reshape(-1, 8, 32) << np.uint8(2)
    return _half(blocks, 108) * scales * (codes.reshape(-1, 16, 16).astype(np.float32) - 4)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * IQ4.take(_rows(blocks[:, 2:], 4, 16).reshape(-1, 1, 32))


def _iq4_xs(blocks: Bytes) -> Floats:
    low = _fields(blocks[:, 4:8], 4, 2).reshape(-1, 8)
    high = _fields(_words(blocks[:, 2:4], "<u2"), 2, 8).reshape(-1, 8)
    scales = (low | high << 4).astype(np.float32)[..., None] - 32
    return _half(blocks, 0) * scales * IQ4.take(_rows(blocks[:, 8:], 4, 16).reshape(-1, 8, 32))


def _mxfp4(blocks: Bytes) -> Floats:
    scales = np.ldexp(np.float32(1), blocks[:, :1, None].astype(np.int32) - 128)
    return scales * E2M1.take(_rows(blocks[:, 1:], 4, 16).reshape(-1, 1, 32))


def _iq2_xxs(blocks: Bytes) -> Floats:
    words = _words(blocks[:, 2:], "<u4").reshape(-1, 8, 2)
    scales = _half(blocks, 0) * (words[..., 1:] >> 28).astype(np.float32) + _half(blocks, 0) / 2
    points = grid("IQ2_XXS")[_fields(words[..., 0], 8, 4)] * _even_signs()[_fields(words[..., 1], 7, 4)]
    return scales / 4 * points.reshape(-1, 8, 32)


def _iq2_xs(blocks: Bytes) -> Floats:
    words = _words(blocks[:, 2:66], "<u2")
    points = grid("IQ2_XS")[words & 511] * _even_signs()[words >> 9]
    values: Floats = _nibble_scales(blocks, 66) / 4 * points.reshape(-1, 16, 16)
    return values


def _iq2_s(blocks: Bytes) -> Floats:
    high = _fields(blocks[:, 66:74], 2, 4).reshape(-1, 32).astype(np.uint16)
    points = grid("IQ2_S")[blocks[:, 2:34] | high << 8] * _signs()[blocks[:, 34:66]]
    values: Floats = _nibble_scales(blocks, 74) / 4 * points.reshape(-1, 16, 16)
    return values


def _nibble_scales(blocks: Bytes, at: int) -> Floats:
    """Return the group scales ``[n, 16, 1]``: the block's scale times (nibble + 0.5), with nibbles from byte ``at``
    on."""
    nibbles = _fields(blocks[:, at : at + 8], 4, 2).reshape(-1, 16, 1)
    return _half(blocks, 0) * (nibbles + np.float32(0.5))


def _iq3_xxs(blocks: Bytes) -> Floats:
    words = _words(blocks[:, 66:], "<u4")
    scales = _half(blocks, 0) * ((words >> 28).astype(np.float32) + np.float32(0.5))[..., None]
    points = grid("IQ3_XXS")[blocks[:, 2:66]].reshape(-1, 8, 4, 8) * _even_signs()[_fields(words, 7, 4)]
    return scales / 2 * points.reshape(-1, 8, 32)


def _iq3_s(blocks: Bytes) -> Floats:
    scales = _half(blocks, 0) * (2 * _fields(blocks[:, 106:], 4, 2).reshape(-1, 8, 1) + np.float32(1))
    high = _fields(blocks[:, 66:74], 1, 8).reshape(-1, 64).astype(np.uint16)
    points = grid("IQ3_S")[blocks[:, 2:66] | high << 8].reshape(-1, 32, 8) * _signs()[blocks[:, 74:106]]
    values: Floats = scales * points.reshape(-1, 8, 32)
    return values


def _iq1_s(blocks: Bytes) -> Floats:
    words = _words(blocks[:, 34:], "<u2")
    scales = _half(blocks, 0) * (2 * (words >> 12 & 7) + np.float32(1))[..., None]
    shift = np.where(words >> 15, -EIGHTH, EIGHTH)[..., None]
    points = grid("IQ1_S")[blocks[:, 2:34] | _fields(words, 3, 4).reshape(-1, 32) << 8]
    values: Floats = scales * (points.reshape(-1, 8, 32) + shift)
    return values


def _iq1_m(blocks: Bytes) -> Floats:
    words = _words(blocks[:, 48:], "<u2")
    half = (words >> 12) << np.arange(0, 16, 4, dtype=np.uint16)
    d = np.bitwise_or.reduce(half, axis=1).astype("<u2").view("<f2").astype(np.float32)[:, None, None]
    scales = d * (2 * _fields(words, 3, 4).reshape(-1, 16, 1) + np.float32(1))
    nibbles = _fields(blocks[:, 32:48], 4, 2).reshape(-1, 32)
    shift = np.where(nibbles >> 3, -EIGHTH, EIGHTH)[..., None]
    points = grid("IQ1_S")[blocks[:, :32] | (nibbles & 7).astype(np.uint16) << 8] + shift
    values: Floats = scales * points.reshape(-1, 16, 16)
    return values


def _tq1_0(blocks: Bytes) -> Floats:
    """Decode base-3 digits, five per byte. A byte is the number times 256/243; each digit is the carry of a times 3."""
    runs = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    digits = [
        (part[:, None] * (3 ** np.arange(count, dtype=np.uint8))[:, None]).reshape(len(part), -1)
        for part, count in runs
    ]
    codes = np.concatenate(digits, axis=1).astype(np.uint16) * 3 >> 8
    return _half(blocks, 52) * (codes.astype(np.float32) - 1)[:, None]


def _tq2_0(blocks: Bytes) -> Floats:
    codes = _rows(blocks[:, :64], 2, 32).reshape(-1, 1, 256)
    return _half(blocks, 64) * (codes.astype(np.float32) - 1)


DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "Q2_K": _q2_k, "Q3_K": _q3_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4, "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs, "IQ3_S": _iq3_s, "IQ1_S": _iq1_s, "IQ1_M": _iq1_m,
    "TQ1_0": _tq1_0, "TQ2_0": _tq2_0,
}  # fmt: skip
"""Functions from blocks ``[n, bytes]`` to their elements in order as floats, by type."""
