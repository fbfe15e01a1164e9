"""Small checkpoints with packed weights, float checkpoints of the same values, and their logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from numpy.typing import NDArray
from packers import Packer
from paged import PagedModel
from safetensors.numpy import load_file

from vllmlite.backends.base import Backend
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import BackendError
from vllmlite.models import load_model, read_spec
from vllmlite.models.tensors import sources
from vllmlite.weights.host import HostTensor
from vllmlite.weights.packing import Packing
from vllmlite.weights.safetensors import read_safetensors, write_safetensors

DTYPES = {
    "I32": "int32", "I64": "int64", "I8": "int8", "U8": "uint8", "F16": "float16", "F32": "float32",
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3",
}  # fmt: skip


def write(path: Path, tensors: dict[str, tuple[str, NDArray[Any]]], **config: Any) -> None:
    """Write a checkpoint of ``tensors`` with the existing configuration."""
    held = {
        name: HostTensor(DTYPES[dtype], array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        for name, (dtype, array) in tensors.items()
    }
    (path / "model.safetensors").unlink(missing_ok=True)
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in held.items()}
    write_safetensors(path / "model.safetensors", held.values(), layout)
    stored = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(stored | config))


def tensors_of(path: Path) -> dict[str, tuple[str, NDArray[Any]]]:
    """The tensors of a checkpoint, as :func:`write` takes them."""
    codes = {name: code for code, name in DTYPES.items()}
    kinds = {"bfloat16": "uint16", "float8_e4m3": "uint8"}
    return {
        name: (
            codes[tensor.dtype],
            tensor.data.view(kinds.get(tensor.dtype, tensor.dtype)).reshape(tensor.shape),
        )
        for name, tensor in read_safetensors(path / "model.safetensors").items()
    }


def quantised(base: Path, packer: Packer, family: str = "Llama", **changes: Any) -> tuple[Path, Path]:
    """A checkpoint with packed weights, and a float32 checkpoint of their values."""
    packed, floats = base / "packed", base / "floats"
    for path in (packed, floats):
        write_checkpoint(path, family, **{"intermediate_size": 128} | changes)
    spec = read_spec(floats)
    stored = load_file(floats / "model.safetensors")
    products = {source.key: source for source in sources(spec).values() if source.product}
    tensors: dict[str, tuple[str, NDArray[Any]]] = {}
    meant: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, values in stored.items():
        is_head = name == "lm_head.weight"
        if name not in products or (is_head and not packer.head):
            tensors[name] = meant[name] = "F32", values
            continue
        if is_head:  # a number of rows that words can hold
            assert values.shape[0] % 32 == 0
        transposed = products[name].transposed
        parts, value = packer.pack(values.T if transposed else values)
        meant[name] = "F32", np.ascontiguousarray((value.T if transposed else value).astype(np.float32))
        stem = name.removesuffix("weight")
        tensors |= {stem + suffix: part for suffix, part in parts.items()}
        if packer.bias and f"{stem}bias" not in stored:
            tensors[f"{stem}bias"] = "F16", np.zeros(values.shape[0], np.float16)
    write(packed, tensors, quantization_config=packer.config)
    write(floats, meant)
    return packed, floats


def logits(path: Path, backend: Backend, packing: Packing | None = None) -> NDArray[np.float32]:
    model = load_model(backend, path, max_model_len=64, block_size=16, packing=packing)
    paged = PagedModel(model, num_blocks=8, max_slots=2, max_context=64)
    paged.admit(0)
    return paged.logits([0], [np.arange(3, 40, dtype=np.int32)])[0]


def check_on_cuda(base: Path, packer: Packer, family: str, dtype: str, scheme: str) -> None:
    """Check logits of a checkpoint whose products quantise activations, if the GPU has products of ``scheme``.

    Roundings to 16 bits change the codes of some activations: logits may differ from those in float32 twice as much as
    the reference's do in ``dtype``."""
    try:
        backend = CudaBackend("cuda", dtype)
    except BackendError as error:
        pytest.skip(str(error))
    if scheme not in backend.schemes:
        pytest.skip(f"{backend.details} does not multiply {scheme}")
    path, _ = quantised(base, packer, family, **({"num_local_experts": 2} if family == "Mixtral" else {}))
    exact = logits(path, TorchBackend())
    usual = np.abs(logits(path, TorchBackend("cpu", dtype)) - exact).mean()
    assert np.abs(logits(path, backend) - exact).mean() <= 2 * usual
