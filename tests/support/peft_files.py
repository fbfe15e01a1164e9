"""Adapter directories as PEFT writes them, made without PEFT, and checkpoints with an adapter merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Factors = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""``a [rank, in]`` and ``b [out, rank]`` by module."""


def random_factors(
    modules: Mapping[str, tuple[int, int]], rank: int | Mapping[str, int], seed: int = 0
) -> Factors:
    """Factors for modules ``[out, in]``."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (out, inner) in modules.items():
        own = rank if isinstance(rank, int) else rank[name]
        a, b = rng.standard_normal((own, inner)), rng.standard_normal((out, own))
        found[name] = (0.3 * a).astype(np.float32), (0.3 * b).astype(np.float32)
    return found


def write_peft(
    path: Path,
    factors: Factors,
    prefix: str = "base_model.model.",
    *,
    more: Mapping[str, NDArray[np.float32]] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter, whose configuration has ``config`` besides PEFT's defaults, and return its path. ``more`` are
    tensors beside the factors."""
    path.mkdir(parents=True, exist_ok=True)
    first = next(iter(factors.values()))[0]
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": len(first), "lora_alpha": 8, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in factors}), "modules_to_save": None,
        "base_model_name_or_path": "some/base", "lora_dropout": 0.1, "rank_pattern": {},
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(fields | config))
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = a
        tensors[f"{prefix}{name}.lora_B.weight"] = b
    tensors |= {f"{prefix}{name}": np.ascontiguousarray(tensor) for name, tensor in (more or {}).items()}
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def merge_factors(path: Path, merged: Path, factors: Factors, scale: float) -> Path:
    """Write the float32 checkpoint ``path`` with ``scale * b @ a`` added to each module's weight."""
    shutil.copytree(path, merged)
    tensors = {key: value.copy() for key, value in load_file(path / "model.safetensors").items()}
    for name, (a, b) in factors.items():
        tensors[f"{name}.weight"] += np.float32(scale) * (b @ a)
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    return merged
