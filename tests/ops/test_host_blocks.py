"""Copies of whole blocks between a key/value cache and host memory, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from op_backends import numbers, put
from paged import Paged

from vllmlite.backends.base import Backend
from vllmlite.backends.kv_cache import KV_DTYPES, KVSpec


def ids(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, np.int32)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_blocks_come_back_as_they_were(exact: Backend, kv_dtype: str) -> None:
    """Attention reads the same from a block that was saved, overwritten and loaded, and its neighbours keep theirs."""
    spec = KVSpec(3, 1, 24, 3, kv_dtype)
    paged = Paged(exact, spec, num_blocks=12, max_slots=2)
    host = exact.host_blocks(paged.kv, spec, 7)
    assert host.memory.shape[1] >= exact.kv_bytes_per_block(spec)
    for slot in range(2):
        paged.admit(slot)
    batch = paged.upload(paged.batch(range(2), [8, 7]))
    q = [
        exact.attn_prep(put(exact, numbers((15, 3 * 24), layer)), 1, None, paged.kv, layer, batch)
        for layer in range(3)
    ]

    def read() -> list[bytes]:
        found = [exact.paged_attention(x, paged.kv, layer, batch, 0.2) for layer, x in enumerate(q)]
        return [exact.to_host(each).tobytes() for each in found]

    before, blocks = read(), np.array(paged.owned[0], np.int32)
    host.save(blocks, ids(5, 0, 2))
    host.wait()
    host.memory[3] = 1
    host.load(ids(3, 3), blocks[1:])
    assert all(was != now for was, now in zip(before, read(), strict=True))
    host.load(ids(0, 2), blocks[1:])
    assert read() == before
    host.save(blocks[::-1].copy(), ids(1, 4, 6))
    host.join()
    host.wait()
    np.testing.assert_array_equal(host.memory[[1, 4, 6]], host.memory[[2, 0, 5]])


def test_a_copy_outside_the_pool_or_the_host_changes_nothing(exact: Backend) -> None:
    spec = KVSpec(1, 1, 16, 4, "float32")
    paged = Paged(exact, spec, num_blocks=4)
    host = exact.host_blocks(paged.kv, spec, 3)
    host.memory[:] = 7
    for blocks, places in (
        (ids(4), ids(0)),
        (ids(-1), ids(0)),
        (ids(0, 1), ids(0, 3)),
        (ids(0, 1), ids(0, -1)),
    ):
        with pytest.raises(IndexError):
            host.save(blocks, places)
        with pytest.raises(IndexError):
            host.load(places, blocks)
    host.wait()
    assert (host.memory == 7).all()
