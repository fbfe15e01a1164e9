"""Codes of 2 to 8 bits packed into 32-bit words, low bits first, as most quantised checkpoints store them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import Floats, HostTensor


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
    else:  # eight codes are as many bytes as a code has bits
        units = np.pad(data, ((0, 0), (0, -data.shape[1] % bits))).reshape(len(data), -1, bits)
        joined = np.zeros(units.shape[:2], np.uint32)
        for at in range(bits):
            joined |= units[..., at].astype(np.uint32) << np.uint32(8 * at)
        codes = (joined[..., None] >> np.arange(0, 8 * bits, bits, dtype=np.uint32)).astype(np.uint8)
        codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(len(data), -1)[:, :count]


def table_values(codes: NDArray[np.uint8], table: Floats, *, high_first: bool) -> Floats:
    """The values of 4-bit codes, two in each byte of ``codes``, from a table of 16. ``high_first``: the first code of a
    byte is in its high nibble."""
    low, high = np.tile(table, 16), np.repeat(table, 16)
    pairs = np.stack((high, low) if high_first else (low, high), axis=-1).view(np.complex64)[:, 0]
    values: Floats = pairs.take(codes).view(np.float32)
    return values
