"""Quantised weights of 2 to 8 bits packed into 32-bit words, low bits first, as in most quantised checkpoints."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import Floats, HostTensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of the 16 codes of e2m1, a float of 4 bits."""


def words(tensor: HostTensor) -> NDArray[np.uint32]:
    """Return the elements of an int32 tensor as uint32."""
    return tensor.data.view("<u4").reshape(tensor.shape)


def row_bytes(packed: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Return the bytes ``[rows, 4 * words]`` of rows of words."""
    return np.ascontiguousarray(packed, "<u4").view(np.uint8).reshape(len(packed), -1)


def pack_rows(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return codes ``[rows, count]`` of 4 or 8 bits packed in bytes, low bits first."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    packed: NDArray[np.uint8] = even[:, ::2] | even[:, 1::2] << np.uint8(4)
    return packed


def unpack_rows(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Return the first ``count`` codes of each row of ``data [rows, bytes]``: uint8 ``[rows, count]``. Codes of 3 bits
    may lie in two bytes."""
    if bits == 8:
        return np.ascontiguousarray(data[:, :count])
    if bits == 4:
        codes = np.stack((data & np.uint8(15), data >> np.uint8(4)), axis=-1)
    else:  # eight codes are as many bytes as a code has bits
        units = np.pad(data, ((0, 0), (0, -data.shape[1] % bits))).reshape(len(data), -1, bits)
        joined = np.zeros(units.shape[:2], np.uint32)
        for at in range(bits):
            joined |= units[..., at].astype(np.uint32) << np.uint32(8 * at)
        codes = (joined[..., None] >> np.arange(0, 8 * bits, bits, dtype=np.uint32)).astype(np.uint8)
        codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(len(data), -1)[:, :count]


def table_values(codes: NDArray[np.uint8], table: Floats, *, high_first: bool) -> Floats:
    """Return the values of 4-bit codes, two per byte of ``codes``, looked up in a table of 16.

    ``high_first``: the first code of a byte is in its high nibble."""
    low, high = np.tile(table, 16), np.repeat(table, 16)
    pairs = np.stack((high, low) if high_first else (low, high), axis=-1).view(np.complex64)[:, 0]
    values: Floats = pairs.take(codes).view(np.float32)
    return values
