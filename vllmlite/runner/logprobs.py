"""Log-probabilities that requests ask for besides those of the sampled ids: of prompt tokens, and of ids that a request
lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import Tensor
from vllmlite.backends.sampling import Logprobs
from vllmlite.engine.runner_protocol import TokenLogprobs

LOGPROBS_ROWS = 256
"""Maximum number of rows of logits that are copied at a time to compute log-probabilities."""


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities on the device: entry i is that of ``ids[i]`` at row ``rows[i]``."""

    rows: list[int]
    ids: NDArray[np.int32]
    logprobs: Logprobs


def named_logprobs(
    backend: Backend, logits: Tensor, wanted: Iterable[tuple[int, Sequence[int]]]
) -> list[RowLogprobs]:
    """Compute the log-probabilities of ``wanted``: pairs of a row of the unmodified ``logits`` and a list of ids."""
    pairs = np.array([(row, i) for row, ids in wanted for i in ids], np.int32).reshape(-1, 2)
    found = []
    for at in range(0, len(pairs), LOGPROBS_ROWS):
        rows, ids = np.ascontiguousarray(pairs[at : at + LOGPROBS_ROWS].T)
        copied = backend.rows(logits, backend.tensor(rows))
        found.append(RowLogprobs(rows.tolist(), ids, backend.logprobs(copied, backend.tensor(ids), 0)))
    return found


def prompt_logprobs(
    backend: Backend,
    logits_of: Callable[[Tensor, int], Tensor],
    hidden: Tensor,
    row: int,
    first: int,
    targets: NDArray[np.int32],
    k: int,
) -> Iterator[RowLogprobs]:
    """Compute log-probabilities of the prompt tokens ``targets``, each with the ``k`` most likely ids, in chunks of
    :data:`LOGPROBS_ROWS`. Token ``first + i`` of the step's ``hidden`` states predicts ``targets[i]``; all belong to
    ``row``. ``logits_of`` computes logits from some rows of ``hidden`` and their number."""
    for at in range(0, len(targets), LOGPROBS_ROWS):
        ids = targets[at : at + LOGPROBS_ROWS]
        index = np.arange(first + at, first + at + len(ids), dtype=np.int32)
        logits = logits_of(backend.rows(hidden, backend.tensor(index)), len(ids))
        yield RowLogprobs([row] * len(ids), ids, backend.logprobs(logits, backend.tensor(ids), k))


def read_rows(backend: Backend, found: Iterable[RowLogprobs]) -> Iterator[tuple[int, TokenLogprobs]]:
    """Wait for log-probabilities; yield each with its row."""
    for part in found:
        yield from zip(part.rows, read_logprobs(backend, part.ids, part.logprobs), strict=True)


def read_logprobs(backend: Backend, ids: NDArray[np.int32], logprobs: Logprobs) -> list[TokenLogprobs]:
    """Wait for ``logprobs`` of ``ids``, and return one entry for each id."""
    columns = (logprobs.chosen, logprobs.rank, logprobs.top_ids, logprobs.top)
    values = [backend.to_host(column).tolist() for column in columns]
    return [TokenLogprobs(*entry) for entry in zip(ids.tolist(), *values, strict=True)]
