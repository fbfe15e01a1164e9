"""Options that quantise the output layer at load, or activations: what they change, what says so, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu
from packers import FP8, PACKERS, W8A8, Packer
from quantized_checkpoints import logits, quantised

from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.models import open_model, read_spec
from vllmlite.runner.build import build_runner, plan_for
from vllmlite.weights.host import PackedWeight
from vllmlite.weights.packing import Packing
from vllmlite.weights.parts import HEAD, TABLE

pytestmark = needs_native_cpu


def built(path: Path, **options: Any) -> str:
    given: dict[str, Any] = {"backend": "cpu", "kv_cache_memory_bytes": 1 << 20} | options
    config = EngineConfig(model=str(path), **given)
    return build_runner(config, plan_for(config)).backend_choice


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_output_layer_is_quantised(tied: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Qwen2", tie_word_embeddings=tied)
    packing = Packing(CpuBackend(), head="int8")
    weights = open_model(tmp_path, read_spec(tmp_path), packing)
    schemes = {
        name: weights.packed_scheme(name) for name, source in weights.sources.items() if source.product
    }
    if tied:
        schemes[TABLE] = weights.packed_head
    assert {name for name, scheme in schemes.items() if scheme is not None} == {TABLE if tied else HEAD}
    expected, found = logits(tmp_path, CpuBackend()), logits(tmp_path, CpuBackend(), packing)
    difference = np.abs(found - expected)
    assert 0 < difference.max() < 0.02 * np.abs(expected).max()
    assert "output layer quantised to int8 if stored as floats" in built(tmp_path, quantize_head="int8")


@pytest.mark.parametrize("name", ["awq g32", "gptq desc_act", "pack-quantized by channel"])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_activations_are_quantised_on_request(name: str, family: str, tmp_path: Path) -> None:
    path, floats = quantised(tmp_path, PACKERS[name], family)
    expected = logits(floats, CpuBackend())
    found = [
        logits(path, backend, Packing(backend, int8_activations=True))
        for backend in (CpuBackend(), TorchBackend())
    ]
    size = np.abs(expected).max()
    for each in found:
        assert 0 < np.abs(each - expected).mean() < 0.03 * size
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=0.03 * size)
    assert "activations in int8" in built(path, activation_dtype="int8")
    assert "activations in float32" in built(path)


@pytest.mark.parametrize(
    "packer", [PACKERS["awq g32"], PACKERS["gptq 8 bits by channel"], FP8["tensor, static"], *W8A8.values()]
)
def test_dummy_weights_are_multiplied_as_stored_ones_are(packer: Packer, tmp_path: Path) -> None:
    path, _ = quantised(tmp_path, packer)
    spec = read_spec(path)
    for backend in (CpuBackend(), TorchBackend()):
        packing = Packing(backend, int8_activations=True)
        stored, dummy = open_model(path, spec, packing), open_model(path, spec, packing, "dummy")
        names = [name for name, source in stored.sources.items() if source.product and name != HEAD]
        for one, other in zip(stored.products(names), dummy.products(names), strict=True):
            assert isinstance(one, PackedWeight) == isinstance(other, PackedWeight)
            if isinstance(one, PackedWeight) and isinstance(other, PackedWeight):
                assert other.scheme == one.scheme
                assert 0.01 < other.scheme.dequantize(other).std() < 0.04


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    packed, floats = quantised(tmp_path, PACKERS["awq g32"])
    fp8, _ = quantised(tmp_path / "fp8", PACKERS["fp8 blocks"])
    for path in (floats, fp8):
        with pytest.raises(
            ParameterError, match=r"activation_dtype='int8'.* needs integer weights in groups"
        ):
            built(path, activation_dtype="int8")
    assert "output layer quantised" in built(packed, quantize_head="int8", activation_dtype="int8")
