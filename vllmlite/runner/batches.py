"""Turning the rows of a step into the arrays of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllmlite.backends.batch import ForwardBatch


def host_batch(
    slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], samples: Sequence[int]
) -> ForwardBatch:
    """Return the batch of rows that compute ``counts[r]`` tokens from position ``starts[r]`` and sample at the last
    ``samples[r]`` of them. All token ids are -1."""
    first, lengths = np.array(starts, np.int32), np.array(counts, np.int32)
    sampled, row_slots = np.array(samples, np.int32), np.array(slots, np.int32)
    num_rows, num_tokens, num_sampled = len(row_slots), int(lengths.sum()), int(sampled.sum())
    query_start_loc = np.zeros(num_rows + 1, np.int32)
    np.cumsum(lengths, out=query_start_loc[1:])
    if num_tokens == num_rows:
        positions = first
    else:
        positions = np.repeat(first - query_start_loc[:-1], lengths)
        positions += np.arange(num_tokens, dtype=np.int32)
    context_lens = first + lengths
    logits_rows = np.repeat(query_start_loc[1:] - np.cumsum(sampled, dtype=np.int32), sampled)
    logits_rows += np.arange(num_sampled, dtype=np.int32)
    return ForwardBatch(
        num_tokens=num_tokens,
        num_rows=num_rows,
        max_query_len=int(lengths.max()),
        max_context=int(context_lens.max()),
        token_ids=np.full(num_tokens, -1, np.int32),
        positions=positions,
        query_start_loc=query_start_loc,
        slots=row_slots,
        context_lens=context_lens,
        logits_rows=logits_rows,
        sample_slots=np.repeat(row_slots, sampled),
        sample_positions=positions[logits_rows].astype(np.int64) + 1,
    )
