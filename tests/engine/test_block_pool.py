"""The block pool, compared with a simple model of it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllmlite.engine.block_pool import BlockPool, block_hash, root_digest


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from(["take", "share", "free", "name"]), st.integers(0, 20))),
)
def test_counts_hashes_and_free_list_agree_after_any_history(
    size: int, history: list[tuple[str, int]]
) -> None:
    pool = BlockPool(size)
    held: list[list[int]] = []
    for what, number in history:
        if what == "take" and pool.num_free:
            held.append(pool.allocate(number % pool.num_free + 1))
        elif what == "free" and held:
            pool.release(held.pop(number % len(held)))
        elif what == "name" and held:
            for block in held[number % len(held)]:
                pool.cache(block, bytes([number]))
        elif what == "share":
            found = pool.find([bytes([number])])
            pool.share(found)
            held.append(found)
        pool.check_integrity(held)
    assert pool.num_used == len({block for blocks in held for block in blocks})
    for blocks in held:
        pool.release(blocks)
    pool.forget_all()
    pool.check_integrity([])
    assert pool.num_free == size


def test_a_freed_block_is_found_until_it_is_allocated_again() -> None:
    pool = BlockPool(2)
    block = pool.allocate(1)
    pool.cache(block[0], b"x")
    pool.release(block)
    assert pool.find([b"x"]) == block
    assert pool.num_free_in(block) == 1
    pool.allocate(2)
    assert pool.find([b"x"]) == []


def test_blocks_without_a_hash_are_reused_before_cached_ones() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    pool.cache(blocks[0], b"x")
    pool.release(blocks)
    pool.allocate(2)
    assert pool.find([b"x"]) == [blocks[0]]


def test_a_cached_prefix_ends_at_the_first_missing_block() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.cache(block, name)
    assert pool.find([b"a", b"b", b"x", b"c"]) == blocks[:2]


def test_block_hashes_depend_on_parent_tokens_and_salt() -> None:
    root = root_digest("salt", "")
    names = {
        block_hash(root, [1, 2]),
        block_hash(root, [2, 1]),
        block_hash(root, [1, 2, 0]),
        block_hash(root_digest("salt", "x"), [1, 2]),
        block_hash(block_hash(root, [1, 2]), [1, 2]),
    }
    assert len(names) == 5
    assert block_hash(root, (1, 2)) == block_hash(root, [1, 2])
