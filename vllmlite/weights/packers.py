"""Pack weights that have been rounded to integers: the inverse of each scheme's ``dequantize``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.weights.host import (
    Floats,
    HostTensor,
    PackedWeight,
    Part,
    Scheme,
    Shape,
    float_tensor,
    rounded_to_bf16,
)
from vllmlite.weights.schemes import tiles
from vllmlite.weights.schemes.awq import AwqScheme
from vllmlite.weights.schemes.codes import AWQ_NIBBLES, AWQ_ROWS
from vllmlite.weights.schemes.compressed import PackedIntScheme
from vllmlite.weights.schemes.float8 import Float8Scheme, float8
from vllmlite.weights.schemes.gguf_blocks import BlockScheme
from vllmlite.weights.schemes.gptq import GptqScheme
from vllmlite.weights.schemes.tiles import GROUP, TileScheme

Codes = NDArray[np.uint8]

SCALE_DTYPE = "float16"
"""Dtype in which the scales of AWQ, GPTQ, compressed-tensors and GGUF are written."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight ``[out, in]`` rounded to integers: an element is (code - zero) * scale of its group of columns."""

    codes: Codes
    """``[out, in]``, unsigned."""
    scales: Floats
    """``[out, groups]``."""
    zeros: Codes
    """``[out, groups]``, unsigned."""
    group_of: NDArray[np.int64] | None = None
    """``[in]``: the group of each column; None if the groups are runs of equally many columns."""

    def values(self) -> Floats:
        """Return the dequantised weight, float32 ``[out, in]``."""
        index = self.group_of
        if index is None:
            size = self.codes.shape[1] // self.scales.shape[1]
            index = np.arange(self.codes.shape[1]) // size
        found: Floats = (self.codes - self.zeros.astype(np.float32)[:, index]) * self.scales[:, index]
        return found


def stored_scales(scheme: Scheme, scales: Floats) -> Floats:
    """Return ``scales`` rounded to the dtype in which ``scheme`` stores them."""
    if isinstance(scheme, TileScheme):
        return rounded_to_bf16(np.ascontiguousarray(scales, np.float32))
    with np.errstate(over="ignore"):
        return scales.astype(np.float16).astype(np.float32)


def packed(weight: Rounded, scheme: Scheme) -> PackedWeight:
    """Return ``weight`` as ``scheme`` stores it, with scales rounded by :func:`stored_scales`. Raises ModelError for
    scales that overflow, and for a scheme that does not store integers."""
    pack = _PACKERS.get(type(scheme))
    if pack is None:
        raise ModelError(f"{scheme.name}: integers with scales cannot be stored in this scheme")
    scales = stored_scales(scheme, weight.scales)
    if not np.isfinite(scales).all():
        raise ModelError(f"a scale of {np.abs(weight.scales).max():.4g} overflows {SCALE_DTYPE}")
    rows, columns = weight.codes.shape
    return pack(Rounded(weight.codes, scales, weight.zeros, weight.group_of), scheme, (rows, columns))


def packed_float8(weight: Floats, scales: Floats, scheme: Float8Scheme) -> PackedWeight:
    """Return ``weight / scales`` in e4m3 with these ``scales``, whose shape is that of the scheme's granularity."""
    rows, columns = weight.shape
    if scheme.granularity == "block":
        wide = np.repeat(scales, scheme.block[1], axis=1)[:, :columns]
        wide = np.repeat(wide, scheme.block[0], axis=0)[:rows]
    else:
        wide = scales.reshape(-1, 1)
    parts = {
        "weight": HostTensor("float8_e4m3", (rows, columns), float8(weight / wide).reshape(-1)),
        scheme.scale: float_tensor(np.ascontiguousarray(scales, np.float32), "float32"),
    }
    return PackedWeight(scheme, (rows, columns), parts)


def _integers(values: NDArray[Any], dtype: str = "int32") -> HostTensor:
    numpy_dtype = {"int32": "<i4", "int64": "<i8"}[dtype]
    elements = np.ascontiguousarray(values.astype(numpy_dtype))
    return HostTensor(dtype, values.shape, elements.reshape(-1).view(np.uint8))


def _words(codes: Codes, bits: int) -> NDArray[np.int32]:
    """Return rows of codes as streams of bits in words, low bits first: int32 ``[rows, ceil(n * bits / 32)]``."""
    single = np.ascontiguousarray(codes)[..., None]
    stream = np.unpackbits(single, axis=-1, count=bits, bitorder="little").reshape(len(codes), -1)
    data = np.packbits(np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32))), axis=1, bitorder="little")
    packed_words: NDArray[np.int32] = data.view("<i4")
    return packed_words


def _awq_words(codes: Codes) -> NDArray[np.int32]:
    """Return the codes ``[rows, n]`` in AWQ's words ``[n, rows / 8]``."""
    eights = codes.reshape(-1, AWQ_ROWS, codes.shape[1]).astype(np.uint32)
    shifts = np.array(AWQ_NIBBLES, np.uint32)[:, None] * np.uint32(4)
    found: NDArray[np.uint32] = np.bitwise_or.reduce(eights << shifts, axis=1)
    return found.T.view(np.int32)


def _awq(weight: Rounded, scheme: AwqScheme, shape: tuple[int, int]) -> PackedWeight:
    parts = {
        "qweight": _integers(_awq_words(weight.codes)),
        "qzeros": _integers(_awq_words(weight.zeros)),
        "scales": float_tensor(np.ascontiguousarray(weight.scales.T), SCALE_DTYPE),
    }
    return PackedWeight(scheme, shape, parts)


def _gptq(weight: Rounded, scheme: GptqScheme, shape: tuple[int, int]) -> PackedWeight:
    zeros = weight.zeros
    if scheme.version == 1:
        zeros = (zeros - np.uint8(1)) & np.uint8((1 << scheme.bits) - 1)
    index = weight.group_of
    if index is None:
        index = np.arange(shape[1]) // (scheme.group_size or shape[1])
    parts = {
        "qweight": _integers(_words(weight.codes, scheme.bits).T),
        "qzeros": _integers(_words(zeros.T, scheme.bits)),
        "scales": float_tensor(np.ascontiguousarray(weight.scales.T), SCALE_DTYPE),
        "g_idx": _integers(index),
    }
    return PackedWeight(scheme, shape, parts)


def _packed_ints(weight: Rounded, scheme: PackedIntScheme, shape: tuple[int, int]) -> PackedWeight:
    parts = {
        "weight_packed": _integers(_words(weight.codes, scheme.bits)),
        "weight_scale": float_tensor(weight.scales, SCALE_DTYPE),
        "weight_shape": _integers(np.array(shape), "int64"),
    }
    if not scheme.symmetric:
        parts["weight_zero_point"] = _integers(_words(weight.zeros.T, scheme.bits).T)
    if not scheme.ordered and weight.group_of is not None:
        parts["weight_g_idx"] = _integers(weight.group_of)
    return PackedWeight(scheme, shape, parts)


def _tiles(weight: Rounded, scheme: TileScheme, shape: tuple[int, int]) -> PackedWeight:
    codes = weight.codes.reshape(shape[0], -1, GROUP)
    return tiles.pack(scheme, shape, codes, weight.scales[..., None])


def _blocks(weight: Rounded, scheme: BlockScheme, shape: tuple[int, int]) -> PackedWeight:
    codes = weight.codes.reshape(-1, GROUP)
    if scheme.name == "Q8_0":
        codes = codes ^ np.uint8(128)
    else:
        codes = codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << np.uint8(4)
    scales = weight.scales.astype("<f2").reshape(-1, 1).view(np.uint8)
    return scheme.pack(shape, np.concatenate((scales, codes), axis=1).reshape(-1))


_PACKERS: dict[type[Scheme], Callable[[Rounded, Any, tuple[int, int]], PackedWeight]] = {
    AwqScheme: _awq,
    GptqScheme: _gptq,
    PackedIntScheme: _packed_ints,
    TileScheme: _tiles,
    BlockScheme: _blocks,
}


def written_parts(scheme: Scheme, shape: Shape) -> dict[str, Part]:
    """Return suffixes, shapes and dtypes of the tensors that :func:`packed` and :func:`packed_float8` make of a weight
    of ``shape``, before they exist. Raises ModelError for a shape that the scheme cannot store."""
    parts = {
        suffix: part
        for suffix, part in scheme.parts(shape).items()
        if not part.optional or (suffix == "g_idx" and isinstance(scheme, GptqScheme))
    }
    if isinstance(scheme, AwqScheme | GptqScheme | PackedIntScheme):
        suffix = "weight_scale" if isinstance(scheme, PackedIntScheme) else "scales"
        parts[suffix] = Part(parts[suffix].shape, SCALE_DTYPE)
    return parts
