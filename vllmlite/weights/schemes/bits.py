"""Codes of 2 to 8 bits packed into 32-bit words, low bits first, as most quantised checkpoints store them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import HostTensor


def words(tensor: HostTensor) -> NDArray[np.uint32]:
    """The elements of an int32 tensor, unsigned."""
    return tensor.data.view("<u4").reshape(tensor.shape)


def unpack_rows(packed: NDArray[np.uint32], bits: int, count: int) -> NDArray[np.uint8]:
    """The first ``count`` codes of each row of ``packed [rows, words]``: uint8 ``[rows, count]``. Codes of 3 bits lie
    across the bounds of words."""
    data = np.ascontiguousarray(packed, "<u4").view(np.uint8).reshape(len(packed), -1)
    if bits == 8:
        return np.ascontiguousarray(data[:, :count])
    if bits == 4:
        codes = np.stack((data & np.uint8(15), data >> np.uint8(4)), axis=-1)
        return codes.reshape(len(data), -1)[:, :count]
    single = np.unpackbits(data, axis=1, bitorder="little")
    codes = single[:, : count * bits].reshape(len(data), count, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    summed: NDArray[np.uint8] = (codes * weights).sum(-1, dtype=np.uint8)
    return summed


def pack_rows(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint32]:
    """The inverse of :func:`unpack_rows`: uint32 ``[rows, words]``; the last word of a row is padded with zeros."""
    rows, count = codes.shape
    single = (codes[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(rows, count * bits)
    padded = np.pad(single, ((0, 0), (0, -single.shape[1] % 32)))
    packed: NDArray[np.uint32] = np.packbits(padded, axis=1, bitorder="little").view("<u4")
    return packed
