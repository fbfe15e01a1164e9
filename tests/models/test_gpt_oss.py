"""gpt-oss checkpoints with MXFP4 experts, as they are published, against transformers' model of their values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import write_checkpoint
from gguf_families import metadata_of, tensors_of
from gguf_files import encode, random_blocks
from model_runs import a_backend, chunked, edit_config, expected_logits, first_logits, paged_model, prompts
from native import needs_native_cpu

from vllmlite.backends.cpu import CpuBackend
from vllmlite.errors import ModelError, ParameterError
from vllmlite.models import load_model, open_model, read_spec
from vllmlite.models.tensors import sources
from vllmlite.quantize import quantize_checkpoint
from vllmlite.weights.packing import Packing

SIZES: dict[str, Any] = {
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 9,
    "num_hidden_layers": 2,
}
FLOATS = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def values_of(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights ``[experts, in, out]`` of MXFP4 ``blocks [experts, out, in / 32, 16]``: a byte has two elements, the
    first in its low bits; an element is a sign, then an index of E2M1; a scale is an exponent plus 127."""
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).int()
    signed = E2M1[codes & 7] * (1 - 2 * (codes >> 3))
    return torch.ldexp(signed, (scales.int() - 127)[..., None]).flatten(-2).transpose(1, 2)


def write_mxfp4(path: Path, largest: int = 0) -> Any:
    """Write a tiny gpt-oss whose experts are random MXFP4 codes with scales of 2 ** -9 to 2 ** -4, and a few of 2 **
    ``largest``. Return transformers' model of its values, in float32."""
    reference = write_checkpoint(path, "GptOss", **SIZES)
    state = reference.state_dict()
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    tensors = {}
    for name, value in state.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = value.shape
            tensors[f"{name}_blocks"] = draw(0, 256, experts, rows, columns // 32, 16)
            tensors[f"{name}_scales"] = draw(118, 124, experts, rows, columns // 32)
            tensors[f"{name}_scales"][:, 5, 1] = 127 + largest
            value.copy_(values_of(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]))
        else:
            tensors[name] = value.clone()
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": FLOATS})
    return reference


@pytest.mark.parametrize("largest", [0, 7])
def test_mxfp4_equals_transformers(tmp_path: Path, device: str, largest: int) -> None:
    """With ordinary and with large scales."""
    if device == "native-cuda":
        pytest.skip("gpt-oss runs on cpu, torch only")
    reference = write_mxfp4(tmp_path, largest)
    paged = paged_model(tmp_path, device)
    sequences = prompts()[3:6]
    for found, sequence in zip(chunked(paged, sequences, "ragged"), sequences, strict=True):
        wanted = expected_logits(reference, sequence, False)
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


@needs_native_cpu
def test_mxfp4_blocks_of_ggufs_stay_packed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "GptOss", **SIZES)
    spec, tensors = read_spec(tmp_path), tensors_of(tmp_path, "gpt-oss")
    for name, (_, shape, _) in tensors.items():
        if name.endswith("_exps.weight"):
            blocks = random_blocks("MXFP4", math.prod(shape) // 32, len(name))
            tensors[name] = "MXFP4", shape, blocks.tobytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(encode(metadata_of(spec, "gpt-oss"), tensors))
    backend = CpuBackend()
    experts = sources(read_spec(path))["0.experts.0.up.weight"]
    weights = open_model(path, read_spec(path), Packing(backend, keep_blocks=True))
    assert experts.key in weights.packed_keys()
    kept, floats = first_logits(backend, path, keep_blocks=True), first_logits(backend, path)
    assert kept.tobytes() == floats.tobytes()


def test_formats_that_cannot_store_its_experts_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "GptOss", **SIZES)
    with pytest.raises(ParameterError, match="accepted for GptOssForCausalLM: formats of GGUF"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "target", "int8")


def test_experts_that_are_not_as_announced_are_refused(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    edit_config(tmp_path, intermediate_size=64)
    with pytest.raises(ModelError, match=r"gate_up_proj.*expected \[5, 128, "):
        load_model(a_backend("cpu"), tmp_path, max_model_len=64, block_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu_limit": 6.0}, "swiglu_limit=6.0"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha=1.0"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_changes_the_result_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path, "GptOss", **SIZES)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        read_spec(tmp_path)
