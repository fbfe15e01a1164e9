"""Writing a quantised copy of a checkpoint: what ``vllmlite quantize`` does."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vllmlite.backends.base import HostTensor, QuantizedTensor
from vllmlite.backends.cpu import CpuBackend
from vllmlite.errors import ModelError, ParameterError
from vllmlite.hub.snapshot import CONFIG_FILES, INDEX
from vllmlite.models import open_model, read_spec
from vllmlite.models.hf_config import quantization_config
from vllmlite.weights.checkpoint import stored_names
from vllmlite.weights.json_object import read_object
from vllmlite.weights.parts import ModelWeights
from vllmlite.weights.quantized import stored_shapes
from vllmlite.weights.safetensors import Layout, write_safetensors


def quantize_checkpoint(source: Path, target: Path, kind: str, threads: int | None = None) -> None:
    """Write the checkpoint in directory ``source`` to the new directory ``target``, the weights of its products in
    ``kind``, everything else as it is; an output layer tied to the embedding becomes one of its own.

    ``threads``: of the CPU; None: as many as the process may use. ModelError says what is wrong with ``source``,
    ParameterError that ``target`` exists, BackendError that the native CPU backend, which quantises, is not there."""
    if source.is_file():
        raise ModelError(f"{source}: is a GGUF file; accepted: a directory with a checkpoint")
    spec = read_spec(source)
    if spec.quantization is not None:
        raise ModelError(f"{source}: its weights are {spec.quantization} already")
    if target.exists():
        raise ParameterError("output", str(target), "exists already: name a new directory")
    weights = open_model(source, spec)
    made = replace(spec, quantization=kind)
    shapes = made.weights()
    kinds = {source.key: name for name, source in made.tensors().items() if source.product}
    floats = [name for name in shapes if name not in kinds]
    # Codes first: their sizes keep every tensor up to the scales at multiples of 64 bytes.
    stored = {name: (stored_names(name), stored_shapes(kind, shapes[name])) for name in kinds}
    layout: Layout = {
        **{names[0]: ("uint8", its_shapes[0]) for names, its_shapes in stored.values()},
        **{name: (weights.stored(name).dtype, shapes[name]) for name in floats},
        **{names[1]: ("bfloat16", its_shapes[1]) for names, its_shapes in stored.values()},
    }

    def tensors(backend: CpuBackend) -> Iterator[HostTensor]:
        scales = []
        for key, name in kinds.items():
            quantized = _quantize(backend, weights, name, key, kind)
            scales.append(quantized.scales)
            yield quantized.codes
        yield from map(weights.stored, floats)
        yield from scales

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_safetensors(partial / "model.safetensors", tensors(CpuBackend(threads=threads)), layout)
        for pattern in CONFIG_FILES:
            for file in source.glob(pattern):
                if file.is_file() and file.name != INDEX:
                    shutil.copyfile(file, partial / file.name)
        config = read_object(source / "config.json") | {"quantization_config": quantization_config(kind)}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _quantize(backend: CpuBackend, weights: ModelWeights, name: str, key: str, kind: str) -> QuantizedTensor:
    try:
        return backend.quantize(weights(name if name in weights.sources else "embedding.weight"), kind)
    except ModelError as error:
        raise ModelError(f"tensor {key!r}: {error}") from error
