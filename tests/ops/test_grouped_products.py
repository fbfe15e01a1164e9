"""Products of the native CPU backend with integer weights in groups, which it does not dequantise beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from op_backends import HAS_TORCH
from paged import host_tensor

from vllmlite.backends.base import Expert
from vllmlite.backends.cpu import CpuBackend
from vllmlite.errors import BackendError, ModelError
from vllmlite.weights.host import FLOAT_DTYPES, HostTensor, PackedWeight, float_tensor
from vllmlite.weights.schemes.bits import pack_rows
from vllmlite.weights.schemes.grouped import ORDER, QWEIGHT, SCALES, ZEROS, GroupedScheme
from vllmlite.weights.schemes.groups import group_count

_cpu: Any = pytest.importorskip("vllmlite._cpu", reason="vllmlite._cpu is not built")

each_isa = pytest.mark.parametrize("isa", _cpu.instruction_sets())
each_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES)
Array = NDArray[Any]


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def grouped(
    rows: int, columns: int, bits: Any = 4, size: int | None = 32, *, symmetric: bool = False,
    scales: str = "float16", order: bool = False, seed: int = 0, int8_input: bool = False,
) -> PackedWeight:  # fmt: skip
    """``bits`` "e2m1" and "e4m3": floats of 4 and 8 bits."""
    floats = bits in ("e2m1", "e4m3")
    bits, symmetric = (4 if bits == "e2m1" else 8, True) if floats else (bits, symmetric)
    generator = np.random.default_rng([rows, columns, seed])
    shape = rows, group_count(columns, size)
    drawn = generator.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    if floats and bits == 8:
        drawn[drawn & 127 == 127] = 0x84  # no NaN; subnormal numbers instead
    codes = pack_rows(drawn, bits)
    parts = {
        QWEIGHT: HostTensor("uint8", codes.shape, codes.reshape(-1)),
        SCALES: float_tensor(generator.uniform(-0.02, 0.02, shape).astype(np.float32), scales),
    }
    if not symmetric:
        zeros = generator.integers(0, 1 << bits, shape).astype(np.uint8)
        parts[ZEROS] = HostTensor("uint8", shape, zeros.reshape(-1))
    if order:
        columns_of = generator.permutation(columns).astype("<i4")
        parts[ORDER] = HostTensor("int32", (columns,), columns_of.view(np.uint8))
    scheme = GroupedScheme(bits, size, symmetric, int8_input=int8_input, floats=floats)
    return PackedWeight(scheme, (rows, columns), parts)


def dequantized_product(backend: CpuBackend, x: Array, weight: PackedWeight) -> Array:
    """Return the product with the dequantised weight, in the dtype in which the backend takes x, and with the columns
    in the order of the packed ones."""
    takes_bf16 = backend.dtype == "bfloat16" and backend.isa in ("avx512_bf16", "amx")
    floats = CpuBackend("bfloat16" if takes_bf16 else "float32", isa=backend.isa)
    parts = dict(weight.parts)
    order = parts.pop(ORDER, None)
    if order is not None:
        x = np.ascontiguousarray(x[:, order.data.view("<i4")])
    plain = PackedWeight(weight.scheme, weight.shape, parts)
    product = floats.linear(floats.tensor(x), floats.linear_weight([floats.dequantize(plain, floats.dtype)]))
    return floats.to_host(product)


part = st.tuples(
    st.integers(1, 40), st.sampled_from([4, 8, "e2m1", "e4m3"]), st.sampled_from([32, 64, 128, None]), st.booleans(),
    st.sampled_from(["float16", "bfloat16"]), st.booleans(),
)  # fmt: skip


@each_isa
@each_dtype
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 300), parts=st.lists(part, min_size=1, max_size=3))
def test_products_have_the_bits_of_those_with_floats(
    isa: str, dtype: str, rows: int, columns: int, parts: list[Any]
) -> None:
    """For any number of rows, and for fused weights whose parts have different layouts."""
    backend = CpuBackend(dtype, threads=2, isa=isa)
    packed = [
        grouped(out, columns, bits, size, symmetric=symmetric, scales=scales, order=order, seed=index)
        for index, (out, bits, size, symmetric, scales, order) in enumerate(parts)
    ]
    weight = backend.linear_weight(packed)
    x = random(rows, columns, seed=1)
    together = backend.to_host(backend.linear(backend.tensor(x), weight))
    expected = np.concatenate([dequantized_product(backend, x, one) for one in packed], axis=1)
    np.testing.assert_array_equal(together, expected)
    alone = [backend.to_host(backend.linear(backend.tensor(row[None]), weight)) for row in x]
    assert together.tobytes() == np.concatenate(alone).tobytes()


@each_isa
@each_dtype
@pytest.mark.parametrize(("columns", "size"), [(2048, 128), (4544, 64), (4500, None), (2208, 96)])
def test_products_longer_than_a_chunk(isa: str, dtype: str, columns: int, size: int | None) -> None:
    backend = CpuBackend(dtype, threads=2, isa=isa)
    packed = grouped(101, columns, 4, size)
    weight = backend.linear_weight([packed], [host_tensor(random(101))])
    x = random(33, columns, seed=1)
    found = backend.to_host(backend.linear(backend.tensor(x), weight))
    np.testing.assert_array_equal(found, dequantized_product(backend, x, packed) + random(101))
    for rows in (1, 2, 3, 5, 6, 8, 17):
        some = backend.to_host(backend.linear(backend.tensor(x[:rows]), weight))
        assert some.tobytes() == found[:rows].tobytes()


@each_isa
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_in_float32(isa: str, bits: int) -> None:
    """Elements are rounded once or twice with these scales, in the same way in every batch."""
    backend = CpuBackend(threads=2, isa=isa)
    packed = grouped(20, 96, bits, scales="float32")
    weight = backend.linear_weight([packed])
    x = random(40, 96)
    found = backend.to_host(backend.linear(backend.tensor(x), weight))
    np.testing.assert_allclose(found, dequantized_product(backend, x, packed), rtol=0, atol=1e-4)
    alone = [backend.to_host(backend.linear(backend.tensor(row[None]), weight)) for row in x]
    assert found.tobytes() == np.concatenate(alone).tobytes()


@each_isa
@each_dtype
@pytest.mark.parametrize(
    ("bits", "size", "scales"),
    [("e4m3", 128, "float32"), ("e4m3", None, "float32"), ("e2m1", 32, "bfloat16")],
)
def test_all_values_of_floats(isa: str, dtype: str, bits: str, size: int | None, scales: str) -> None:
    """With the scales that fp8 and MXFP4 checkpoints have."""
    backend = CpuBackend(dtype, threads=2, isa=isa)
    packed = grouped(40, 2300, bits, size, scales=scales)
    weight = backend.linear_weight([packed])
    x = random(33, 2300, seed=1)
    found = backend.to_host(backend.linear(backend.tensor(x), weight))
    np.testing.assert_array_equal(found, dequantized_product(backend, x, packed))
    alone = [backend.to_host(backend.linear(backend.tensor(row[None]), weight)) for row in x]
    assert found.tobytes() == np.concatenate(alone).tobytes()


def test_e4m3_that_is_not_a_number_is_refused() -> None:
    packed = grouped(4, 64, "e4m3")
    packed.parts[QWEIGHT].data[100] = 0xFF
    with pytest.raises(ModelError, match="a value is not a number"):
        CpuBackend().linear_weight([packed])


def of_8_bits(x: Array) -> Array:
    """x as products round it that quantise it: to 8 bits, in groups of 32."""
    groups = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    extremes = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    inverse = np.divide(-128, extremes, out=np.zeros_like(extremes), where=extremes != 0)
    codes = np.clip(np.rint(groups * inverse), -128, 127)
    rounded: Array = (codes * (extremes / -128)).reshape(len(x), -1)[:, : x.shape[1]].astype(np.float64)
    return rounded


@each_isa
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), parts=st.lists(part, min_size=1, max_size=3))
def test_products_that_quantise_activations(isa: str, rows: int, columns: int, parts: list[Any]) -> None:
    """They are those of the dequantised weight with the rounded x, to the last bit at every number of rows."""
    backend = CpuBackend(threads=2, isa=isa)
    packed = [
        grouped(out, columns, bits if isinstance(bits, int) else 4, size, symmetric=symmetric, scales=scales,
                order=order, seed=index, int8_input=True)
        for index, (out, bits, size, symmetric, scales, order) in enumerate(parts)
    ]  # fmt: skip
    x = random(rows, columns, seed=1)
    expected = []
    for one in packed:
        order = one.parts[ORDER].data.view("<i4") if ORDER in one.parts else np.arange(columns)
        values = one.scheme.dequantize(one).astype(np.float64)
        expected.append(of_8_bits(x[:, order]) @ values[:, order].T)
    weight = backend.linear_weight(packed)
    found = backend.to_host(backend.linear(backend.tensor(x), weight))
    bound = 1e-5 * np.abs(np.concatenate(expected, axis=1)).max()
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), rtol=1e-5, atol=bound)
    alone = [backend.to_host(backend.linear(backend.tensor(row[None]), weight)) for row in x]
    assert found.tobytes() == np.concatenate(alone).tobytes()
    if rows == 1 and HAS_TORCH:
        from vllmlite.backends.torch import TorchBackend

        torch = TorchBackend()
        reference = torch.to_host(torch.linear(torch.tensor(x), torch.linear_weight(packed)))
        np.testing.assert_allclose(found, reference, rtol=1e-5, atol=bound)


@each_isa
@each_dtype
@pytest.mark.parametrize("rows", [1, 40, 100])
@pytest.mark.parametrize("orders", [(False, False), (True, True)])
@pytest.mark.parametrize("out", [16, 50, 60])
def test_gated_products(isa: str, dtype: str, rows: int, orders: tuple[bool, bool], out: int) -> None:
    backend = CpuBackend(dtype, threads=2, isa=isa)
    parts = [grouped(out, 160, order=order, seed=seed) for seed, order in enumerate(orders)]
    x = backend.tensor(random(rows, 160))
    for packed in (parts, [parts[0], parts[0]], [grouped(out, 160), grouped(out, 160, 8, None)]):
        weight = backend.linear_weight(packed)
        expected = backend.to_host(backend.gated_activation(backend.linear(x, weight), "silu"))
        assert backend.to_host(backend.gated_linear(x, weight, "silu")).tobytes() == expected.tobytes()


@each_isa
@pytest.mark.parametrize("tokens", [1, 5, 90])
@pytest.mark.parametrize("ordered", [False, True])
def test_mixtures(isa: str, tokens: int, ordered: bool) -> None:
    """A token's result is the same in every batch, and that of the experts' products."""
    backend = CpuBackend(threads=2, isa=isa)
    x, logits = random(tokens, 64), random(tokens, 4, seed=2)
    # Some parts in an order, and groups of another size where there is none.
    weights = [
        (
            [
                grouped(24, 64, order=ordered and expert != 1, seed=expert),
                grouped(
                    24, 64, size=None if expert == 2 else 32, order=ordered and expert == 0, seed=expert + 9
                ),
            ],
            grouped(64, 24, 8, None, order=ordered, seed=expert),
        )
        for expert in range(4)
    ]
    made = [
        Expert(backend.linear_weight(gate_up), backend.linear_weight([down])) for gate_up, down in weights
    ]

    def mixed(some: Array, scores: Array) -> Array:
        found = backend.moe(
            backend.tensor(some), backend.tensor(scores), backend.experts(made), 2, True, "silu"
        )
        return backend.to_host(found)

    together = mixed(x, logits)
    alone = [mixed(x[i : i + 1], logits[i : i + 1]) for i in range(tokens)]
    assert together.tobytes() == np.concatenate(alone).tobytes()
    expected = np.zeros_like(x)
    for token in range(tokens):
        chosen = np.argsort(-logits[token])[:2]
        shares = np.exp(logits[token, chosen] - logits[token].max())
        for share, expert in zip(shares / shares.sum(), chosen, strict=True):
            row = backend.tensor(x[token : token + 1])
            inner = backend.gated_linear(row, made[expert].gate_up, "silu")
            expected[token] += share * backend.to_host(backend.linear(inner, made[expert].down))[0]
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-5)


def test_parts_that_do_not_fit_are_refused() -> None:
    backend = CpuBackend()
    packed = grouped(16, 64)
    with pytest.raises(BackendError, match=r"a weight \[16, 64\] of float32 beside packed ones"):
        backend.linear_weight([packed, host_tensor(random(16, 64))])
    scales = packed.parts[SCALES]
    short = {**packed.parts, SCALES: HostTensor("float16", (16, 1), scales.data[:32])}
    with pytest.raises(ModelError, match=r"scales must be \[16, 2\], not .*\[16, 1\]"):
        backend.linear_weight([PackedWeight(packed.scheme, packed.shape, short)])
    odd = grouped(16, 64, size=48)
    with pytest.raises(ModelError, match="groups must be of multiples of 32 columns"):
        backend.linear_weight([odd])
    order = HostTensor("int32", (64,), np.full(64, 64, "<i4").view(np.uint8))
    with pytest.raises(ModelError, match="the order must hold columns"):
        backend.linear_weight([PackedWeight(packed.scheme, packed.shape, {**packed.parts, ORDER: order})])
