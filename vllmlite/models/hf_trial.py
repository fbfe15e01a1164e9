"""The trial of a transformers model at load: a few tokens through the paged cache, compared with its own logits.

Two sequences share steps: the first is prefilled in two chunks and then decodes; the second, which has the same
beginning, joins at the first one's second chunk. This detects positions counted within a step, state kept outside the
cache, and attention that reaches into another row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from vllmlite.backends.batch import ForwardBatch, SlotParams, SlotSpec
from vllmlite.backends.torch import TorchBackend
from vllmlite.models.hf_attention import Refusal
from vllmlite.models.interface import Model

_STEPS = (((0, 0, 2),), ((0, 2, 2), (1, 0, 2)), ((0, 4, 1), (1, 2, 1)), ((0, 5, 1), (1, 3, 1)))
"""The rows of each step: (slot, first token, number of tokens)."""
NUM_TOKENS = 6
_BLOCK_SIZE, _BLOCKS = 2, ((4, 0, 3), (2, 1))
"""Blocks of each slot; not in order, so that a wrong block table shows."""
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}
"""Largest accepted difference of a token's logits, relative to the largest logit, by dtype."""
OUTLIERS = {"float32": 0, "float16": 2, "bfloat16": 2}
"""Number of tokens that may differ by more: rounding to 16 bits may route a token to another expert."""


def token_ids(vocab_size: int) -> torch.Tensor:
    """Return NUM_TOKENS token ids spread over the vocabulary."""
    return torch.arange(1, NUM_TOKENS + 1) * 7919 % vocab_size


def paged_logits(backend: TorchBackend, model: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Run ``_STEPS`` and return the logits of every row in order: float32 ``[tokens, V]``."""
    spec = replace(model.kv_spec, block_size=_BLOCK_SIZE, dtype=backend.dtype)
    num_blocks = sum(map(len, _BLOCKS))
    cache = backend.alloc_kv(spec, num_blocks)
    max_blocks = max(map(len, _BLOCKS))
    slots = backend.alloc_slots(
        SlotSpec(len(_BLOCKS), max_blocks, max_blocks * _BLOCK_SIZE, model.vocab_size, num_blocks)
    )
    for slot, blocks in enumerate(_BLOCKS):
        backend.set_slot(slots, slot, SlotParams())
        columns = np.arange(len(blocks), dtype=np.int32)
        backend.append_blocks(slots, np.full_like(columns, slot), columns, np.array(blocks, np.int32))
    found: list[torch.Tensor] = []
    for rows in _STEPS:
        batch = backend.upload(_batch(rows, ids.cpu().numpy()), slots, spec)
        found += model.logits(model.forward(batch, cache)).split([count for _, _, count in rows])
    return found


def compare(expected: torch.Tensor, found: list[torch.Tensor], dtype: str) -> float:
    """Return the largest difference of ``found`` (from :func:`paged_logits`) from ``expected [NUM_TOKENS, V]``.

    It is relative to the largest expected logit. Raises Refusal if it exceeds ``TOLERANCE``."""
    if not (expected.isfinite().all() and torch.cat(found).isfinite().all()):
        raise Refusal(f"its logits are not finite in {dtype}")
    wanted = [expected[start : start + count] for rows in _STEPS for _, start, count in rows]
    differences = (torch.cat(found) - torch.cat(wanted)).abs().amax(1) / expected.abs().max().clamp(min=1e-30)
    worst = float(differences.sort(descending=True).values[OUTLIERS[dtype]])
    if not worst <= TOLERANCE[dtype]:
        raise Refusal(f"its logits differ from transformers' own by {worst:.2g} of the largest")
    return worst


def _batch(rows: Sequence[tuple[int, int, int]], ids: NDArray[np.int64]) -> ForwardBatch:
    slots, starts, counts = np.array(rows, np.int32).T
    ends = np.cumsum(counts, dtype=np.int32)
    positions = np.concatenate([np.arange(start, start + count) for _, start, count in rows])
    return ForwardBatch(
        num_tokens=int(ends[-1]),
        num_rows=len(rows),
        max_query_len=int(counts.max()),
        max_context=int((starts + counts).max()),
        token_ids=ids[positions].astype(np.int32),
        positions=positions.astype(np.int32),
        query_start_loc=np.concatenate(([0], ends)).astype(np.int32),
        slots=slots,
        context_lens=starts + counts,
        logits_rows=ends - 1,
        sample_slots=slots,
        sample_positions=(starts + counts).astype(np.int64),
    )
