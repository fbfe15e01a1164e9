"""Writing a quantised copy of a checkpoint, for ``vllmlite quantize``."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vllmlite.backends.cpu import CpuBackend
from vllmlite.errors import ModelError, ParameterError
from vllmlite.hub.snapshot import CONFIG_FILES, INDEX
from vllmlite.models import open_model, read_spec
from vllmlite.models.quantization_config import own_config, own_quantization
from vllmlite.models.tensors import sources, stored_shapes
from vllmlite.weights.checkpoint import part_name
from vllmlite.weights.host import HostTensor, PackedWeight, Part, Shape
from vllmlite.weights.json_object import read_object
from vllmlite.weights.packing import Packing
from vllmlite.weights.parts import TABLE, ModelWeights
from vllmlite.weights.safetensors import Layout, write_safetensors
from vllmlite.weights.schemes.tiles import QWEIGHT, SCALES, TILES


def quantize_checkpoint(source: Path, target: Path, kind: str, threads: int | None = None) -> None:
    """Write a copy of the checkpoint directory ``source`` to the new directory ``target``, quantised to ``kind``.

    Weight matrices are quantised; everything else is copied. An output layer tied to the embedding is stored
    separately. ``threads``: CPU threads, None: all that the process may use. Raises ModelError for a bad ``source``,
    ParameterError if ``target`` exists, BackendError without the native CPU backend, which does the quantisation."""
    if source.is_file():
        raise ModelError(f"{source}: is a GGUF file; accepted: a directory with a checkpoint")
    spec = read_spec(source)
    if spec.quantization is not None:
        raise ModelError(f"{source}: its weights are {spec.quantization.method} already")
    if target.exists():
        raise ParameterError("output", str(target), "exists already: name a new directory")
    backend, scheme = CpuBackend(threads=threads), TILES[kind]
    weights = open_model(source, spec, Packing(backend))
    made = replace(spec, quantization=own_quantization(kind))
    shapes = stored_shapes(made)
    names = {source.key: name for name, source in sources(made).items() if source.product}
    floats = [key for key in shapes if key not in names]

    def stored_float(key: str) -> HostTensor:
        stored = weights.stored.tensor(key)
        assert isinstance(stored, HostTensor)
        return stored

    parts = {key: scheme.parts(shapes[key]) for key in names}
    # The quantised weights come first: with their sizes, all tensors before the scales are 64-byte aligned.
    layout: Layout = {
        **{part_name(key, QWEIGHT): _entry(parts[key][QWEIGHT]) for key in names},
        **{key: (stored_float(key).dtype, shapes[key]) for key in floats},
        **{part_name(key, SCALES): _entry(parts[key][SCALES]) for key in names},
    }

    def tensors() -> Iterator[HostTensor]:
        scales = []
        for key, name in names.items():
            packed = _quantize(backend, weights, name, key, kind)
            scales.append(packed.parts[SCALES])
            yield packed.parts[QWEIGHT]
        yield from map(stored_float, floats)
        yield from scales

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_safetensors(partial / "model.safetensors", tensors(), layout)
        for pattern in CONFIG_FILES:
            for file in source.glob(pattern):
                if file.is_file() and file.name != INDEX:
                    shutil.copyfile(file, partial / file.name)
        config = read_object(source / "config.json") | {"quantization_config": own_config(kind)}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _entry(part: Part) -> tuple[str, Shape]:
    return part.dtype, part.shape


def _quantize(backend: CpuBackend, weights: ModelWeights, name: str, key: str, kind: str) -> PackedWeight:
    try:
        return backend.quantize(weights.floats(name if name in weights.sources else TABLE), kind)
    except ModelError as error:
        raise ModelError(f"tensor {key!r}: {error}") from error
