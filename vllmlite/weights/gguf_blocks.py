"""What GGUF's tensors are made of: blocks of numbers with scales, to floats, or to our own codes where they agree.

A row is a sequence of blocks. ``d`` is a block's scale and ``m`` its minimum, both float16 (the layouts are ggml's:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). In bytes:

- ``Q8_0``: d, 32 signed codes; ``Q4_0``: d, 32 nibbles (code + 8), the first 16 elements in the low ones;
- ``Q4_1``: d, m, nibbles; ``Q5_0`` (code + 16) and ``Q5_1``: the same with the codes' fifth bits in four bytes;
- ``Q4_K``, ``Q5_K``: 256 elements in 8 groups, each with a scale and a minimum of 6 bits, multiplied by d and m;
- ``Q6_K``: 256 elements of 6 bits (code + 32) in 16 groups with scales of 8 bits, multiplied by d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import HostTensor, QuantizedTensor
from vllmlite.weights.quantized import GROUP, Floats, pack, rounded_to_bf16

Bytes: TypeAlias = NDArray[np.uint8]

NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""What the format's numbers of types are called."""

BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20),
    "Q5_0": (32, 22), "Q5_1": (32, 24), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
"""Elements and bytes of a block of each type that is read here."""

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that need no decoding, and their dtypes."""

KINDS = {"Q8_0": "int8", "Q4_0": "int4"}
"""Types whose codes are those of our own kinds; float16 scales become bfloat16 ones, off by at most 2**-8 of them."""

CHUNK = 1 << 20
"""Elements that are decoded at a time."""


def to_floats(kind: str, shape: tuple[int, ...], data: Bytes, dtype: str) -> HostTensor:
    """A tensor in blocks of ``kind`` as ``dtype``: float32, or rounded to bfloat16 or float16."""
    if kind in FLOATS:
        return HostTensor(FLOATS[kind], shape, data)
    elements, block_bytes = BLOCKS[kind]
    blocks = data.reshape(-1, block_bytes)
    out = np.empty((len(blocks), elements), {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[dtype])
    step = CHUNK // elements
    for start in range(0, len(blocks), step):
        values = _DECODERS[kind](blocks[start : start + step])
        if dtype == "bfloat16":
            values = (rounded_to_bf16(values).view(np.uint32) >> 16).astype(np.uint16)
        out[start : start + step] = values
    return HostTensor(dtype, shape, out.reshape(-1).view(np.uint8))


def to_codes(kind: str, shape: tuple[int, int], data: Bytes) -> QuantizedTensor:
    """A weight ``[out, in]`` in blocks of a ``kind`` in :data:`KINDS`, whose codes stay what they are."""
    blocks = data.reshape(shape[0], shape[1] // GROUP, -1)
    scales = rounded_to_bf16(_halves(blocks[..., :2])[..., 0])
    words = blocks[..., 2:].copy().view("<u4")
    if kind == "Q8_0":
        words ^= np.uint32(0x80808080)  # code + 128
    else:
        nibbles = np.concatenate((words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F), axis=-1)  # quads 0 to 7
        words = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    return pack(KINDS[kind], shape, words, scales)


def _halves(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """The low ones, then the high ones."""
    return np.concatenate((data & 15, data >> 4), axis=-1)


def _q8_0(blocks: Bytes) -> Floats:
    return _halves(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _halves(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8))


def _q4_1(blocks: Bytes) -> Floats:
    scale = _halves(blocks[:, :4])
    return scale[:, :1] * _nibbles(blocks[:, 4:]).astype(np.float32) + scale[:, 1:]


def _five_bits(high: Bytes, low: Bytes) -> Floats:
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    return (_nibbles(low) | fifth << 4).astype(np.float32)


def _q5_0(blocks: Bytes) -> Floats:
    return _halves(blocks[:, :2]) * (_five_bits(blocks[:, 2:6], blocks[:, 6:]) - np.float32(16))


def _q5_1(blocks: Bytes) -> Floats:
    scale = _halves(blocks[:, :4])
    return scale[:, :1] * _five_bits(blocks[:, 4:8], blocks[:, 8:]) + scale[:, 1:]


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """Of the 8 groups of a ``Q4_K`` or ``Q5_K`` block, each ``[blocks, 8, 1]``: 6 bits each in 12 bytes."""
    whole = _halves(blocks[:, :4])
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=1)
    minima = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=1)
    return (whole[:, :1] * scales)[..., None], (whole[:, 1:] * minima)[..., None]


def _q4_k(blocks: Bytes) -> Floats:
    scales, minima = _scales_and_minima(blocks)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (scales * codes - minima).reshape(-1, 256)


def _q5_k(blocks: Bytes) -> Floats:
    scales, minima = _scales_and_minima(blocks)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth << 4
    return (scales * codes - minima).reshape(-1, 256)


def _q6_k(blocks: Bytes) -> Floats:
    low = blocks[:, :128].reshape(-1, 2, 2, 32)  # half, quarter of it, element
    low = np.concatenate((low & 15, low >> 4), axis=2)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    codes = (low | high << 4).astype(np.float32) - np.float32(32)
    scales = blocks[:, 192:208].view(np.int8) * _halves(blocks[:, 208:])
    return (codes.reshape(-1, 16, 16) * scales[..., None]).reshape(-1, 256)


_DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}  # fmt: skip
"""Blocks ``[n, bytes]`` to float32 ``[n, elements]``."""
