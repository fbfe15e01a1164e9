"""Checkpoints that compressed-tensors itself has written equal the values that it meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu
from quantized_checkpoints import logits

from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.torch import TorchBackend

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from compressed_tensors.compressors import ModelCompressor  # noqa: E402
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam  # noqa: E402

INT4 = {"num_bits": 4, "type": "int"}
INT8 = {"num_bits": 8, "type": "int"}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
WEIGHTS: dict[str, dict[str, Any]] = {
    f"int{args['num_bits']} {kind} {'symmetric' if symmetric else 'asymmetric'}": args
    | {"strategy": kind, "symmetric": symmetric}
    | ({"group_size": 32} if kind == "group" else {})
    for args in (INT4, INT8)
    for kind in ("group", "channel")
    for symmetric in (True, False)
} | {
    "fp8 tensor": FLOAT8 | {"strategy": "tensor"},
    "fp8 channel": FLOAT8 | {"strategy": "channel"},
    "fp8 block": FLOAT8 | {"strategy": "block", "block_structure": [32, 64]},
    "nvfp4": FLOAT4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    "mxfp4": FLOAT4 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
}


def ranges(weight: Any, args: QuantizationArgs) -> tuple[Any, Any]:
    """The least and the greatest element of every part of ``weight`` [N, K] that has a scale of its own."""
    axes: tuple[int, ...]
    match args.strategy:
        case "tensor":
            parts, axes = weight[None], (1, 2)
        case "block":
            rows, columns = args.block_structure
            parts = weight.reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
            axes = (1, 3)
        case _:
            parts = weight.reshape(weight.shape[0], -1, args.group_size or weight.shape[1])
            axes = (2,)
    return parts.amin(axes), parts.amax(axes)


def write(path: Path, floats: Path, args: dict[str, Any]) -> None:
    """Write the model at ``floats`` with weights quantised by ``args`` to ``path``, and their values to ``floats``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    values = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight, own = module.weight.data, module.quantization_scheme.weights
        shared = {}
        if own.strategy == "tensor_group":
            shared["global_scale"] = generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
            module.weight_global_scale.data.copy_(shared["global_scale"])
        scale, zero = calculate_qparams(*ranges(weight, own), own, **shared)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
        values[f"{name}.weight"] = fake_quantize(
            weight, module.weight_scale, getattr(module, "weight_zero_point", None), own, **shared
        ).float()
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    meant = transformers.AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    meant.load_state_dict(values, strict=False)
    meant.save_pretrained(floats)


@needs_native_cpu
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_checkpoint_equals_the_values_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    packed, floats = tmp_path / "packed", tmp_path / "floats"
    write_checkpoint(floats, "Llama", intermediate_size=128)
    write(packed, floats, WEIGHTS[name])
    assert "quantization_config" in json.loads((packed / "config.json").read_text())
    expected = logits(floats, TorchBackend())
    for backend in (TorchBackend(), CpuBackend()):
        np.testing.assert_allclose(
            logits(packed, backend), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )
