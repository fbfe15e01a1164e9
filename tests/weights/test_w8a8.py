"""Checkpoints of int8 weights with int8 activations (compressed-tensors' W8A8)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native import needs_native_cpu
from packers import W8A8
from quantized_checkpoints import check_on_cuda, logits, quantised

from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ModelError
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.quantization_config import parse_quantization
from vllmlite.runner.build import build_runner, plan_for


@needs_native_cpu
@pytest.mark.parametrize("name", W8A8)
@pytest.mark.parametrize("family", ["Llama", "Phi3", "Mixtral"])
def test_checkpoints_run_as_defined_on_every_backend(name: str, family: str, tmp_path: Path) -> None:
    changes = {"num_local_experts": 2} if family == "Mixtral" else {}
    path, floats = quantised(tmp_path, W8A8[name], family, **changes)
    expected, unquantised = logits(path, TorchBackend()), logits(floats, TorchBackend())
    size = np.abs(unquantised).max()
    np.testing.assert_allclose(logits(path, CpuBackend()), expected, rtol=0, atol=0.03 * size)
    assert 0 < np.abs(expected - unquantised).mean() < 0.2 * size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["Llama", "Phi3", "Mixtral"])
@pytest.mark.parametrize("name", W8A8)
def test_checkpoints_run_on_cuda(name: str, family: str, dtype: str, tmp_path: Path) -> None:
    check_on_cuda(tmp_path, W8A8[name], family, dtype, "w8a8")


@needs_native_cpu
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_start_line_says_what_happens_to_activations(backend: str, tmp_path: Path) -> None:
    path, _ = quantised(tmp_path, W8A8["dynamic"])
    config = EngineConfig(model=str(path), backend=backend, device="cpu", kv_cache_memory_bytes=1 << 20)
    choice = build_runner(config, plan_for(config)).backend_choice
    assert "w8a8 weights kept, activations in int8" in choice


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ({"num_bits": 4}, "num_bits=4; accepted: 8"),
        ({"type": "float"}, "type='float'; accepted: \"int\""),
        ({"dynamic": True, "strategy": "tensor"}, "strategy='tensor'; accepted: \"token\" for dynamic"),
        ({"dynamic": False, "strategy": "token"}, "strategy='token'; accepted: \"tensor\" for static"),
        ({"dynamic": "local"}, "dynamic='local'; accepted: true or false"),
    ],
)
def test_other_activations_are_refused(activations: dict[str, Any], message: str) -> None:
    config = json.loads(json.dumps(W8A8["dynamic"].config))
    config["config_groups"]["group_0"]["input_activations"] |= activations
    with pytest.raises(ModelError, match=re.escape(message)):
        parse_quantization(HfConfig(config, "config.json"))
