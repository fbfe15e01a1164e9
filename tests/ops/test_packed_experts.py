"""Mixtures of experts on the CUDA backend whose weights stay packed, against its dense products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from op_backends import Array, check, cuda, invariant, numbers, put
from packers import e4m3_values

from vllmlite.backends.base import Backend, Expert
from vllmlite.weights.host import HostTensor, PackedWeight
from vllmlite.weights.schemes.bits import pack_rows
from vllmlite.weights.schemes.float8 import Float8Scheme
from vllmlite.weights.schemes.grouped import ORDER, QWEIGHT, SCALES, ZEROS, GroupedScheme
from vllmlite.weights.schemes.groups import group_count
from vllmlite.weights.schemes.w8a8 import W8A8Scheme

COUNT = 7
DTYPES = "float16", "bfloat16"
BACKENDS = {"cuda": cuda, "cuda-invariant": invariant}


def tensor(dtype: str, values: Array) -> HostTensor:
    return HostTensor(dtype, values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def integers(bits: int, size: int | None, *, order: bool = False) -> Callable[[int, int, int], PackedWeight]:
    """A function that makes a weight [rows, columns] from a seed. The order of columns is that of the columns' number
    and the seed's tens, so that gate and up projections of an expert have the same."""

    def make(rows: int, columns: int, seed: int) -> PackedWeight:
        draw = np.random.default_rng([seed, rows, columns])
        groups = rows, group_count(columns, size)
        parts = {
            QWEIGHT: tensor(
                "uint8", pack_rows(draw.integers(0, 1 << bits, (rows, columns)).astype(np.uint8), bits)
            ),
            SCALES: tensor("float16", (draw.uniform(0.5, 1.5, groups) / (1 << bits)).astype(np.float16)),
            ZEROS: tensor("uint8", draw.integers(0, 1 << bits, groups).astype(np.uint8)),
        }
        if order:
            parts[ORDER] = tensor(
                "int32", np.random.default_rng([seed // 10]).permutation(columns).astype("<i4")
            )
        return PackedWeight(GroupedScheme(bits, size, False), (rows, columns), parts)

    return make


def floats(scheme: Float8Scheme) -> Callable[[int, int, int], PackedWeight]:
    def make(rows: int, columns: int, seed: int) -> PackedWeight:
        draw = np.random.default_rng([seed, rows, columns])
        codes = (
            draw.integers(0, 127, (rows, columns), np.uint8)
            | draw.integers(0, 2, (rows, columns), np.uint8) << 7
        )
        blocks = -(-rows // 128), -(-columns // 128)
        shape = blocks if scheme.granularity == "block" else (rows, 1)
        most = float(np.abs(e4m3_values()).max())
        parts = {
            "weight": tensor("float8_e4m3", codes),
            scheme.scale: tensor("float32", (draw.uniform(0.5, 1.5, shape) / most).astype(np.float32)),
        }
        if scheme.inputs == "static":
            parts["input_scale"] = tensor("float32", np.array([0.01 + seed // 10 / 1000], np.float32))
        return PackedWeight(scheme, (rows, columns), parts)

    return make


def int8(scheme: W8A8Scheme) -> Callable[[int, int, int], PackedWeight]:

    def make(rows: int, columns: int, seed: int) -> PackedWeight:
        draw = np.random.default_rng([seed, rows, columns])
        parts = {
            "weight": tensor("int8", draw.integers(-128, 128, (rows, columns)).astype(np.int8)),
            "weight_scale": tensor("float32", draw.uniform(5e-4, 5e-3, (rows, 1)).astype(np.float32)),
            "weight_zero_point": tensor("int8", draw.integers(-20, 20, (rows, 1)).astype(np.int8)),
        }
        if scheme.static:
            parts["input_scale"] = tensor("float32", np.array([0.02 + seed // 10 / 1000], np.float32))
            parts["input_zero_point"] = tensor("int8", np.array([-17 + seed // 10], np.int8))
        return PackedWeight(scheme, (rows, columns), parts)

    return make


KINDS = {
    "w4 g32": integers(4, 32),
    "w4 g64": integers(4, 64),
    "w4 g128": integers(4, 128),
    "w4 channel": integers(4, None),
    "w4 order": integers(4, 128, order=True),
    "w8 g32": integers(8, 32),
    "w8 channel": integers(8, None),
    "int8 dynamic": int8(W8A8Scheme(None, False)),
    "int8 static": int8(W8A8Scheme(None, False, static=True, symmetric_input=False)),
    "fp8 channel": floats(Float8Scheme("channel", inputs="dynamic")),
    "fp8 static": floats(Float8Scheme("channel", inputs="static")),
    "fp8 blocks": floats(Float8Scheme("block", (128, 128), "weight_scale_inv", inputs="dynamic")),
}


@pytest.fixture(params=[(name, dtype) for name in BACKENDS for dtype in DTYPES], ids="-".join)
def gpu(request: pytest.FixtureRequest) -> Backend:
    name, dtype = request.param
    return BACKENDS[name](dtype)


def packed_experts(backend: Backend, kind: str, hidden: int, inner: int) -> list[Expert]:
    make = KINDS[kind]
    scheme = make(32, 32, 0).scheme
    if scheme.name not in backend.schemes:
        pytest.skip(f"{backend.name} does not multiply {scheme.name} in {backend.dtype}")
    return [
        Expert(
            backend.linear_weight([make(inner, hidden, 10 * expert), make(inner, hidden, 10 * expert + 1)]),
            backend.linear_weight([make(hidden, inner, 10 * expert + 2)]),
        )
        for expert in range(COUNT)
    ]


def mixture(backend: Backend, x: Array, logits: Array, experts: Sequence[Expert], top_k: int) -> Array:
    """The weighted sum of the chosen experts' results, each computed by the ops for dense layers."""
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    shares = np.exp(np.take_along_axis(logits, chosen, 1))
    shares /= shares.sum(1, keepdims=True)
    out = np.zeros_like(x)
    for index, expert in enumerate(experts):
        tokens, place = np.nonzero(chosen == index)
        if len(tokens):
            inner = backend.gated_linear(put(backend, x[tokens]), expert.gate_up, "silu")
            results = backend.to_host(backend.linear(inner, expert.down)).astype(np.float64)
            out[tokens] += results * shares[tokens, place][:, None]
    return out


def a_step(tokens: int, hidden: int) -> tuple[Array, Array]:
    logits = numbers((tokens, COUNT), 1, 2)
    logits[:, 5] = -100  # an expert that no token chooses
    return numbers((tokens, hidden)), logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("hidden", "inner"), [(272, 256), (1040, 384)])
def test_packed_experts(gpu: Backend, kind: str, hidden: int, inner: int) -> None:
    """Neither rows nor columns fill tiles."""
    experts = packed_experts(gpu, kind, hidden, inner)
    together = gpu.experts(experts)
    for tokens, top_k in ((1, 2), (3, 2), (17, 4), (60, 2), (150, 3), (300, 4)):
        x, logits = a_step(tokens, hidden)
        found = gpu.moe(put(gpu, x), put(gpu, logits), together, top_k, True, "silu")
        expected = mixture(gpu, x, logits, experts, top_k)
        if kind.startswith(("fp8", "int8")):
            # Another order of sums changes the codes of some activations of the second product.
            assert np.linalg.norm(gpu.to_host(found) - expected) <= 0.02 * np.linalg.norm(expected)
        else:
            check(gpu, found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant_packed_experts(kind: str, dtype: str) -> None:
    backend = invariant(dtype)
    experts = backend.experts(packed_experts(backend, kind, 272, 256))
    x, logits = a_step(600, 272)

    def mixed(rows: slice) -> Array:
        return backend.to_host(
            backend.moe(put(backend, x[rows]), put(backend, logits[rows]), experts, 3, True, "silu")
        )

    whole = mixed(slice(None))
    for first, last in ((0, 1), (7, 15), (3, 19), (40, 57), (100, 230), (590, 600)):
        np.testing.assert_array_equal(mixed(slice(first, last)), whole[first:last])


def test_experts_that_differ_in_form_are_dequantised(gpu: Backend, caplog: pytest.LogCaptureFixture) -> None:
    experts = packed_experts(gpu, "w4 g32", 64, 32)
    experts[2:4] = packed_experts(gpu, "w4 g128", 64, 32)[2:4]
    together: Any = gpu.experts(experts)
    x, logits = a_step(9, 64)
    found = gpu.moe(put(gpu, x), put(gpu, logits), together, 2, True, "silu")
    check(gpu, found, mixture(gpu, x, logits, experts, 2))
    assert "dequantised" in caplog.text
