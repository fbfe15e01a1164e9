"""Runs of tiny models over paged caches, and of transformers to compare with."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native import HAS_NATIVE_CPU
from numpy.typing import NDArray
from paged import PagedModel

from vllmlite.backends.base import Backend
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import BackendError
from vllmlite.models import load_model
from vllmlite.weights.packing import Packing

LENGTHS = (1, 2, 7, 16, 17, 33, 45, 61)


def prompts(seed: int = 0) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 307, length).astype(np.int32) for length in LENGTHS]


def a_backend(device: str, dtype: str = "float32") -> Backend:
    if device == "native":
        pytest.importorskip("vllmlite._cpu", reason="vllmlite._cpu is not built")
        return CpuBackend(dtype)
    if device == "native-cuda":
        try:
            return CudaBackend("cuda", dtype)
        except BackendError as error:
            pytest.skip(str(error))
    return TorchBackend(device, dtype)


def paged_model(path: Path, device: str, dtype: str = "float32") -> PagedModel:
    model = load_model(a_backend(device, dtype), path, max_model_len=128, block_size=4)
    return PagedModel(model, num_blocks=320)


def chunked(paged: PagedModel, sequences: list[NDArray[np.int32]], how: str) -> list[NDArray[np.float32]]:
    """Logits of every token. ``whole``: all rows in one step; ``token``: one token a step; ``ragged``: random chunks,
    with decodes and prefills mixed, over rows that come and go."""
    rng = np.random.default_rng(1)
    parts: list[list[NDArray[np.float32]]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for slot in range(len(sequences)):
        paged.admit(slot)
    while any(done[row] < len(sequence) for row, sequence in enumerate(sequences)):
        rows = [row for row, sequence in enumerate(sequences) if done[row] < len(sequence)]
        if how == "ragged":
            rows = [row for row in rng.permutation(rows).tolist() if rng.random() < 0.8] or rows
        left = [len(sequences[row]) - done[row] for row in rows]
        if how == "whole":
            counts = left
        elif how == "token":
            counts = [1] * len(rows)
        else:
            counts = [min(n, int(rng.choice([1, 1, 2, 5, 12, 30]))) for n in left]
        chunks = [
            sequences[row][done[row] : done[row] + count] for row, count in zip(rows, counts, strict=True)
        ]
        for row, count, logits in zip(rows, counts, paged.logits(rows, chunks), strict=True):
            done[row] += count
            parts[row].append(logits)
    return [np.concatenate(part) for part in parts]


@torch.inference_mode()
def expected_logits(reference: Any, sequence: NDArray[np.int32], by_token: bool) -> NDArray[np.float32]:
    ids = torch.from_numpy(sequence[None].astype(np.int64))
    if not by_token:
        return np.asarray(reference(ids).logits[0].float())
    # A fresh model: some versions of transformers keep the stretched base for the next, shorter sequence.
    reference, cache, rows = deepcopy(reference), None, []
    for at in range(ids.shape[1]):
        out = reference(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0].float())
    return np.concatenate(rows)


def greedy(
    paged: PagedModel, reference: Any, sequences: list[NDArray[np.int32]]
) -> tuple[list[list[int]], list[list[int]]]:
    """64 greedy tokens after each of ``sequences``: ours, all in one batch, and those of transformers, padded on the
    left."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.from_numpy(sequence.astype(np.int64))
        mask[row, longest - len(sequence) :] = 1
    reference.generation_config.eos_token_id = None
    wanted = reference.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)
    rows = list(range(len(sequences)))
    for row in rows:
        paged.admit(row)
    steps = [paged.sample(rows, sequences)] + [paged.sample(rows) for _ in range(63)]
    found = np.stack([paged.backend.to_host(step.ids) for step in steps], 1)
    return found.tolist(), wanted[:, longest:].tolist()


def edit_config(path: Path, **changes: Any) -> None:
    """Set keys of ``config.json``; None removes one."""
    config = json.loads((path / "config.json").read_text())
    config = {
        key: value for key, value in (config | changes).items() if value is not None or key not in changes
    }
    (path / "config.json").write_text(json.dumps(config))


def float32_backend() -> Backend:
    """The native CPU backend in float32 if it is built, else the reference backend."""
    return CpuBackend() if HAS_NATIVE_CPU else TorchBackend()


# ---- Blocks


def first_logits(backend: Backend, path: Path, count: int = 40, **options: Any) -> NDArray[np.float32]:
    """Logits ``[count, vocab]`` of the tokens 0 to ``count`` - 1. ``options`` go to :class:`Packing`."""
    packing = Packing(backend, **options)
    model = load_model(backend, path, max_model_len=64, block_size=16, packing=packing)
    paged = PagedModel(model, num_blocks=8, max_slots=2, max_context=64)
    paged.admit(0)
    return paged.logits([0], [np.arange(count, dtype=np.int32)])[0]
