"""Grouped integer weights: the forms that checkpoints store convert to the common form exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from native import needs_native_cpu
from numpy.typing import NDArray
from packers import PACKERS, Packer

from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import ModelError
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.quantization_config import read_quantization
from vllmlite.weights.host import HostTensor, PackedWeight, float_values
from vllmlite.weights.packing import Packing
from vllmlite.weights.schemes.grouped import ORDER, ZEROS, GroupedScheme, IntegerScheme

INTEGERS = [name for name in PACKERS if name.startswith(("awq", "gptq", "pack-quantized", "int-quantized"))]
CODES = {"I32": "int32", "I64": "int64", "I8": "int8", "F16": "float16", "F32": "float32"}


def stored(
    packer: Packer, path: Path, rows: int = 64, columns: int = 128
) -> tuple[PackedWeight, NDArray[Any]]:
    """A weight as a checkpoint stores it, and its values."""
    values = np.random.default_rng(rows * columns).normal(0, 0.1, (rows, columns)).astype(np.float32)
    tensors, meaning = packer.pack(values)
    quantization = read_quantization(HfConfig({"quantization_config": packer.config}, "config.json"), path)
    assert quantization is not None
    scheme = quantization.scheme("layers.0.mlp.up_proj.weight")
    assert isinstance(scheme, IntegerScheme)
    parts = {
        suffix: HostTensor(CODES[code], part.shape, np.ascontiguousarray(part).reshape(-1).view(np.uint8))
        for suffix, (code, part) in tensors.items()
    }
    return PackedWeight(scheme, (rows, columns), parts), meaning


def grouped(weight: PackedWeight) -> PackedWeight:
    assert isinstance(weight.scheme, IntegerScheme)
    found = weight.scheme.to_grouped(weight)
    assert found is not None
    expected = found.scheme.parts(found.shape)
    assert all(expected[suffix].accepts(part) for suffix, part in found.parts.items())
    assert {suffix for suffix, part in expected.items() if not part.optional} <= found.parts.keys()
    return found


def values(weight: PackedWeight) -> NDArray[np.float32]:
    return weight.scheme.dequantize(weight)


@pytest.mark.parametrize("name", INTEGERS)
def test_conversion_is_exact(name: str, tmp_path: Path) -> None:
    weight, meaning = stored(PACKERS[name], tmp_path)
    found = grouped(weight)
    assert isinstance(found.scheme, GroupedScheme) and isinstance(weight.scheme, IntegerScheme)
    assert found.scheme.bits == (8 if weight.scheme.bits == 8 else 4)
    assert (ZEROS in found.parts) == (not found.scheme.symmetric)
    assert (ORDER in found.parts) == ("desc_act" in name or "actorder" in name or name == "gptq 3 bits")
    assert values(found).tobytes() == values(weight).tobytes()
    np.testing.assert_array_equal(values(found), meaning.astype(np.float32))


@needs_native_cpu
@pytest.mark.parametrize("name", INTEGERS)
def test_native_conversion_is_the_same(name: str, tmp_path: Path) -> None:
    for rows, columns in ((32, 128), (96, 256), (160, 640)):
        weight, _ = stored(PACKERS[name], tmp_path, rows, columns)
        assert isinstance(weight.scheme, IntegerScheme)
        found = weight.scheme.to_grouped(weight, CpuBackend(threads=2).repack)
        assert found is not None and same(found, grouped(weight))


@pytest.mark.parametrize(
    "packer", [packers.gptq(4, 64), packers.gptq(3, 64), packers.gptq(8, 128, symmetric=False)]
)
def test_the_last_group_may_be_short(packer: Packer, tmp_path: Path) -> None:
    """The packers write whole groups, so the last columns are cut off."""
    weight, meaning = stored(packer, tmp_path, 32, 256)
    kept = 256 - 32
    size = packer.config["bits"]
    groups = -(-kept // packer.config["group_size"])
    cut = {"qweight": kept * size // 32, "g_idx": kept, "scales": groups, "qzeros": groups}
    parts = {
        suffix: HostTensor(
            part.dtype,
            (cut[suffix], *part.shape[1:]),
            part.data.reshape(part.shape[0], -1)[: cut[suffix]].reshape(-1),
        )
        for suffix, part in weight.parts.items()
    }
    short = PackedWeight(weight.scheme, (32, kept), parts)
    np.testing.assert_array_equal(values(grouped(short)), meaning[:, :kept].astype(np.float32))


@pytest.mark.parametrize("name", INTEGERS)
def test_slices_convert_to_slices(name: str, tmp_path: Path) -> None:
    """Slices as the ranks of tensor parallelism take them."""
    weight, _ = stored(PACKERS[name], tmp_path)
    source, whole = weight.scheme, grouped(weight)
    rows = source.take_rows(weight, [(32, 64), (0, 32)])
    expected = whole.scheme.take_rows(whole, [(32, 64), (0, 32)])
    assert same(grouped(rows), expected)
    assert values(expected).tobytes() == values(weight)[np.r_[32:64, 0:32]].tobytes()
    if ORDER in whole.parts:
        with pytest.raises(ModelError, match="columns are permuted"):
            whole.scheme.take_columns(whole, 0, 64)
        return
    columns = whole.scheme.take_columns(whole, 64, 128)
    assert same(grouped(source.take_columns(weight, 64, 128)), columns)
    assert values(columns).tobytes() == np.ascontiguousarray(values(weight)[:, 64:]).tobytes()


def same(one: PackedWeight, other: PackedWeight) -> bool:
    return (one.scheme, one.shape) == (other.scheme, other.shape) and {
        suffix: (part.shape, part.data.tobytes()) for suffix, part in one.parts.items()
    } == {suffix: (part.shape, part.data.tobytes()) for suffix, part in other.parts.items()}


class Grouping(TorchBackend):
    """A backend that multiplies grouped 4-bit weights."""

    schemes = frozenset({"w4a16"})


def test_a_backend_that_multiplies_the_form_gets_it(tmp_path: Path) -> None:
    packing = Packing(Grouping())
    weight, _ = stored(packers.gptq(4, 32), tmp_path)
    packed = packing(weight)
    assert isinstance(packed, PackedWeight)
    assert packed.scheme == packing.scheme(weight.scheme) == GroupedScheme(4, 32, True)
    assert packing.treatment(weight.scheme) == "kept"
    of_8_bits, _ = stored(packers.gptq(8, 32), tmp_path)
    assert packing.scheme(of_8_bits.scheme) is None
    assert packing.treatment(of_8_bits.scheme) == "dequantised to float32"
    assert isinstance(packing(of_8_bits), HostTensor)


def test_some_columns_of_an_act_order_weight_become_floats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The columns belong to all groups, in different numbers."""
    weight, meaning = stored(packers.gptq(4, 32, order=True), tmp_path)
    some = weight.scheme.take_columns(weight, 0, 64)
    found = Packing(Grouping())(some)
    assert isinstance(found, HostTensor)
    np.testing.assert_array_equal(float_values(found), meaning[:, :64].astype(np.float32))
    assert "gptq weights with uneven groups" in caplog.text


@pytest.mark.parametrize("suffix", ["scales", "qzeros"])
def test_damaged_weights_are_refused(suffix: str, tmp_path: Path) -> None:
    weight, _ = stored(packers.gptq(4, 32), tmp_path)
    part = weight.parts[suffix]
    data = part.data.copy()
    data[-2:] = 255
    broken = PackedWeight(
        weight.scheme, weight.shape, {**weight.parts, suffix: HostTensor(part.dtype, part.shape, data)}
    )
    with pytest.raises(
        ModelError, match="a scale is not finite" if suffix == "scales" else "qzeros of a sym"
    ):
        grouped(broken)
