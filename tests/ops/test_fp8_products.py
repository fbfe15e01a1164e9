"""Products of 8-bit floats that quantise activations, on the backends that have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from op_backends import TOLERANCE, check, host, invariant, numbers, put
from packers import e4m3_values

from vllmlite.backends.base import Backend, Expert
from vllmlite.weights.host import HostTensor, PackedWeight
from vllmlite.weights.schemes.float8 import Float8Scheme

ROWS_OF_X = (1, 3, 8, 9, 16, 17, 33, 64, 65, 128, 130, 300)
SCHEMES = {
    "channel": Float8Scheme("channel", inputs="dynamic"),
    "tensor": Float8Scheme("tensor", inputs="dynamic"),
    "static": Float8Scheme("tensor", inputs="static"),
    "blocks": Float8Scheme("block", (128, 128), "weight_scale_inv", inputs="dynamic"),
}
INPUT_SCALE = np.float32(0.0075)
"""A static scale with which magnitudes above 3.4 are clamped."""


def tensor(dtype: str, values: NDArray[Any]) -> HostTensor:
    return HostTensor(dtype, values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def packed(
    kind: str, rows: int, columns: int, seed: int = 0, constant: np.float32 = INPUT_SCALE
) -> tuple[PackedWeight, NDArray[np.float64]]:
    """A weight, and its values."""
    scheme, draw = SCHEMES[kind], np.random.default_rng([seed, rows, columns])
    codes = draw.integers(0, 127, (rows, columns), np.uint8)
    values = e4m3_values()[codes]
    signs = draw.integers(0, 2, (rows, columns), np.uint8)
    shape = {
        "tensor": (1,), "channel": (rows, 1), "block": (-(-rows // 128), -(-columns // 128))
    }[scheme.granularity]  # fmt: skip
    scales = (draw.random(shape) * 1e-3 + 1e-4).astype(np.float32)
    parts = {"weight": tensor("float8_e4m3", codes | signs << 7), scheme.scale: tensor("float32", scales)}
    if scheme.inputs == "static":
        parts["input_scale"] = tensor("float32", np.array([constant], np.float32))
    wide: NDArray[Any] = scales.astype(np.float64)
    if scheme.granularity == "block":
        wide = np.kron(wide, np.ones((128, 128)))[:rows, :columns]
    return PackedWeight(scheme, (rows, columns), parts), np.where(signs, -1, 1) * values * wide


def quantised(x: NDArray[np.float64], kind: str, constant: np.float32 = INPUT_SCALE) -> NDArray[np.float64]:
    """The values that activations are rounded to."""
    size = 128 if kind == "blocks" else x.shape[1]
    groups = np.pad(x.astype(np.float32), ((0, 0), (0, -x.shape[1] % size))).reshape(len(x), -1, size)
    if kind == "static":
        scales = np.full((len(x), 1, 1), constant)
    else:
        scales = np.maximum(np.abs(groups).max(-1, keepdims=True) / np.float32(448), np.float32(2.0**-100))
    divided = (groups * (np.float32(1) / scales)).astype(np.float64)
    magnitudes = np.minimum(np.abs(divided), 448)
    steps = 2.0 ** (np.floor(np.log2(np.maximum(magnitudes, 2.0**-6))) - 3)
    found = np.sign(divided) * np.rint(magnitudes / steps) * steps * scales
    return found.reshape(len(x), -1)[:, : x.shape[1]]


@pytest.fixture
def multiplies(backend: Backend) -> Backend:
    if "fp8_w8a8" not in backend.schemes:
        pytest.skip(f"{backend.name} does not multiply 8-bit floats in {backend.dtype}")
    return backend


def check_products(backend: Backend, kind: str, parts: list[Any]) -> None:
    weights, values = zip(*parts, strict=True)
    matrix = np.concatenate(values)
    bias = [numbers((len(part),), 9) for part in values]
    weight = backend.linear_weight(weights, [host(backend, one) for one in bias])
    x = numbers((max(ROWS_OF_X), matrix.shape[1]), 1)
    expected = quantised(x, kind) @ matrix.T + np.concatenate(bias)
    usual = (
        np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(matrix, axis=1).max() / x.shape[1] ** 0.5
    )
    bound = TOLERANCE[backend.dtype] * np.maximum(np.abs(expected).max(-1, keepdims=True), 2 * usual)
    for rows in ROWS_OF_X:
        check(backend, backend.linear(put(backend, x[:rows]), weight), expected[:rows], bound[:rows])


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize(("rows", "columns"), [(202, 1040), (1, 16), (384, 2048)])
def test_products(multiplies: Backend, kind: str, rows: int, columns: int) -> None:
    """Neither rows nor columns fill tiles."""
    check_products(multiplies, kind, [packed(kind, rows, columns)])


@pytest.mark.parametrize("kind", SCHEMES)
def test_fused_parts(multiplies: Backend, kind: str) -> None:
    """Parts of blocks end within a block; results of odd numbers of rows are not aligned."""
    check_products(multiplies, kind, [packed(kind, rows, 512, rows) for rows in (128, 70, 33, 256)])


def test_parts_with_different_input_scales(multiplies: Backend) -> None:
    constants = np.float32(0.0075), np.float32(0.02)
    parts, values = zip(
        *(packed("static", 64, 256, constant=constant) for constant in constants), strict=True
    )
    x = numbers((5, 256))
    expected = [quantised(x, "static", constants[i]) @ values[i].T for i in range(2)]
    found = multiplies.linear(put(multiplies, x), multiplies.linear_weight(parts))
    check(multiplies, found, np.concatenate(expected, axis=1))


@pytest.mark.parametrize("kind", SCHEMES)
def test_rows_of_zeros_and_large_numbers(multiplies: Backend, kind: str) -> None:
    weight, values = packed(kind, 64, 256)
    x = numbers((9, 256))
    x[2], x[4, 7], x[5] = 0, 2.0**14, x[5] * 2.0**-6
    found = multiplies.linear(put(multiplies, x), multiplies.linear_weight([weight]))
    check(multiplies, found, quantised(x, kind) @ values.T)


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize(("rows", "columns"), [(3, 272), (70, 528), (9, 8192), (2, 8208)])
def test_a_norm_that_feeds_a_product(multiplies: Backend, kind: str, rows: int, columns: int) -> None:
    """The product is that of the norm without ``feeds``, to the bit, also where rows are too long to be fused."""
    weight = multiplies.linear_weight([packed(kind, 48, columns)[0]])
    norm = put(multiplies, numbers((columns,), 3))
    found = []
    for feeds in (None, weight):
        x, residual = (put(multiplies, numbers((rows, columns), seed)) for seed in (0, 1))
        normed, total = multiplies.rms_norm(x, norm, 1e-5, residual, feeds)
        found.append((multiplies.to_host(multiplies.linear(normed, weight)), multiplies.to_host(total)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_an_activation_that_feeds_a_product(multiplies: Backend, kind: str, activation: str) -> None:
    up, down = (multiplies.linear_weight([packed(kind, *shape)[0]]) for shape in ((544, 128), (48, 272)))
    x = put(multiplies, numbers((70, 128)))
    found = [
        multiplies.to_host(multiplies.linear(multiplies.gated_linear(x, up, activation, feeds), down))
        for feeds in (None, down)
    ]
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("kind", ["channel", "blocks"])
def test_logits_are_float32(multiplies: Backend, kind: str, rows: int) -> None:
    weight, values = packed(kind, 300, 256)
    x = numbers((rows, 256))
    found = multiplies.logits(put(multiplies, x), multiplies.linear_weight([weight]))
    assert multiplies.to_host(found).dtype == np.float32
    check(multiplies, found, quantised(x, kind) @ values.T)


@pytest.mark.parametrize("kind", ["channel", "blocks"])
def test_columns_that_kernels_do_not_take(multiplies: Backend, kind: str) -> None:
    """Where they are dequantised when they are loaded, activations stay as they are."""
    weight, values = packed(kind, 64, 40)
    x = numbers((5, 40))
    found = multiplies.to_host(multiplies.linear(put(multiplies, x), multiplies.linear_weight([weight])))
    np.testing.assert_allclose(found, x @ values.T, rtol=0, atol=0.1 * np.abs(x @ values.T).max())


def test_experts(multiplies: Backend) -> None:
    """The mixture is nearly that of the dequantised weights."""
    hidden, inner, count = 128, 64, 4

    def mixture(floats: bool) -> Any:
        experts = []
        for expert in range(count):
            made = []
            for rows, columns in ((2 * inner, hidden), (hidden, inner)):
                part, _ = packed("channel", rows, columns, expert)
                used = multiplies.dequantize(part, multiplies.dtype) if floats else part
                made.append(multiplies.linear_weight([used]))
            experts.append(Expert(*made))
        x, logits = put(multiplies, numbers((5, hidden))), put(multiplies, numbers((5, count), 1))
        return multiplies.to_host(multiplies.moe(x, logits, multiplies.experts(experts), 2, True, "silu"))

    expected = mixture(True)
    np.testing.assert_allclose(mixture(False), expected, rtol=0, atol=0.1 * np.abs(expected).max())


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batch_invariant_products(dtype: str, kind: str) -> None:
    """A row's result is the same to the bit whatever other rows there are."""
    backend = invariant(dtype)
    if "fp8_w8a8" not in backend.schemes:
        pytest.skip(f"the GPU does not multiply 8-bit floats in {dtype}")
    weight = backend.linear_weight([packed(kind, 520, 2064)[0]])
    x = numbers((300, 2064))
    whole = backend.to_host(backend.linear(put(backend, x), weight))
    for rows in ROWS_OF_X[:-1]:
        found = backend.to_host(backend.linear(put(backend, x[:rows]), weight))
        np.testing.assert_array_equal(found, whole[:rows])
