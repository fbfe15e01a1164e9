"""The backend interface: the ops that run a model, and its weights.

:mod:`vllmlite.backends.batch` has the input of a step, :mod:`vllmlite.backends.sampling` the values of the sampling
ops, and :mod:`vllmlite.backends.comm` the collectives of several ranks.

A backend owns its tensors, its KV cache and its per-slot state; other code passes them on without looking inside.
``backends/torch.py`` is the reference implementation, simple and correct on any torch device; a native backend has the
same ops on its own tensors. Letters in shapes: T tokens of the step, R rows (sequences) of the step, N rows that
are sampled, H query heads, K key/value heads, D head size, V vocabulary, B block size.

Ops are called in program order and take effect in that order, though a backend may run them later: only
:meth:`Backend.to_host` waits. This allows two steps in flight, and lets a freed block be reused while an earlier step
may still read it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.batch import (
    AdapterRows,
    ForwardBatch,
    GraphKey,
    SlotParams,
    Slots,
    SlotSpec,
    Step,
    Tensor,
)
from vllmlite.backends.comm import Comm, SingleRank
from vllmlite.backends.host_blocks import HostBlocks
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.backends.memory import Memory
from vllmlite.backends.sampling import BeamRows, Continuations, Logprobs, Sampled
from vllmlite.errors import BackendError, ModelError
from vllmlite.weights.adapter import AdapterLimits, LowRank
from vllmlite.weights.host import (
    FLOAT_DTYPES,
    HostTensor,
    HostWeight,
    PackedWeight,
    dequantized,
    float_values,
)
from vllmlite.weights.schemes import float8, tiles
from vllmlite.weights.schemes.codes import StoredCodes

LinearWeight: TypeAlias = Any
"""A packed weight of :meth:`Backend.linear`, opaque outside its backend."""
Experts: TypeAlias = Any
"""The packed weights of :meth:`Backend.moe`, opaque outside their backend."""
ExpertTables: TypeAlias = Any
"""The tables of the weights of a mixture of experts (:meth:`Backend.expert_tables`), opaque outside its backend."""
LowRankTable: TypeAlias = Any
"""The changes of one weight by all resident adapters (:meth:`Backend.alloc_low_rank`), opaque outside its backend."""
KVCache: TypeAlias = Any
"""A pool of key/value blocks, opaque outside its backend."""

API = 7
"""Version of this interface; an extension that was built for another version is refused."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding (Su et al. 2021) as a table: float32 ``cos_sin [positions, rotary_dim]``, cosines in the
    first half. ``interleaved`` rotates neighbouring elements as pairs, else element i with i + rotary_dim / 2."""

    cos_sin: Tensor
    rotary_dim: int
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Expert:
    """An MLP of :meth:`Backend.moe`: weights ``[2 * I, hidden]``, gate first, and ``[hidden, I]``; either all experts
    have biases or none. The cuda backend does not have biases of experts."""

    gate_up: LinearWeight
    down: LinearWeight


def unusable(part: HostWeight, backend: Backend) -> BackendError:
    """Return the error for a part that :meth:`Backend.linear_weight` cannot combine with the others."""
    if isinstance(part, HostTensor):
        return BackendError(
            f"a weight {list(part.shape)} of {part.dtype} beside packed ones: dequantise those"
        )
    schemes = ", ".join(sorted(backend.schemes)) or "none"
    return BackendError(f"a weight in {part.scheme.name}: the {backend.name} backend multiplies {schemes}")


def not_finite(shape: Sequence[int]) -> ModelError:
    """Return the error for a weight that :meth:`Backend.quantize` cannot quantise."""
    return ModelError(f"a weight of shape {list(shape)}: values that are not finite cannot be quantised")


class Backend(ABC):
    """Tensors, weights, the KV cache, model ops and sampling on one device."""

    name: ClassVar[str]
    device: str
    """The device as the user would write it: ``cpu``, ``cuda``, ``cuda:1``."""
    dtype: str
    """Dtype of activations and dense weights, one of :data:`FLOAT_DTYPES`."""
    schemes: frozenset[str] = frozenset()
    """Names of the quantisation schemes whose weights :meth:`linear` multiplies without dequantising them."""
    details: str = ""
    """Further properties of the backend for messages: instruction set, threads."""
    comm: Comm = SingleRank()
    """The collectives of the ranks that compute a model together."""
    asynchronous: bool = False
    """Whether ops return before they have run, so that two steps in flight are faster than one."""
    gives_probabilities: ClassVar[bool] = True
    """Whether the backend implements :meth:`probabilities`."""
    pads_rows: ClassVar[bool] = False
    """Whether a captured step runs batches whose rows are shorter than its own."""

    @property
    def extension(self) -> ModuleType | None:
        """Extension module of a native backend; None for others. It can also look up drafts (csrc/propose)."""
        return None

    # Tensors

    @abstractmethod
    def tensor(self, host: HostTensor | NDArray[Any], dtype: str | None = None) -> Tensor:
        """Return a tensor with the contents of ``host``, converted to ``dtype`` (default: as it is). May alias
        ``host``."""

    @abstractmethod
    def to_host(self, tensor: Tensor) -> NDArray[Any]:
        """Return the contents as a numpy array (bfloat16 becomes float32), after waiting for all ops issued so far."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        """Return an uninitialised tensor."""

    @abstractmethod
    def rows(self, tensor: Tensor, index: Tensor) -> Tensor:
        """Return a copy of ``tensor[index]`` along the first dimension; ``index`` is int32 ``[N]``."""

    @abstractmethod
    def memory(self) -> Memory:
        """Return the total and the free bytes of the device's memory."""

    # Weights

    @abstractmethod
    def linear_weight(self, parts: Sequence[HostWeight], biases: Sequence[HostTensor] = ()) -> LinearWeight:
        """Put ``parts`` (each ``[out_i, in]``) and ``biases`` (none, or one ``[out_i]`` per part) on the device as one
        weight ``[sum of out_i, in]``: in the backend's dtype if all parts are floats, or packed if all are in some of
        its :attr:`schemes`. May alias parts. BackendError for other parts, ModelError for scales that are not finite.
        """

    def dequantize(self, weight: PackedWeight, dtype: str) -> HostTensor:
        """Return the values of ``weight``, in any scheme, as ``dtype``, one of :data:`FLOAT_DTYPES`. Raises ModelError
        for scales that are not finite."""
        return dequantized(weight, dtype)

    def repack(self, codes: StoredCodes, bits: int) -> NDArray[np.uint8]:
        """Return ``codes`` as rows of ``bits``, 4 or 8, bits a code: uint8 ``[rows, ceil(columns * bits / 8)]``, low
        bits first."""
        return codes.repacked(bits)

    def quantize(self, weight: HostTensor, scheme: str) -> PackedWeight:
        """Return ``weight [out, in]`` in the scheme ``int8``, ``int4`` or ``fp8_w8a8`` (by rows). Raises ModelError if
        a value is not finite."""
        values = float_values(weight)
        if not np.isfinite(values).all():
            raise not_finite(weight.shape)
        return float8.quantize(values) if scheme == "fp8_w8a8" else tiles.quantize(values, scheme)

    @abstractmethod
    def experts(self, experts: Sequence[Expert]) -> Experts:
        """Pack the experts of a mixture, all of one shape."""

    @abstractmethod
    def tied_weight(self, table: Tensor) -> LinearWeight:
        """Return the table of :meth:`embedding` as a weight for :meth:`logits`; aliases the table if the layout
        allows."""

    # Adapters

    adapter_abilities: ClassVar[frozenset[str]] = frozenset()
    """Kinds of layers besides linear ones that adapters may change: a subset of
    :data:`~vllmlite.weights.adapter.ABILITIES`."""

    def alloc_low_rank(self, rows: Sequence[int], columns: int, limits: AdapterLimits) -> LowRankTable:
        """Allocate a table for the changes that adapters make to a weight ``[sum of rows, columns]``, without any at
        first. The weight consists of parts with ``rows`` rows each, which adapters change separately."""
        raise BackendError(f"the {self.name} backend does not support adapters")

    def set_low_rank(self, table: LowRankTable, index: int, parts: Sequence[LowRank | None]) -> None:
        """Set the changes that the adapter ``index`` makes to each part of the weight; None for parts that it does not
        change. Raises BackendError if they do not fit into memory."""
        raise BackendError(f"the {self.name} backend does not support adapters")

    def expert_tables(self, gate_up: Sequence[LowRankTable], down: Sequence[LowRankTable]) -> ExpertTables:
        """Return the tables of the experts of a mixture in the form that :meth:`moe` takes."""
        raise BackendError(f"the {self.name} backend does not support adapters that change experts")

    def adapter_rows(self, adapters: NDArray[np.int32]) -> AdapterRows:
        """Return the adapter indices ``[N]`` of the rows of a tensor, 0 for none, in the form that :meth:`add_lora`
        takes."""
        raise BackendError(f"the {self.name} backend does not support adapters that change the output layer")

    # Key/value cache

    kv_dtypes: ClassVar[tuple[str, ...]] = FLOAT_DTYPES
    """The subset of :data:`KV_DTYPES` that :meth:`alloc_kv` supports."""

    @abstractmethod
    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        """Return the bytes of one block of ``spec``, over all layers, including the scales of its heads."""

    @abstractmethod
    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KVCache:
        """Allocate a pool of ``num_blocks`` blocks; the layout is the backend's own. Raises BackendError if it does not
        fit."""

    def check_kv(self, spec: KVSpec, num_blocks: int) -> None:
        """Raise BackendError if ``spec.dtype`` is not in ``kv_dtypes``, or if the pool needs more memory than is
        free."""
        if spec.dtype not in self.kv_dtypes:
            raise BackendError(
                f"kv cache dtype {spec.dtype}: the {self.name} backend has {', '.join(self.kv_dtypes)}"
            )
        needed, free = num_blocks * self.kv_bytes_per_block(spec), self.memory().free
        if needed > free:
            raise BackendError(f"{num_blocks} blocks of key/value cache take {needed} bytes; {free} are free")

    def release(self, caches: Sequence[KVCache]) -> None:
        """Free device memory until :meth:`restore`; no op may be issued in between, and the results of earlier ops must
        have been read. The contents of ``caches`` are lost; everything else is kept in host memory. Raises
        BackendError, and frees nothing, if that is impossible."""
        raise BackendError(
            f"the {self.name} backend cannot move weights from {self.device} to host memory: sleep at level 2"
        )

    def restore(self, caches: Sequence[KVCache]) -> None:
        """Allocate the memory again that :meth:`release` has freed. Raises BackendError if there is too little; it may
        then be called again."""
        return None

    @abstractmethod
    def copy_blocks(
        self, source: KVCache, sources: NDArray[np.int32], target: KVCache, targets: NDArray[np.int32]
    ) -> None:
        """Copy block ``sources[i]`` of the pool ``source``, all layers, to block ``targets[i]`` of ``target``.

        Both are pools of one spec, or the same pool; sources and targets are ``[n]``. IndexError if a block is not in
        its pool, ValueError if a target occurs twice or is a source in the same pool; then nothing is copied."""

    @abstractmethod
    def host_blocks(self, kv: KVCache, spec: KVSpec, num_places: int) -> HostBlocks:
        """Allocate host memory for ``num_places`` blocks of ``kv``, a cache of ``spec``. Raises BackendError if it does
        not fit."""

    # Slots: state that stays on the device between steps

    @abstractmethod
    def alloc_slots(self, spec: SlotSpec) -> Slots:
        """Allocate the state of ``max_slots`` sequences: block tables, last accepted ids, sampling parameters, token
        counts."""

    @abstractmethod
    def set_slot(self, slots: Slots, slot: int, params: SlotParams) -> None:
        """Give ``slot`` to a new sequence: set its sampling parameters, and reset its block table and its token
        counts."""

    @abstractmethod
    def append_blocks(
        self, slots: Slots, slot_ids: NDArray[np.int32], columns: NDArray[np.int32], blocks: NDArray[np.int32]
    ) -> None:
        """Write ``block_table[slot_ids[i], columns[i]] = blocks[i]``; all three are ``[n]``.

        IndexError, and nothing written, if a slot, a column or a block is not one of the slots' spec."""

    @abstractmethod
    def upload(
        self, batch: ForwardBatch, slots: Slots, spec: KVSpec, key: GraphKey | None = None
    ) -> ForwardBatch:
        """Return the device's copy of a host ``batch``, with token ids of -1 replaced by the slots' last accepted ids.

        The batch may be used with pools of ``spec``. With ``key``, it is for the captured step of that key: it has at
        most as many rows, each of the key's query length, and all tokens are sampled from."""

    # Model ops

    @abstractmethod
    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Return the rows of ``weight [V, hidden]`` for int32 ``token_ids [T]``: ``[T, hidden]`` in the backend's
        dtype.

        An uploaded batch's ``positions`` may be used as ids too."""

    @abstractmethod
    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor | None = None,
        feeds: LinearWeight | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(norm(s) * weight, s)`` of ``s = x + residual`` (``s = x`` without a residual), with the
        root-mean-square norm (Zhang & Sennrich 2019).

        ``x`` and ``residual`` are ``[T, hidden]``; the mean is taken in float32. If there is a residual, both may be
        overwritten. ``weight`` has the backend's dtype or float32.

        ``feeds`` promises that the norm is read only by one :meth:`linear` or :meth:`gated_linear` with that weight: a
        backend may then return it in a form of its own, such as quantised for the product."""

    @abstractmethod
    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Layer norm (Ba, Kiros & Hinton 2016) of ``s = x + residual``: ``(s - mean) / sqrt(variance + eps) * weight +
        bias``, where the variance is the mean square of ``s - mean``. Shapes, return value and overwriting are as for
        :meth:`rms_norm`."""

    @abstractmethod
    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """Return ``x + other``, of one shape. ``other`` may be overwritten."""

    @abstractmethod
    def scale(self, x: Tensor, factor: float) -> Tensor:
        """Return ``x * factor``. ``x`` may be overwritten."""

    @abstractmethod
    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        """Return ``cap * tanh(x / cap)`` of float32 ``x``, which may be overwritten."""

    @abstractmethod
    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """Return ``x @ weight.T + bias``: ``[T, in] -> [T, out]`` in the backend's dtype.

        A weight in the scheme ``w4a16`` or ``w8a16`` multiplies x as it is. For other quantised weights x is quantised
        to 8 bits, in the same groups of a row. Sums are in float32."""

    def lora_linear(
        self, x: Tensor, weight: LinearWeight, table: LowRankTable, batch: ForwardBatch
    ) -> Tensor:
        """Return :meth:`linear` of ``x [T, in]``, the tokens of ``batch``, plus ``scale * (x @ a.T) @ b.T`` with the
        adapter of each token's row.

        Sums are in float32; the result of :meth:`linear` is rounded to its dtype before the addition. If the adapter
        has a ``gain``, that result is first multiplied by the gain's first row, and its second row is added. Tokens
        without an adapter, or whose adapter does not change the weight, get the result of :meth:`linear`."""
        raise BackendError(f"the {self.name} backend does not support adapters")

    def add_lora(self, y: Tensor, x: Tensor, table: LowRankTable, rows: AdapterRows) -> Tensor:
        """Apply the adapters of ``rows`` to ``y [N, out]``, the result of a layer for ``x``, as :meth:`lora_linear`
        does. ``x`` is ``[N, in]``; for embeddings it is int32 ids ``[N]``, each of which stands for a row of zeros with
        a one at the id. ``y`` may be overwritten."""
        raise BackendError(
            f"the {self.name} backend does not support adapters of embeddings and the output layer"
        )

    @abstractmethod
    def attn_prep(
        self,
        qkv: Tensor,
        num_heads: int,
        rope: Rope | None,
        kv: KVCache,
        layer: int,
        batch: ForwardBatch,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Split ``qkv [T, (H + 2K) * D]``, norm each head of q and k by RMS where weights ``[D]`` are given, rotate
        q and k, write k and v to the cache at the tokens' positions, and return q as ``[T, H, D]``.

        Weights ``[H * D]`` and ``[K * D]`` norm all heads as one row. Weights ``[H, D]`` and ``[K, D]`` are layer norms
        of each head, which the cuda backend does not have. Weights are of the backend's dtype or float32."""

    @abstractmethod
    def paged_attention(
        self,
        q: Tensor,
        kv: KVCache,
        layer: int,
        batch: ForwardBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        alibi: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return causal attention ``[T, H * D]`` of ``q [T, H, D]`` over the cached keys and values of each token's own
        row, with the softmax in float32, for decode, ragged prefill and mixtures of both. Query head ``h`` uses
        key/value head ``h * K // H``.

        With ``window``, a token attends to itself and to the ``window - 1`` tokens before it. With ``soft_cap``, a
        scaled score s becomes ``soft_cap * tanh(s / soft_cap)``. With ``alibi``, float32 slopes ``[H]``, the head's
        slope times (position of the key - position of the query) is added to the score. With ``sinks``, float32
        ``[H]``, the softmax has one more key, with the head's sink as its score and a value of zero; the cuda backend
        has no sinks."""

    @abstractmethod
    def gated_activation(self, x: Tensor, activation: str) -> Tensor:
        """Return ``f(gate) * up`` of ``x = [gate | up] [T, 2 * I]``: ``[T, I]``; ``activation`` is ``silu``, ``gelu``
        or ``gelu_tanh``. With ``clamped_swiglu`` (gpt-oss), which the cuda backend does not have, return ``gate *
        sigmoid(1.702 * gate) * (up + 1)``, where the gate is at most 7 and up is clamped to -7 and 7."""

    def gated_linear(
        self, x: Tensor, weight: LinearWeight, activation: str, feeds: LinearWeight | None = None
    ) -> Tensor:
        """Return :meth:`gated_activation` of :meth:`linear`; a backend need not store the result of the latter.
        ``feeds`` is that of :meth:`rms_norm`."""
        return self.gated_activation(self.linear(x, weight), activation)

    @abstractmethod
    def activation(self, x: Tensor, activation: str) -> Tensor:
        """Return ``f(x)``, which may overwrite x; ``activation`` is ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``."""

    @abstractmethod
    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        experts: Experts,
        top_k: int,
        renormalise: bool,
        activation: str,
        tables: ExpertTables = None,
        adapters: AdapterRows = None,
    ) -> Tensor:
        """Return the result of a mixture of experts (Shazeer et al. 2017) for ``x [T, hidden]``: for each token the sum
        of its ``top_k`` experts' gated MLPs, each times its weight, added in the order of the experts.

        The experts with the largest of ``router_logits [T, E]`` are chosen, the first among equals. Their weights are
        the softmax over all logits, in float32; ``renormalise`` divides them by their sum. ``activation`` is that of
        :meth:`gated_activation`. The cuda backend supports up to 4096 experts. ``tables`` are the changes of the
        experts' weights by the ``adapters`` of the tokens."""

    @abstractmethod
    def sigmoid_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return ``x [T, hidden]`` times the sigmoid of ``gate [T, 1]``; x may be overwritten."""

    @abstractmethod
    def logits(self, hidden: Tensor, weight: LinearWeight) -> Tensor:
        """Return ``hidden [N, hidden] @ weight.T`` as float32 ``[N, V]``."""

    # Sampling

    @abstractmethod
    def sample(self, logits: Tensor, slots: Slots, batch: ForwardBatch) -> Sampled:
        """Choose an id for each of the N positions of float32 ``logits [N, V]`` (may be overwritten), in this order:

        1. log-probabilities of the unmodified logits, if ``batch.num_logprobs >= 0``;
        2. logit bias added; ids outside the bitmask set to -inf;
        3. repetition penalty over prompt and output ids (Keskar et al. 2019: positive logits divided, negative
           multiplied), then frequency times count and presence once subtracted, over output ids;
        4. rows of temperature 0 take the largest logit, the lowest id among equals;
        5. the others divide by temperature, drop ids whose probability is below ``min_p`` times the largest, keep
           the ``top_k`` largest, then the smallest set of largest probabilities that reaches ``top_p`` (equal logits
           are kept together at either cut), and take the first id, in ascending order, at which the cumulative
           probability exceeds u * total, u = :func:`uniform` (seed, position). If the largest logit is infinite,
           it is chosen as in 4.

        A NaN counts as -inf. The drafts of a slot up to a position count as output ids there: they are the token ids
        after that of the slot's first sampled position. The slots are not changed; see :meth:`accept`."""

    @abstractmethod
    def probabilities(self, logits: Tensor, slots: Slots, batch: ForwardBatch) -> Tensor:
        """Return the probabilities with which :meth:`sample` chooses each id, float32 ``[N, V]``; in rows of
        temperature 0, the chosen id has 1. ``logits`` are not changed. Only backends with :attr:`gives_probabilities`
        have this op."""

    @abstractmethod
    def choose_beams(
        self, logits: Tensor, slots: Slots, batch: ForwardBatch, beams: BeamRows, k: int
    ) -> Continuations:
        """Choose the ``k`` best continuations of each group of sequences by one id (beam search).

        A continuation's score is its row's score plus its id's log-probability in the softmax of ``logits [N, V]``
        divided by the row's temperature, edited as in steps 2 and 3 of :meth:`sample`. Among equal scores the lower
        row comes first, then the lower id. A NaN counts as -inf; scores of -inf are no continuations. ``logits`` are
        not changed."""

    @abstractmethod
    def accept(self, ids: Tensor, slots: Slots, batch: ForwardBatch) -> Tensor:
        """Compare int32 ``ids [N]``, sampled from ``batch``, with its drafts, and record the accepted ids in the slots.

        The id of a slot's first position is accepted; that of a further one if the id before it was accepted and
        equals the draft, which is the token id at the position. The last accepted id becomes the slot's last id; all
        accepted ids are added to the counts of slots with penalties. Returns int32 ``[N]``: 1 for accepted."""

    @abstractmethod
    def logprobs(self, logits: Tensor, ids: Tensor, k: int) -> Logprobs:
        """Return the log-softmax of float32 ``logits [N, V]`` at int32 ``ids [N]``, with the ``k`` most likely ids.

        A NaN counts as -inf, whose log-probability is -inf; the log-probability of +inf is 0."""

    # Pooling

    def pool(self, hidden: Tensor, spans: NDArray[np.int32], pooling_type: str) -> NDArray[np.float64]:
        """Return one vector for each of ``spans [P, 2]`` (first token, one past the last) of ``hidden [T, hidden]``:
        the last token's state for ``LAST``, the sum of all states for ``MEAN``. The result ``[P, hidden]`` is on the
        host, after waiting for it. A backend may override this if copying every state is too slow."""
        if pooling_type == "LAST":
            last = self.rows(hidden, self.tensor(np.ascontiguousarray(spans[:, 1] - 1)))
            return self.to_host(last).astype(np.float64)
        index = np.concatenate([np.arange(first, end, dtype=np.int32) for first, end in spans])
        states = self.to_host(self.rows(hidden, self.tensor(index)))
        starts = np.concatenate(([0], np.cumsum(spans[:, 1] - spans[:, 0])[:-1]))
        sums: NDArray[np.float64] = np.add.reduceat(states, starts, axis=0, dtype=np.float64)
        return sums

    # Graphs

    def graph_rows(self, most: int) -> Sequence[int]:
        """Return the numbers of rows, ascending and up to ``most``, of the steps to capture. A step with fewer rows is
        replayed in the captured one with the next larger number. Empty: the backend captures nothing."""
        return ()

    def capture(self, key: GraphKey, step: Step, slots: Slots, spec: KVSpec) -> Step:
        """Return a function equivalent to ``step`` that is replayed without Python. It takes batches that
        :meth:`upload` was given with ``key``, ``slots`` and ``spec``. Its result is valid until the next call of any
        captured step. Query lengths are 1 to :data:`CAPTURED_QUERY_LEN`."""
        raise BackendError(f"the {self.name} backend captures no steps")
