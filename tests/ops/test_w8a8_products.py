"""int8 products with int8 weights (compressed-tensors' W8A8) against the definition, on the backends that have them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from op_backends import numbers, put

from vllmlite.backends.base import Backend, Expert
from vllmlite.errors import ModelError
from vllmlite.weights.host import HostTensor, PackedWeight
from vllmlite.weights.schemes.w8a8 import W8A8Scheme

Array = NDArray[Any]
ROWS = (1, 2, 7, 16, 33, 64)
ROWS_ON_GPUS = (8, 9, 130, 300)
"""Further numbers of rows, for the tiles of kernels."""
INPUTS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "dynamic asymmetric": {"symmetric_input": False},
    "static": {"static": True},
    "static asymmetric": {"static": True, "symmetric_input": False},
}


def tensor(dtype: str, values: Array) -> HostTensor:
    return HostTensor(dtype, values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def packed(
    rows: int,
    columns: int,
    *,
    symmetric: bool = True,
    seed: int = 0,
    input_scale: float = 0.02,
    **inputs: Any,
) -> PackedWeight:
    draw = np.random.default_rng([seed, rows, columns])
    scheme = W8A8Scheme(None, symmetric, **inputs)
    parts = {
        "weight": tensor("int8", draw.integers(-128, 128, (rows, columns)).astype(np.int8)),
        "weight_scale": tensor("float32", draw.uniform(1e-3, 2e-2, (rows, 1)).astype(np.float32)),
    }
    if not symmetric:
        parts["weight_zero_point"] = tensor("int8", draw.integers(-20, 20, (rows, 1)).astype(np.int8))
    if scheme.static:
        parts["input_scale"] = tensor("float32", np.array([input_scale], np.float32))
    if scheme.static and not scheme.symmetric_input:
        parts["input_zero_point"] = tensor("int8", np.array([-17], np.int8))
    return PackedWeight(scheme, (rows, columns), parts)


def defined(x: Array, weight: PackedWeight) -> Array:
    """The product as the module of the scheme defines it, in numpy."""
    scheme, one = weight.scheme, np.float32(1)
    assert isinstance(scheme, W8A8Scheme)
    x = x.astype(np.float32)
    zeros: Array = np.zeros((len(x), 1), np.float32)
    if scheme.static:
        scale = np.broadcast_to(weight.parts["input_scale"].data.view(np.float32), (len(x), 1))
        reciprocal = one / scale
        zeros = zeros - np.float32(0 if scheme.symmetric_input else 17)
    elif scheme.symmetric_input:
        most = np.abs(x).max(1, keepdims=True)
        scale, reciprocal = (
            most / np.float32(127),
            np.where(most > 0, np.float32(127) / np.maximum(most, 1e-30), 0),
        )
    else:
        low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
        span = high - low
        scale, reciprocal = (
            span / np.float32(255),
            np.where(span > 0, np.float32(255) / np.maximum(span, 1e-30), 0),
        )
        zeros = np.rint(np.float32(-128) - low * reciprocal.astype(np.float32))
    quantised = np.clip(np.rint(x * reciprocal.astype(np.float32)) + zeros, -128, 127).astype(np.int64)
    values = weight.parts["weight"].data.view(np.int8).reshape(weight.shape).astype(np.int64)
    if not scheme.symmetric:
        values = values - weight.parts["weight_zero_point"].data.view(np.int8)[:, None]
    sums = ((quantised - zeros.astype(np.int64)) @ values.T).astype(np.float32)
    found: Array = sums * (scale * weight.parts["weight_scale"].data.view(np.float32))
    return found


@pytest.fixture
def multiplies(backend: Backend) -> Backend:
    if "w8a8" not in backend.schemes:
        pytest.skip(f"{backend.name} does not multiply int8 with int8")
    return backend


def check(backend: Backend, x: Array, parts: list[PackedWeight], bias: Array | None = None) -> None:
    biases = [] if bias is None else [tensor("float32", bias.astype(np.float32))]
    weight = backend.linear_weight(parts, biases)
    expected = np.concatenate([defined(x, part) for part in parts], axis=1)
    expected = expected if bias is None else expected + bias
    bound = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[backend.dtype]
    for rows in ROWS:
        found = backend.to_host(backend.linear(put(backend, x[:rows]), weight))
        np.testing.assert_allclose(found, expected[:rows], bound, bound * np.abs(expected).max())
    if backend.name == "cuda":
        for rows in ROWS_ON_GPUS:
            many = np.resize(x, (rows, x.shape[1]))
            found = backend.to_host(backend.linear(put(backend, many), weight))
            alone = [backend.linear(put(backend, row[None]), weight) for row in many[: len(x)]]
            alike = np.concatenate([backend.to_host(row) for row in alone])
            np.testing.assert_array_equal(found, np.resize(alike, found.shape))


@pytest.mark.parametrize("symmetric", [True, False], ids=["", "zeros"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (70, 520), (33, 1001)])
def test_products_are_those_of_the_definition(
    multiplies: Backend, inputs: str, symmetric: bool, rows: int, columns: int
) -> None:
    x = numbers((max(ROWS), columns), 1)
    x[3] = 0
    x[4:8] += 3  # rows with few negative elements
    x[6] = np.abs(x[6])
    check(multiplies, x, [packed(rows, columns, symmetric=symmetric, **INPUTS[inputs])])


def test_sums_do_not_overflow(multiplies: Backend) -> None:
    """The largest sum of integers that the number of columns allows."""
    columns = 53248
    weight = packed(4, columns)
    values = np.full((4, columns), -128, np.int8)
    values[1] = 127
    scales = tensor("float32", np.full((4, 1), 1e-5, np.float32))
    weight = replace(weight, parts={**weight.parts, "weight": tensor("int8", values), "weight_scale": scales})
    check(multiplies, np.tile(np.array([[1.0], [-1.0]]), (32, columns)), [weight])


def test_parts_have_inputs_of_their_own(multiplies: Backend) -> None:
    """Fused projections whose constants for activations differ, with a bias."""
    parts = [
        packed(70, 256, static=True),
        packed(33, 256, static=True, input_scale=0.03),
        packed(16, 256, static=True, symmetric_input=False),
        packed(40, 256),
    ]
    check(multiplies, numbers((max(ROWS), 256)), parts, numbers((159,), 5))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("rows", "columns"), [(3, 272), (9, 1000), (2, 8208)])
def test_what_feeds_a_product_may_be_quantised(
    multiplies: Backend, inputs: str, rows: int, columns: int
) -> None:
    """A norm, and an activation, with ``feeds`` have the same products, to the bit; also where they are not fused."""
    weight = multiplies.linear_weight([packed(48, columns, symmetric=False, **INPUTS[inputs])])
    up = multiplies.linear_weight([packed(columns, 32, seed=seed) for seed in (1, 2)])
    norm, found = put(multiplies, numbers((columns,), 3)), []
    for feeds in (None, weight):
        x, residual = (put(multiplies, numbers((rows, columns), seed)) for seed in (0, 1))
        normed, _ = multiplies.rms_norm(x, norm, 1e-5, residual, feeds)
        inner = multiplies.gated_linear(put(multiplies, numbers((rows, 32), 4)), up, "silu", feeds)
        found.append([multiplies.to_host(multiplies.linear(each, weight)) for each in (normed, inner)])
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("inputs", INPUTS)
def test_experts_multiply_their_own_rows(multiplies: Backend, inputs: str) -> None:
    """A mixture of one expert a token is that expert's product."""
    hidden, inner, count = 64, 32, 3
    experts, alone = [], []
    for index in range(count):
        own = {"seed": index, "input_scale": 0.02 + index / 100} | INPUTS[inputs]
        parts = [packed(inner, hidden, **own), packed(inner, hidden, **own | {"seed": 9 + index})]
        experts.append(
            Expert(multiplies.linear_weight(parts), multiplies.linear_weight([packed(hidden, inner, **own)]))
        )
        alone.append(multiplies.experts([experts[-1]]))
    x = numbers((24, hidden))
    logits = np.full((24, count), -50.0)
    chosen = np.arange(24) % count
    logits[np.arange(24), chosen] = 50
    together = multiplies.to_host(
        multiplies.moe(
            put(multiplies, x), put(multiplies, logits), multiplies.experts(experts), 1, True, "silu"
        )
    )
    for row, expert in enumerate(chosen):
        own_logits = put(multiplies, np.zeros((1, 1)))
        found = multiplies.moe(put(multiplies, x[row : row + 1]), own_logits, alone[expert], 1, True, "silu")
        np.testing.assert_allclose(multiplies.to_host(found)[0], together[row], 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"input_scale": tensor("float32", np.array([0.0], np.float32))}, "input_scale is 0.0"),
        ({"input_scale": tensor("float32", np.array([np.nan], np.float32))}, "input_scale is nan"),
        (
            {"input_zero_point": tensor("int32", np.array([200], np.int32))},
            "input_zero_point is 200; accepted: -128",
        ),
        ({"weight_scale": tensor("float32", np.full((4, 1), np.inf, np.float32))}, "a scale is not finite"),
    ],
)
def test_constants_out_of_range_are_refused(part: dict[str, HostTensor], message: str) -> None:
    weight = packed(4, 32, static=True, symmetric_input=False)
    with pytest.raises(ModelError, match=re.escape(message)):
        W8A8Scheme.operand(weight.scheme, replace(weight, parts={**weight.parts, **part}))  # type: ignore[arg-type]


def test_ranks_take_slices() -> None:
    weight = packed(64, 96, symmetric=False, static=True, symmetric_input=False)
    x = numbers((5, 96))
    whole, scheme = defined(x, weight), weight.scheme
    rows = scheme.take_rows(weight, [(32, 64), (0, 16)])
    np.testing.assert_array_equal(defined(x, rows), whole[:, np.r_[32:64, 0:16]])
    halves = [defined(x[:, part], scheme.take_columns(weight, part.start, part.stop)) for part in (
        slice(0, 48), slice(48, 96))]  # fmt: skip
    np.testing.assert_allclose(sum(halves), whole, 1e-4, 1e-4)
