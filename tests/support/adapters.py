"""Random LoRA adapters, and the weights that they change merged into a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from vllmlite.models import read_spec
from vllmlite.models.adapters import ability, places
from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources
from vllmlite.weights.adapter import EMBEDDING, GAIN, HEAD, Adapter, LowRank
from vllmlite.weights.host import HostTensor, float_values
from vllmlite.weights.parts import TABLE


def random_adapter(
    spec: DecoderSpec,
    seed: int,
    rank: int | None = None,
    parts: Collection[str] | None = None,
    abilities: Collection[str] = (),
) -> Adapter:
    """An adapter of every place whose last name is in ``parts`` (None: in all places), of rank ``rank``, by default one
    that differs from place to place. Parts of a fused projection have the same ``a``.

    It makes use of ``abilities``; gains are in every other place."""
    rng = np.random.default_rng(seed)
    found, shared = sources(spec), {}
    weights: dict[str, LowRank] = {}
    for name, (out, columns) in places(spec).items():
        if parts is not None and name.rpartition(".")[2] not in parts:
            continue
        if ability(name) not in (None, *abilities):
            continue
        key = found[f"{name}.weight"].key if f"{name}.weight" in found else name
        if (key, columns) not in shared:
            r = rank or int(rng.integers(1, 12))
            shared[key, columns] = rng.standard_normal((r, columns)).astype(np.float32)
        a = shared[key, columns]
        b = (rng.standard_normal((out, len(a))) * 0.1).astype(np.float32)
        gain = None
        if GAIN in abilities and len(weights) % 2:
            gain = rng.uniform(0.5, 1.5, (2, out)).astype(np.float32)
            gain[1] *= f"{name}.bias" in found
        weights[name] = LowRank(_host(a), _host(b), float(rng.choice([0.25, 0.5, 1.3])) / len(a) ** 0.5, gain)
    return Adapter(f"random adapter {seed}", weights)


def delta(change: LowRank) -> NDArray[np.float64]:
    """``scale * b @ a`` in float64."""
    a, b = (float_values(part).astype(np.float64) for part in (change.a, change.b))
    return change.scale * (b @ a)


def merge(path: Path, merged: Path, adapter: Adapter) -> None:
    """Write the float32 checkpoint ``path`` with the changes of ``adapter`` to its weights."""
    shutil.copytree(path, merged)
    spec = read_spec(path)
    tensors = {key: value.copy() for key, value in load_file(path / "model.safetensors").items()}
    if spec.tied_head and HEAD in adapter.weights:
        head = f"{spec.keys.head}.weight"
        tensors[head] = tensors[sources(spec)[TABLE].key].copy()
        config = json.loads((path / "config.json").read_text())
        (merged / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        spec = read_spec(merged)
    found = sources(spec)
    for name, change in adapter.weights.items():
        source = found[f"{name}.weight"]
        stored = tensors[source.key].T if source.transposed or name == EMBEDDING else tensors[source.key]
        rows = np.r_[tuple(slice(*span) for span in source.rows or [(0, len(stored))])]
        factors, shift = np.array([[1.0], [0.0]]) if change.gain is None else change.gain
        stored[rows] = factors[:, None] * stored[rows] + delta(change)
        if f"{name}.bias" in found:
            bias = found[f"{name}.bias"]
            rows = np.r_[tuple(slice(*span) for span in bias.rows or [(0, bias.stored[0])])]
            tensors[bias.key][rows] = factors * tensors[bias.key][rows] + shift
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})


def _host(values: NDArray[np.float32]) -> HostTensor:
    return HostTensor("float32", values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
