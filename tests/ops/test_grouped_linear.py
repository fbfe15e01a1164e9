"""Products with integer weights in groups, on the backends that multiply them without dequantising them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from op_backends import TOLERANCE, check, host, invariant, numbers, put

from vllmlite.backends.base import Backend, Expert
from vllmlite.weights.host import HostTensor, PackedWeight
from vllmlite.weights.schemes.grouped import GroupedScheme

ROWS_OF_X = (1, 3, 8, 9, 16, 17, 33, 64, 70, 128, 129, 256, 300)


def tensor(dtype: str, values: NDArray[Any]) -> HostTensor:
    return HostTensor(dtype, values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def packed(
    rows: int, columns: int, bits: int, group: int | None, *, zeros: bool = False, order: bool = False, seed: int = 0
) -> tuple[PackedWeight, NDArray[np.float64]]:  # fmt: skip
    """A weight, and its values."""
    draw = np.random.default_rng([seed, rows, columns])
    size = group or columns
    groups = -(-columns // size)
    codes = draw.integers(0, 2**bits, (rows, columns), np.uint8)
    scales = (draw.random((rows, groups)) * 0.02 + 0.001).astype(np.float16)
    offsets = (
        draw.integers(0, 2**bits, (rows, groups), np.uint8)
        if zeros
        else np.full((rows, groups), 2 ** (bits - 1), np.uint8)
    )
    stored = codes
    if bits == 4:
        even = np.pad(codes, ((0, 0), (0, columns % 2)))
        stored = even[:, ::2] | even[:, 1::2] << 4
    parts = {"qweight": tensor("uint8", stored), "scales": tensor("float16", scales)}
    if zeros:
        parts["zeros"] = tensor("uint8", offsets)
    group_of = np.arange(columns) // size
    values = (codes.astype(np.float64) - offsets[:, group_of]) * scales.astype(np.float64)[:, group_of]
    if order:
        places = draw.permutation(columns).astype(np.int32)
        parts["order"] = tensor("int32", places)
        values = values[:, np.argsort(places)]
    return PackedWeight(GroupedScheme(bits, group, not zeros), (rows, columns), parts), values


@pytest.fixture
def multiplies(backend: Backend) -> Backend:
    if not {"w4a16", "w8a16"} <= backend.schemes:
        pytest.skip(f"{backend.name} does not multiply integers in groups in {backend.dtype}")
    return backend


def check_products(backend: Backend, parts: list[Any], biases: bool = False) -> None:
    weights, values = zip(*parts, strict=True)
    matrix = np.concatenate(values)
    bias = [numbers((len(part),), 9) for part in values]
    weight = backend.linear_weight(weights, [host(backend, one) for one in bias] if biases else ())
    x = numbers((max(ROWS_OF_X), matrix.shape[1]), 1)
    expected = x @ matrix.T + (np.concatenate(bias) if biases else 0)
    # A row of few results may have none of the usual size, which this is.
    usual = (
        np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(matrix, axis=1).max() / x.shape[1] ** 0.5
    )
    bound = TOLERANCE[backend.dtype] * np.maximum(np.abs(expected).max(-1, keepdims=True), 2 * usual)
    for rows in ROWS_OF_X:
        check(backend, backend.linear(put(backend, x[:rows]), weight), expected[:rows], bound[:rows])


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_group_sizes(multiplies: Backend, bits: int, group: int | None, zeros: bool) -> None:
    """The last group is short, and neither rows nor columns fill tiles."""
    check_products(multiplies, [packed(202, 1032, bits, group, zeros=zeros)])


@pytest.mark.parametrize("rows", [1, 5, 127, 1000])
@pytest.mark.parametrize("columns", [8, 40, 136, 4096])
def test_shapes(multiplies: Backend, rows: int, columns: int) -> None:
    check_products(multiplies, [packed(rows, columns, 4, 128, zeros=True)])


@pytest.mark.parametrize("columns", [33, 100, 1030])
def test_columns_that_do_not_fill_words(multiplies: Backend, columns: int) -> None:
    check_products(multiplies, [packed(64, columns, 4, 32, zeros=True)])


@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_an_order_of_their_own(multiplies: Backend, bits: int, group: int | None) -> None:
    check_products(multiplies, [packed(100, 520, bits, group, order=True)])


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
def test_parts_of_different_kinds(multiplies: Backend, biases: bool) -> None:
    parts = [
        packed(70, 512, 4, 128),
        packed(33, 512, 4, 128, seed=1),
        packed(40, 512, 4, 32, zeros=True),
        packed(1, 512, 8, None),
        packed(64, 512, 4, 128, order=True),
        packed(64, 512, 4, 128, order=True, seed=1),
    ]
    check_products(multiplies, parts, biases)


def test_logits_of_a_packed_weight(multiplies: Backend) -> None:
    weight, values = packed(300, 256, 4, 64)
    x = numbers((5, 256))
    found = multiplies.logits(put(multiplies, x), multiplies.linear_weight([weight]))
    assert multiplies.to_host(found).dtype == np.float32
    check(multiplies, found, x @ values.T)


def test_experts_of_packed_weights(multiplies: Backend) -> None:
    """The mixture is that of the dequantised weights."""
    hidden, inner, count = 64, 32, 4

    def mixture(floats: bool) -> Any:
        experts = []
        for expert in range(count):
            made = []
            for rows, columns in ((2 * inner, hidden), (hidden, inner)):
                part, _ = packed(rows, columns, 4, 32, seed=expert)
                used = multiplies.dequantize(part, multiplies.dtype) if floats else part
                made.append(multiplies.linear_weight([used]))
            experts.append(Expert(*made))
        x, logits = put(multiplies, numbers((5, hidden))), put(multiplies, numbers((5, count), 1))
        return multiplies.to_host(multiplies.moe(x, logits, multiplies.experts(experts), 2, True, "silu"))

    np.testing.assert_allclose(mixture(False), mixture(True), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 64)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batch_invariant_products(dtype: str, bits: int, group: int) -> None:
    """A row's result is the same to the bit whatever other rows there are."""
    backend = invariant(dtype)
    if f"w{bits}a16" not in backend.schemes:
        pytest.skip(f"the GPU does not multiply integers in groups in {dtype}")
    weight = backend.linear_weight([packed(520, 2056, bits, group, zeros=True)[0]])
    x = numbers((600, 2056))
    whole = backend.to_host(backend.linear(put(backend, x), weight))
    for first, last in ((0, 1), (7, 15), (3, 19), (40, 57), (100, 164), (30, 95), (290, 300), (5, 300)):
        part = backend.to_host(backend.linear(put(backend, x[first:last]), weight))
        assert (part == whole[first:last]).all()
