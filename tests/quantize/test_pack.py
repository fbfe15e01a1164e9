"""Packing of weights that are rounded already, against packers written from each format's description."""

from __future__ import annotations

from typing import Any

import numpy as np
import packers
import pytest
from numpy.typing import NDArray
from packers import Packer

from vllmlite.errors import ParameterError
from vllmlite.quantize import PACK_FORMATS, pack
from vllmlite.weights.host import HostTensor, PackedWeight, float_values
from vllmlite.weights.schemes.float8 import float8
from vllmlite.weights.schemes.gguf_blocks import BLOCK_SCHEMES
from vllmlite.weights.schemes.tiles import TILES

Array = NDArray[Any]
WEIGHT = np.random.default_rng(0).normal(0, 0.1, (64, 128)).astype(np.float32)

CASES: dict[str, tuple[Packer, str, int, int, bool]] = {
    "awq": (packers.awq(32), "awq", 4, 32, False),
    "awq by row": (packers.awq(-1), "awq", 4, 128, False),
    "gptq": (packers.gptq(4, 32), "gptq", 4, 32, True),
    "gptq 2 bits": (packers.gptq(2, 32, symmetric=False), "gptq", 2, 32, False),
    "gptq 3 bits": (packers.gptq(3, 32, symmetric=False), "gptq", 3, 32, False),
    "gptq 8 bits": (packers.gptq(8, -1), "gptq", 8, 128, True),
    "gptq version 2": (packers.gptq(4, 32, symmetric=False, version=2), "gptq_v2", 4, 32, False),
    "compressed-tensors": (packers.packed_ints(4, 32), "compressed-tensors", 4, 32, True),
    "compressed-tensors by row": (packers.packed_ints(8, None), "compressed-tensors", 8, 128, True),
    "compressed-tensors asymmetric": (
        packers.packed_ints(4, 32, symmetric=False),
        "compressed-tensors",
        4,
        32,
        False,
    ),
}


@pytest.mark.parametrize("given", ["codes", "floats", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_packed_weights_are_those_of_the_formats_description(name: str, given: str) -> None:
    packer, form, bits, group, symmetric = CASES[name]
    expected, meant = packer.pack(WEIGHT)
    codes, zeros, scales = packers.grouped(WEIGHT, bits, group, symmetric)
    weight: Any = codes - 2 ** (bits - 1) if symmetric else codes
    if given != "codes":
        weight = meant
    if given == "torch":
        dtype = "float16" if bits == 8 else "bfloat16"
        torch = pytest.importorskip("torch")
        weight = torch.from_numpy(meant).to(getattr(torch, dtype))
    made = pack(weight, scales, None if symmetric else zeros, format=form, bits=bits)
    assert made.keys() >= expected.keys()
    for suffix, (_, array) in expected.items():
        assert made[suffix].dtype == array.dtype and np.array_equal(made[suffix], array), suffix


def test_columns_in_another_order_keep_their_groups() -> None:
    order = np.random.default_rng(1).permutation(128)
    codes, zeros, scales = packers.grouped(WEIGHT[:, order], 4, 32, False)
    group_of = np.empty(128, np.int64)
    group_of[order] = np.arange(128) // 32
    made = pack(codes[:, np.argsort(order)], scales, zeros, format="gptq", group_of=group_of)
    assert np.array_equal(made["g_idx"], group_of)
    assert np.array_equal(made["qweight"], packers.in_words(codes[:, np.argsort(order)], 4).T)


@pytest.mark.parametrize(
    ("form", "bits", "scheme"),
    [
        ("int8", 8, TILES["int8"]),
        ("int4", 4, TILES["int4"]),
        ("gguf-q8_0", 8, BLOCK_SCHEMES["Q8_0"]),
        ("gguf-q4_0", 4, BLOCK_SCHEMES["Q4_0"]),
    ],
)
def test_packed_weights_mean_what_was_given(form: str, bits: int, scheme: Any) -> None:
    codes, _, scales = packers.grouped(WEIGHT, bits, 32, True)
    signed = codes - 2 ** (bits - 1)
    coarse = (scales.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)  # exact in all of them
    coarse = coarse.astype(np.float16).astype(np.float32)
    made = pack(signed, coarse, format=form)
    names = {"uint8": "uint8", "uint16": "bfloat16"}
    parts = {
        suffix: HostTensor(names[str(array.dtype)], array.shape, array.reshape(-1).view(np.uint8))
        for suffix, array in made.items()
    }
    expected = signed * np.repeat(coarse, 32, axis=1)
    assert np.array_equal(scheme.dequantize(PackedWeight(scheme, WEIGHT.shape, parts)), expected)


def test_float8_takes_the_nearest_value() -> None:
    table = packers.e4m3_values()
    ties = (table[:-1] + table[1:]) / 2
    values = np.concatenate((table, ties, [1e9, 500]))
    codes = float8(np.concatenate((values, -values)).astype(np.float32))
    even = np.arange(126) + np.arange(126) % 2
    expected = np.concatenate((np.arange(127), even, [126, 126]))
    assert np.array_equal(codes, np.concatenate((expected, expected + 128)))


def test_float8_weights_have_a_scale_for_each_row() -> None:
    scales = np.abs(WEIGHT).max(1) / 448
    made = pack(WEIGHT, scales, format="fp8")
    values = float_values(HostTensor("float8_e4m3", WEIGHT.shape, made["weight"].reshape(-1)))
    assert np.abs(values * made["weight_scale"] - WEIGHT).max() <= np.abs(WEIGHT).max() / 16
    assert made["weight_scale"].shape == (64, 1)


GOOD = np.zeros((8, 64), np.int64)
ONES = np.ones((8, 2), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "exl2"}, "format='exl2': accepted: int8"),
        ({"format": "awq", "bits": 8}, "bits=8: accepted with awq: 4"),
        ({"weight": GOOD[0]}, r"weight=\[64\]: accepted: two dimensions"),
        ({"weight": GOOD + 8}, "weight=8: accepted: whole numbers from -8 to 7"),
        ({"weight": GOOD + 0.5}, r"weight=0.5: element \[0, 0\] is not \(code - zero\) \* scale"),
        ({"weight": GOOD.astype(str)}, "weight='<U.*': accepted: an array of numbers"),
        ({"scales": ONES[:, :0]}, r"scales=\[8, 0\]: accepted: \[8, groups\], groups a divisor of 64"),
        ({"scales": np.ones((8, 3))}, r"scales=\[8, 3\]: accepted: \[8, groups\]"),
        ({"scales": ONES * np.nan}, "scales=nan: accepted: finite numbers"),
        ({"scales": ONES * 1e6}, "a scale of 1e\\+06 overflows float16"),
        ({"zeros": ONES * 16}, "zeros=16.0: accepted: whole numbers from 0 to 15"),
        ({"zeros": ONES[:, :1]}, r"zeros=\[8, 1\]: accepted: the shape of scales"),
        ({"format": "int4", "zeros": ONES}, "zeros=1: accepted with int4: 8 alone"),
        (
            {"format": "gguf-q4_0", "scales": ONES[:, :1]},
            "groups of 64.*accepted with gguf-q4_0: groups of 32",
        ),
        ({"format": "awq", "group_of": GOOD[0]}, "group_of=.*accepted with gptq"),
        ({"group_of": GOOD[0] + 2}, "group_of=2: accepted: whole numbers from 0 to 1"),
        ({"format": "fp8", "zeros": ONES}, "zeros=.*accepted with fp8: None"),
        ({"format": "fp8"}, r"scales=\[8, 2\]: accepted with fp8: one above 0 for each row"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_argument(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"weight": GOOD, "scales": ONES, "format": "gptq"} | changes
    with pytest.raises(ParameterError, match=message):
        pack(**given)


def test_every_format_packs() -> None:
    for form in PACK_FORMATS:
        scales = ONES[:, 0] if form == "fp8" else ONES
        zeros = ONES * 8 if form == "awq" else None
        assert pack(GOOD, scales, zeros, format=form)
