"""The input of a step, and the per-slot state that a backend keeps between steps.

Letters in shapes are those of :mod:`vllmlite.backends.base`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

Tensor: TypeAlias = Any
"""A backend's tensor, opaque outside it."""
Slots: TypeAlias = Any
"""Per-slot state of the backend that is kept between steps (:meth:`Backend.alloc_slots`), opaque outside it."""
AdapterRows: TypeAlias = Any
"""The adapter of each row of a tensor (:meth:`Backend.adapter_rows`), opaque outside the backend."""


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """Sizes of the per-slot state."""

    max_slots: int
    max_blocks: int
    """Maximum number of blocks of one sequence, which is the length of its block table."""
    max_context: int
    """Maximum number of tokens of one sequence; :meth:`Backend.upload` refuses a longer one."""
    vocab_size: int
    num_blocks: int
    """Number of blocks of the pool to which the block tables refer."""


@dataclass(frozen=True, slots=True)
class SlotParams:
    """Sampling parameters of one slot, fixed while a sequence holds it.

    ``temperature`` 0 means greedy; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and neutral penalties mean off. ``prompt_ids``
    and ``output_ids`` are empty unless a penalty is on. ``seed`` is an unsigned 64-bit integer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()


@dataclass(slots=True)
class ForwardBatch:
    """One step's input. The runner fills it with numpy arrays; :meth:`Backend.upload` returns the backend's own.

    Rows are sequences; tokens of a row are adjacent and their positions consecutive. A row's keys and values of
    positions below ``context_lens[r]`` are in the cache once the step's own have been written.

    A slot has one sampled position or several consecutive ones: those of the last known token and of the draft tokens
    after it. They are adjacent among the N, and so are their tokens.
    """

    num_tokens: int
    """T, the number of tokens of the step."""
    num_rows: int
    """R, the number of rows of the step."""
    max_query_len: int
    """Number of tokens of the longest row of this step; 1 means that every row decodes."""
    max_context: int
    """Largest of ``context_lens``."""
    token_ids: Tensor
    """[T] int32; -1 stands for the slot's last accepted id, which is stored on the device."""
    positions: Tensor
    """[T] int32: position of each token in its sequence, from 0 on."""
    query_start_loc: Tensor
    """[R + 1] int32: row r's tokens are ``query_start_loc[r]`` up to ``query_start_loc[r + 1]``."""
    slots: Tensor
    """[R] int32: the slot whose block table a row uses."""
    context_lens: Tensor
    """[R] int32: number of tokens of the sequence, including this step's."""
    logits_rows: Tensor
    """[N] int32: indices into T of the hidden states from which ids are sampled."""
    sample_slots: Tensor
    """[N] int32: the slots of the sampled positions."""
    sample_positions: Tensor
    """[N] int64: the positions that the sampled ids will have, which are the counters of the random numbers."""
    num_logprobs: int = -1
    """Number of most likely ids to report with each sampled id; 0: only the sampled id's log-probability, -1: none."""
    mask_rows: Tensor | None = None
    """[M] int32: indices into N of the rows that ``bitmask`` restricts."""
    bitmask: Tensor | None = None
    """[M, ceil(V / 32)] int32: bit ``v % 32`` of word ``v // 32`` is set if id v may be sampled."""
    adapters: Tensor | None = None
    """[R] int32: index of each row's adapter, 0 for none; None if no row has one."""
    token_adapters: AdapterRows = field(default=None, repr=False)
    """Adapters of the T tokens, set by :meth:`Backend.upload`; None if no row has one."""
    sample_adapters: AdapterRows = field(default=None, repr=False)
    """Adapters of the N sampled positions, set by :meth:`Backend.upload`; None if no row has one, or if adapters cannot
    change the output layer on this backend."""
    backend: Any = field(default=None, repr=False)
    """The backend's own data, derived from the above at upload (cache slots of the tokens, padded layouts, …)."""


class GraphKey(NamedTuple):
    """Identifies a captured step."""

    rows: int
    query_len: int
    """Tokens of each row."""
    adapted: bool = False
    """Whether any row has an adapter."""


CAPTURED_QUERY_LEN = 9
"""The largest query length of a captured step: the last known token of a row, and up to eight drafts."""


Step: TypeAlias = Callable[[ForwardBatch], Sequence[Tensor]]
"""Maps an uploaded batch to tensors whose first dimension is N, such as the logits."""
