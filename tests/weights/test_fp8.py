"""Checkpoints of 8-bit floats whose products quantise activations."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from native import needs_native_cpu
from packers import FP8
from quantized_checkpoints import check_on_cuda, logits, quantised, tensors_of, write

from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.cli import probe
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import BackendError, ModelError
from vllmlite.models import load_model
from vllmlite.runner.build import build_runner, plan_for
from vllmlite.weights.host import HostTensor, PackedWeight, float_values
from vllmlite.weights.packing import Packing
from vllmlite.weights.schemes.float8 import Float8Scheme


@needs_native_cpu
@pytest.mark.parametrize("name", FP8)
def test_products_quantise_activations_on_torch_and_not_on_the_cpu(name: str, tmp_path: Path) -> None:
    path, floats = quantised(tmp_path, FP8[name])
    expected, unquantised = logits(path, TorchBackend()), logits(floats, TorchBackend())
    size = np.abs(unquantised).max()
    assert 0 < np.abs(expected - unquantised).mean() < 0.1 * size
    np.testing.assert_allclose(logits(path, CpuBackend("float32")), unquantised, rtol=0, atol=1e-3 * size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["Llama", "Phi3", "Mixtral"])
@pytest.mark.parametrize("name", FP8)
def test_checkpoints_run_on_cuda(name: str, family: str, dtype: str, tmp_path: Path) -> None:
    if "blocks" in name and family == "Phi3":
        pytest.skip("fused projections of this size end within a block")
    check_on_cuda(tmp_path, FP8[name], family, dtype, "fp8_w8a8")


@needs_native_cpu
@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("torch", "fp8_w8a8 weights kept, activations in float8_e4m3"),
        ("cpu", "fp8_w8a8 weights kept, activations in float32, not float8_e4m3"),
    ],
)
def test_the_start_line_says_what_happens_to_activations(backend: str, said: str, tmp_path: Path) -> None:
    path, _ = quantised(tmp_path, FP8["channel"])
    config = EngineConfig(
        model=str(path), backend=backend, device="cpu", dtype="float32", kv_cache_memory_bytes=1 << 20
    )
    assert said in build_runner(config, plan_for(config)).backend_choice


@needs_native_cpu
def test_env_says_how_backends_multiply_the_weights(tmp_path: Path) -> None:
    path, _ = quantised(tmp_path, FP8["blocks"])
    forms = dict(probe.weight_forms(str(path)))
    assert forms["torch on cpu"] == "fp8_w8a8 weights kept, activations in float8_e4m3"
    assert re.fullmatch(r"fp8_w8a8 weights .*, activations in \w+, not float8_e4m3", forms["cpu on cpu"])


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_input_scales_that_are_not_positive_are_refused(scale: float, tmp_path: Path) -> None:
    path, _ = quantised(tmp_path, FP8["tensor, static"])
    tensors = tensors_of(path)
    name = next(name for name in tensors if name.endswith("input_scale"))
    tensors[name] = "F32", np.array([scale], np.float32)
    write(path, tensors)
    with pytest.raises(ModelError, match=r"input_scale is .*; accepted: finite numbers above 0"):
        load_model(TorchBackend(), path, max_model_len=64, block_size=16)


def test_float_weights_are_quantised_at_load(tmp_path: Path) -> None:
    _, floats = quantised(tmp_path, FP8["channel"])
    expected = logits(floats, TorchBackend())
    backend = TorchBackend()
    found = logits(floats, backend, Packing(backend, "fp8"))
    size = np.abs(expected).max()
    assert 0 < np.abs(found - expected).mean() < 0.1 * size


@needs_native_cpu
def test_backends_without_products_of_8_bit_floats_decline_them(tmp_path: Path) -> None:
    _, floats = quantised(tmp_path, FP8["channel"])
    config = EngineConfig(model=str(floats), backend="cpu", quantization="fp8")
    with pytest.raises(BackendError, match="cpu on cpu declined: it does not multiply fp8 weights in"):
        build_runner(config, plan_for(config))


@pytest.mark.parametrize("name", ["torch", "cuda"])
def test_quantised_rows_are_the_nearest(name: str) -> None:
    try:
        backend = TorchBackend() if name == "torch" else CudaBackend("cuda", "bfloat16")
    except BackendError as error:
        pytest.skip(str(error))
    values = (np.random.default_rng(0).standard_normal((70, 272)) * 0.02).astype(np.float32)
    values[3], values[5, 7] = 0, 30
    bits = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    weight = backend.quantize(HostTensor("float32", bits.shape, bits.reshape(-1).view(np.uint8)), "fp8_w8a8")
    found = weight.scheme.dequantize(weight)
    steps = np.maximum(np.abs(bits) * 2.0**-4, np.abs(bits).max(1, keepdims=True) / 448 * 2.0**-10)
    assert (np.abs(found - bits) <= steps * 1.001).all()
    bits[2, 1] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        backend.quantize(HostTensor("float32", bits.shape, bits.reshape(-1).view(np.uint8)), "fp8_w8a8")


@pytest.mark.parametrize("granularity", ["channel", "tensor", "block"])
def test_operands_are_slices_of_the_weight(granularity: str) -> None:
    """Rows and columns are taken at whole blocks; the scales follow."""
    block = (128, 128) if granularity == "block" else (1, 1)
    scheme = Float8Scheme(granularity, block, inputs="dynamic")
    draw = np.random.default_rng(0)
    parts = {}
    for suffix, part in scheme.parts((384, 256)).items():
        if suffix == "weight":
            parts[suffix] = HostTensor("float8_e4m3", part.shape, draw.integers(0, 120, 384 * 256, np.uint8))
        elif not part.optional:
            values = draw.random(part.shape, np.float32)
            parts[suffix] = HostTensor("float32", part.shape, values.reshape(-1).view(np.uint8))
    weight = PackedWeight(scheme, (384, 256), parts)
    taken = scheme.take_columns(scheme.take_rows(weight, [(128, 384)]), 128, 256)
    np.testing.assert_array_equal(scheme.dequantize(taken), scheme.dequantize(weight)[128:, 128:])
    operand = scheme.operand(taken)
    wide = operand.scales if operand.blocks else operand.scales[:, None]
    wide = np.kron(wide, np.ones((128, 128))) if operand.blocks else wide
    codes = HostTensor("float8_e4m3", operand.values.shape, operand.values.reshape(-1))
    np.testing.assert_allclose(float_values(codes) * wide, scheme.dequantize(taken), rtol=1e-6)
