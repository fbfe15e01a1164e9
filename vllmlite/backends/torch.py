"""The reference backend: the backend contract in plain, vectorised torch, on the CPU or a CUDA device."""

# ruff: noqa: D102  (the methods are documented in base.py)

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vllmlite.backends import torch_sampling
from vllmlite.backends.base import Backend, Expert, LinearWeight, Rope, unusable
from vllmlite.backends.batch import ForwardBatch, GraphKey, SlotParams, SlotSpec
from vllmlite.backends.host_blocks import HostBlocks, SynchronousHostBlocks
from vllmlite.backends.kv_cache import KV_DTYPES, KVSpec
from vllmlite.backends.memory import Memory, host_memory
from vllmlite.backends.sampling import BeamRows, Continuations, Logprobs, Sampled
from vllmlite.backends.torch_attention import Group, Rows, Scores, TorchKV, attend, check_copies, plan_groups
from vllmlite.backends.torch_packed import SCHEMES, TorchPacked, TorchPart, packed_part
from vllmlite.backends.torch_sampling import SamplePlan, TorchSlots
from vllmlite.errors import BackendError
from vllmlite.weights.adapter import ABILITIES, AdapterLimits, LowRank
from vllmlite.weights.host import FLOAT_DTYPES, ITEM_SIZE, HostTensor, HostWeight, float_parts

_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ITEM_SIZE if not name.startswith("float8")
}

_HOST_COPY = (
    "copied_to_host"  # attribute of sampled ids: (asynchronous copy to the host, event of its completion)
)
_CONVERT_ROWS = 16  # from this many rows on, convert weights to float32 if the CPU lacks fast 16-bit products
_CONVERT_PART = 4096  # rows of a weight that are converted to float32 at a time


@dataclass(frozen=True, slots=True)
class TorchLinear:
    """A dense weight ``[out, in]``, possibly in oneDNN's blocked layout, and a bias ``[out]``."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(slots=True)
class TorchLowRank:
    """The changes of a weight's parts by adapters: for each adapter, tuples of (columns of y, a, b, scale, gain)."""

    rows: Sequence[int]
    changes: dict[int, list[tuple[slice, torch.Tensor, torch.Tensor, float, torch.Tensor | None]]] = field(
        default_factory=dict
    )


@dataclass(frozen=True, slots=True)
class TorchAdapterRows:
    """The adapter of each row, int64 ``[N]``, and adapter → int64 indices of the rows that have it."""

    adapters: torch.Tensor
    rows: Mapping[int, torch.Tensor]

    def take(self, index: torch.Tensor) -> TorchAdapterRows:
        """Return the adapters of the rows ``index``, in that order."""
        taken = self.adapters[index]
        return TorchAdapterRows(taken, {adapter: (taken == adapter).nonzero()[:, 0] for adapter in self.rows})


TorchExperts: TypeAlias = list[tuple[TorchLowRank, TorchLowRank]]
"""The changes of the two weights of each expert."""


@dataclass(slots=True)
class StepPlan:
    """Data derived from a batch when a layer first needs it, and used by all later layers."""

    rows: Rows
    token_slots: torch.Tensor
    block_table: torch.Tensor
    sampling: SamplePlan
    cache_slots: dict[int, torch.Tensor] = field(default_factory=dict)
    """Block size → int64 [T]: the index in the pool of each token's key and value."""
    groups: dict[tuple[KVSpec, int, int | None, bool], list[Group]] = field(default_factory=dict)
    """(cache, number of query heads, window, whether scores are edited) → the groups of rows that attend together."""
    rotations: list[tuple[Rope, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Rotary tables with the cosines and signed sines of each element of the tokens' heads: float32 [T, 1,
    rotary_dim]."""


class TorchBackend(Backend):
    """The torch backend on ``device``, named as in torch. ``dtype`` is one of ``FLOAT_DTYPES``; ``threads`` is the
    number of CPU threads (None: torch's default). Raises BackendError if there is no such device."""

    name: ClassVar[str] = "torch"
    kv_dtypes: ClassVar[tuple[str, ...]] = KV_DTYPES
    adapter_abilities: ClassVar[frozenset[str]] = ABILITIES
    schemes: frozenset[str] = SCHEMES

    def __init__(self, device: str = "cpu", dtype: str = "float32", threads: int | None = None) -> None:
        if dtype not in FLOAT_DTYPES:
            raise BackendError(f"dtype {dtype}: the torch backend computes in {', '.join(FLOAT_DTYPES)}")
        try:
            self._device = torch.device(device)
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError) as error:
            raise BackendError(f"device {device}: {error}") from error
        self.device, self.dtype = device, dtype
        self.asynchronous = self._device.type == "cuda"
        self._dtype = _DTYPES[dtype]
        self._blocked = self._device.type == "cpu" and _blocked_layout_runs(self._dtype)
        self._converted = self._device.type == "cpu" and not self._blocked and not _multiplies(self._dtype)
        self._attention_dtype = self._dtype
        if self._device.type == "cpu" and not _attends(self._dtype):
            self._attention_dtype = torch.float32
        if self.asynchronous:
            torch.set_float32_matmul_precision("highest")  # never TF32
        if threads is not None:
            torch.set_num_threads(threads)

    # Tensors

    def tensor(self, host: HostTensor | NDArray[Any], dtype: str | None = None) -> torch.Tensor:
        made = _alias(host) if isinstance(host, HostTensor) else _from_numpy(host)
        return made.to(self._device).to(_DTYPES[dtype] if dtype else made.dtype)

    def to_host(self, tensor: torch.Tensor) -> NDArray[Any]:
        early: tuple[torch.Tensor, torch.cuda.Event] | None = getattr(tensor, _HOST_COPY, None)
        if early is not None:
            early[1].synchronize()
            return np.asarray(early[0].numpy())
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        array: NDArray[Any] = tensor.cpu().numpy()
        return array

    def empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=_DTYPES[dtype], device=self._device)

    @torch.inference_mode()
    def rows(self, tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(0, index)

    def memory(self) -> Memory:
        if self._device.type != "cuda":
            return host_memory(self.comm.sharing)
        free, total = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return Memory(total, free + cached)

    # Weights

    @torch.inference_mode()
    def linear_weight(
        self, parts: Sequence[HostWeight], biases: Sequence[HostTensor] = ()
    ) -> TorchLinear | TorchPacked:
        bias = torch.cat([self.tensor(part, self.dtype) for part in biases]) if biases else None
        floats = float_parts(parts)
        if floats is None:
            return TorchPacked(list(map(self._packed, parts)), bias)
        weight, *others = (self.tensor(part, self.dtype) for part in floats)
        if others:
            weight = torch.cat((weight, *others))
        return self._linear(weight, bias)

    def experts(self, experts: Sequence[Expert]) -> Sequence[Expert]:
        return experts

    @torch.inference_mode()
    def tied_weight(self, table: torch.Tensor) -> TorchLinear:
        return self._linear(table, None)

    def _packed(self, part: HostWeight) -> TorchPart:
        if isinstance(part, HostTensor) or part.scheme.name not in self.schemes:
            raise unusable(part, self)
        return packed_part(part, self._put)

    def _linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> TorchLinear:
        if self._blocked:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return TorchLinear(weight, bias)

    # Adapters

    def alloc_low_rank(self, rows: Sequence[int], columns: int, limits: AdapterLimits) -> TorchLowRank:
        return TorchLowRank(rows)

    def set_low_rank(self, table: TorchLowRank, index: int, parts: Sequence[LowRank | None]) -> None:
        ends = np.cumsum(table.rows).tolist()
        table.changes[index] = [
            (
                slice(end - rows, end),
                self.tensor(part.a, self.dtype),
                self.tensor(part.b, self.dtype),
                part.scale,
                None if part.gain is None else self.tensor(part.gain),
            )
            for end, rows, part in zip(ends, table.rows, parts, strict=True)
            if part is not None
        ]

    def expert_tables(self, gate_up: Sequence[TorchLowRank], down: Sequence[TorchLowRank]) -> TorchExperts:
        return list(zip(gate_up, down, strict=True))

    def adapter_rows(self, adapters: NDArray[np.int32]) -> TorchAdapterRows:
        rows = {int(each): np.flatnonzero(adapters == each) for each in np.unique(adapters) if each}
        taken, *indices = self._put(adapters.astype(np.int64), *rows.values())
        return TorchAdapterRows(taken, dict(zip(rows, indices, strict=True)))

    # Key/value cache

    def kv_bytes_per_block(self, spec: KVSpec) -> int:
        return 2 * spec.num_layers * spec.num_kv_heads * spec.head_bytes * spec.block_size

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> TorchKV:
        self.check_kv(spec, num_blocks)
        return TorchKV(spec, num_blocks, self._device)

    @torch.inference_mode()
    def copy_blocks(
        self, source: TorchKV, sources: NDArray[np.int32], target: TorchKV, targets: NDArray[np.int32]
    ) -> None:
        check_copies(source, sources, target, targets)
        read, written = self._put(sources.astype(np.int64), targets.astype(np.int64))
        target.blocks[:, written] = source.blocks[:, read]

    def host_blocks(self, kv: TorchKV, spec: KVSpec, num_places: int) -> HostBlocks:
        return SynchronousHostBlocks(kv.copy, num_places, self.kv_bytes_per_block(spec), self.comm.sharing)

    def release(self, caches: Sequence[TorchKV]) -> None:
        if self._device.type != "cpu":
            super().release(caches)
        for kv in caches:
            kv.release()

    def restore(self, caches: Sequence[TorchKV]) -> None:
        try:
            for kv in caches:
                kv.restore()
        except RuntimeError as error:
            raise BackendError(f"the key/value cache does not fit into memory: {error}") from error

    # Slots

    @torch.inference_mode()
    def alloc_slots(self, spec: SlotSpec) -> TorchSlots:
        return TorchSlots(spec, self._device)

    @torch.inference_mode()
    def set_slot(self, slots: TorchSlots, slot: int, params: SlotParams) -> None:
        slots.set(slot, params)

    @torch.inference_mode()
    def append_blocks(
        self,
        slots: TorchSlots,
        slot_ids: NDArray[np.int32],
        columns: NDArray[np.int32],
        blocks: NDArray[np.int32],
    ) -> None:
        slots.check_blocks(slot_ids, columns, blocks)
        rows, places, values = self._put(slot_ids.astype(np.int64), columns.astype(np.int64), blocks)
        slots.block_table.index_put_((rows, places), values)

    @torch.inference_mode()
    def upload(
        self, batch: ForwardBatch, slots: TorchSlots, spec: KVSpec, key: GraphKey | None = None
    ) -> ForwardBatch:
        start = np.asarray(batch.query_start_loc, np.int64)
        length = np.diff(start)
        rows = Rows(
            start[:-1], length, np.asarray(batch.context_lens, np.int64), np.asarray(batch.slots, np.int64)
        )
        arrays = [
            batch.token_ids, batch.positions, batch.query_start_loc, batch.slots, batch.context_lens,
            batch.logits_rows, batch.sample_slots, batch.sample_positions, np.repeat(rows.slot, length),
        ]  # fmt: skip
        if batch.mask_rows is not None and batch.bitmask is not None:
            arrays += [batch.mask_rows, batch.bitmask]
        ids, positions, loc, row_slots, context, *rest = self._put(*arrays)
        logits_rows, sample_slots, sample_positions, token_slots, *mask = rest
        if (np.asarray(batch.token_ids) < 0).any():
            ids = torch.where(ids < 0, slots.last_id[token_slots], ids)
        sampling = torch_sampling.plan(batch, slots, self._put)
        plan = StepPlan(rows, token_slots, slots.block_table, sampling)
        token_adapters = sample_adapters = None
        if batch.adapters is not None:
            of_tokens = np.repeat(batch.adapters, length)
            token_adapters = self.adapter_rows(of_tokens)
            sample_adapters = self.adapter_rows(of_tokens[batch.logits_rows])
        return replace(
            batch,
            token_ids=ids,
            positions=positions,
            query_start_loc=loc,
            slots=row_slots,
            context_lens=context,
            logits_rows=logits_rows,
            sample_slots=sample_slots,
            sample_positions=sample_positions,
            mask_rows=mask[0] if mask else None,
            bitmask=mask[1] if mask else None,
            token_adapters=token_adapters,
            sample_adapters=sample_adapters,
            backend=plan,
        )

    def _put(self, *arrays: NDArray[Any]) -> list[torch.Tensor]:
        """Return device tensors of host ``arrays``: aliases on the CPU, else one asynchronous copy for all of them."""
        if self._device.type == "cpu":
            return [_from_numpy(np.ascontiguousarray(array)) for array in arrays]
        ends = np.cumsum([-(-array.nbytes // 16) * 16 for array in arrays])
        staging = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=True)
        flat = staging.numpy()
        begins = [0, *ends[:-1].tolist()]
        for begin, array in zip(begins, arrays, strict=True):
            flat[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        moved = staging.to(self._device, non_blocking=True)
        return [
            moved[begin : begin + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
            for begin, array in zip(begins, arrays, strict=True)
        ]

    # Model ops

    @torch.inference_mode()
    def embedding(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, weight)

    @torch.inference_mode()
    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        residual: torch.Tensor | None = None,
        feeds: LinearWeight | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if residual is None else residual.add_(x)
        return _rms_norm(total, weight, eps), total

    @torch.inference_mode()
    def layer_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if residual is None else residual.add_(x)
        return F.layer_norm(total, weight.shape, weight, bias, eps), total

    @torch.inference_mode()
    def add(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return other.add_(x)

    @torch.inference_mode()
    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x.mul_(factor)

    @torch.inference_mode()
    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return x.div_(cap).tanh_().mul_(cap)

    @torch.inference_mode()
    def linear(self, x: torch.Tensor, weight: TorchLinear | TorchPacked) -> torch.Tensor:
        if isinstance(weight, TorchPacked):
            return weight.product(x).to(x.dtype)
        if self._blocked:
            return _blocked_linear(x, weight.weight, weight.bias)
        if self._converted and len(x) >= _CONVERT_ROWS:
            return _converted_linear(x, weight.weight, weight.bias)
        return F.linear(x, weight.weight, weight.bias)

    @torch.inference_mode()
    def lora_linear(
        self, x: torch.Tensor, weight: TorchLinear | TorchPacked, table: TorchLowRank, batch: ForwardBatch
    ) -> torch.Tensor:
        return self.add_lora(self.linear(x, weight), x, table, batch.token_adapters)

    @torch.inference_mode()
    def add_lora(
        self, y: torch.Tensor, x: torch.Tensor, table: TorchLowRank, rows: TorchAdapterRows
    ) -> torch.Tensor:
        for index, own in rows.rows.items():
            for columns, a, b, scale, gain in table.changes.get(index, ()):
                base = y[own, columns]
                if gain is not None:
                    base = torch.where(gain[0] == 0, gain[1], base * gain[0] + gain[1])
                low = a.T[x[own]].float() if x.dim() == 1 else x[own].float() @ a.float().T
                y[own, columns] = (base + low.mul_(scale) @ b.float().T).to(y.dtype)
        return y

    @torch.inference_mode()
    def attn_prep(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        rope: Rope | None,
        kv: TorchKV,
        layer: int,
        batch: ForwardBatch,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        kv_heads, size = kv.spec.num_kv_heads, kv.spec.head_dim
        heads = qkv.view(-1, num_heads + 2 * kv_heads, size)
        for norm, first, last in ((q_norm, 0, num_heads), (k_norm, num_heads, num_heads + kv_heads)):
            if norm is not None:
                part = qkv[:, first * size : last * size].view(len(qkv), -1, norm.shape[-1])
                part.copy_(
                    _rms_norm(part, norm, eps)
                    if norm.dim() == 1
                    else F.layer_norm(part.float(), (size,), eps=eps).mul_(norm)
                )
        if rope is not None:
            # In place, so that keys and values stay adjacent, as in the cache.
            _rotate(heads[:, : num_heads + kv_heads, : rope.rotary_dim], rope, batch)
        kv.write(layer, _cache_slots(batch, kv.spec.block_size), qkv[:, num_heads * size :])
        return heads[:, :num_heads]

    @torch.inference_mode()
    def paged_attention(
        self,
        q: torch.Tensor,
        kv: TorchKV,
        layer: int,
        batch: ForwardBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        alibi: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan: StepPlan = batch.backend
        scores = Scores(scale, soft_cap, alibi, sinks)
        if window is not None and window >= batch.max_context:
            window = None
        key = (kv.spec, q.shape[1], window, scores.edited)
        groups = plan.groups.get(key)
        if groups is None:
            item_size = self._attention_dtype.itemsize
            groups = plan_groups(
                plan.rows, kv.spec, q.shape[1], item_size, window, scores.edited, plan.block_table, self._put
            )
            plan.groups[key] = groups
        return attend(q, kv, layer, groups, scores, self._attention_dtype)

    @torch.inference_mode()
    def gated_activation(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        if activation == "clamped_swiglu":
            gate = gate.clamp(max=7.0)
            return torch.sigmoid(1.702 * gate).mul_(gate).mul_(up.clamp(-7.0, 7.0) + 1)
        if activation not in ("silu", "gelu", "gelu_tanh"):
            raise BackendError(
                f"activation {activation}: the torch backend has silu, gelu, gelu_tanh and clamped_swiglu"
            )
        return _ACTIVATIONS[activation](gate).mul_(up)

    @torch.inference_mode()
    def activation(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        if activation not in _ACTIVATIONS:
            raise BackendError(f"activation {activation}: the torch backend has {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[activation](x)

    @torch.inference_mode()
    def moe(
        self,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        experts: Sequence[Expert],
        top_k: int,
        renormalise: bool,
        activation: str,
        tables: TorchExperts | None = None,
        adapters: TorchAdapterRows | None = None,
    ) -> torch.Tensor:
        chosen = router_logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        weights = router_logits.float().softmax(-1).gather(1, chosen)
        if renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
        rows, factors = order // top_k, weights.flatten()[order, None]
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        first = 0
        for index, (expert, count) in enumerate(zip(experts, counts, strict=True)):
            if count:
                mine = rows[first : first + count]
                up = self.linear(x[mine], expert.gate_up)
                own = None if tables is None or adapters is None else (tables[index], adapters.take(mine))
                if own is not None:
                    up = self.add_lora(up, x[mine], own[0][0], own[1])
                inner = self.gated_activation(up, activation)
                down = self.linear(inner, expert.down)
                if own is not None:
                    down = self.add_lora(down, inner, own[0][1], own[1])
                out.index_add_(0, mine, down * factors[first : first + count])
            first += count
        return out.to(x.dtype)

    @torch.inference_mode()
    def sigmoid_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x.mul_(gate.sigmoid())

    def logits(self, hidden: torch.Tensor, weight: TorchLinear | TorchPacked) -> torch.Tensor:
        if isinstance(weight, TorchPacked):
            return weight.product(hidden)
        return self.linear(hidden, weight).float()

    # Sampling

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, slots: TorchSlots, batch: ForwardBatch) -> Sampled:
        wanted = batch.num_logprobs >= 0
        logits = torch_sampling.without_nan(logits)
        edited = logits
        if batch.backend.sampling.edits:
            edited = logits.clone() if wanted else logits
            torch_sampling.edit(edited, slots, batch)
        ids = torch_sampling.choose(edited, batch)
        if self.asynchronous:
            # Start the copy now, so that reading the ids does not wait for a step launched later.
            copy = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True).copy_(ids, non_blocking=True)
            setattr(ids, _HOST_COPY, (copy, torch.cuda.current_stream(self._device).record_event()))
        return Sampled(ids, torch_sampling.logprobs(logits, ids, batch.num_logprobs) if wanted else None)

    @torch.inference_mode()
    def probabilities(self, logits: torch.Tensor, slots: TorchSlots, batch: ForwardBatch) -> torch.Tensor:
        edited = torch_sampling.without_nan(logits).clone()
        torch_sampling.edit(edited, slots, batch)
        return torch_sampling.probabilities(edited, batch)

    @torch.inference_mode()
    def choose_beams(
        self, logits: torch.Tensor, slots: TorchSlots, batch: ForwardBatch, beams: BeamRows, k: int
    ) -> Continuations:
        rows, scores, temperatures = self._put(
            beams.rows.astype(np.int64), beams.scores[:, None], beams.temperatures[:, None]
        )
        divisors = torch.ones((len(logits), 1), device=self._device).index_put_((rows,), temperatures)
        values = torch_sampling.log_softmax(torch_sampling.without_nan(logits) / divisors)
        torch_sampling.edit(values, slots, batch)
        return torch_sampling.best_continuations(values[rows] + scores, beams.groups.tolist(), k)

    @torch.inference_mode()
    def accept(self, ids: torch.Tensor, slots: TorchSlots, batch: ForwardBatch) -> torch.Tensor:
        return torch_sampling.accept(ids, slots, batch)

    @torch.inference_mode()
    def logprobs(self, logits: torch.Tensor, ids: torch.Tensor, k: int) -> Logprobs:
        return torch_sampling.logprobs(torch_sampling.without_nan(logits), ids, k)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if weight.dtype != x.dtype:
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def _rotate(x: torch.Tensor, rope: Rope, batch: ForwardBatch) -> None:
    """Rotate ``x [T, heads, rotary_dim]`` in place, computing in float32."""
    cosines, sines = _rotation(rope, batch)
    if rope.interleaved:
        partner = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    else:
        partner = x.roll(rope.rotary_dim // 2, -1)
    x.copy_((x * cosines).addcmul_(partner, sines))


def _rotation(rope: Rope, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
    plan: StepPlan = batch.backend
    for known, cosines, sines in plan.rotations:
        if known is rope:
            return cosines, sines
    cos, sin = rope.cos_sin.index_select(0, batch.positions)[:, None].chunk(2, -1)
    cosines, sines = torch.stack((cos, cos), -2), torch.stack((-sin, sin), -2)
    if rope.interleaved:
        cosines, sines = cosines.transpose(-1, -2), sines.transpose(-1, -2)
    found = cosines.flatten(-2), sines.flatten(-2)
    plan.rotations.append((rope, *found))
    return found


def _cache_slots(batch: ForwardBatch, block_size: int) -> torch.Tensor:
    plan: StepPlan = batch.backend
    slots = plan.cache_slots.get(block_size)
    if slots is None:
        blocks = plan.block_table[plan.token_slots, batch.positions // block_size].long()
        slots = plan.cache_slots[block_size] = blocks * block_size + batch.positions % block_size
    return slots


def _alias(host: HostTensor) -> torch.Tensor:
    """Return a view of the host's bytes, or a byte-swapped copy on a big-endian machine."""
    data, size = host.data, ITEM_SIZE[host.dtype]
    if sys.byteorder == "big" and size > 1:
        data = np.ascontiguousarray(data.reshape(-1, size)[:, ::-1]).reshape(-1)
    return _from_numpy(data).view(_DTYPES[host.dtype]).view(host.shape)


def _from_numpy(array: NDArray[Any]) -> torch.Tensor:
    if array.flags.writeable:
        return torch.from_numpy(array)
    # Weights are read-only mappings and never written; torch has no read-only tensors and warns.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(array)


def _blocked_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _converted_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute ``F.linear`` in float32, converting the weight part by part."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    floats = x.float()
    for at in range(0, len(weight), _CONVERT_PART):
        out[:, at : at + _CONVERT_PART] = floats @ weight[at : at + _CONVERT_PART].float().T
    return out if bias is None else out.add_(bias)


def _blocked_layout_runs(dtype: torch.dtype) -> bool:
    """Return whether oneDNN's blocked weight layout, which streams up to three times faster, works for ``dtype``.

    The ops are not part of torch's public interface, hence the trial."""
    try:
        weight = torch.linspace(-1, 1, 64 * 32, dtype=dtype).view(64, 32)
        x = torch.linspace(-1, 1, 3 * 32, dtype=dtype).view(3, 32)
        bias = weight[:, 0].contiguous()
        found = _blocked_linear(x, torch.ops.mkldnn._reorder_linear_weight(weight, None), bias).float()
        expected = F.linear(x.float(), weight.float(), bias.float())
    except (RuntimeError, AttributeError):
        return False
    return torch.allclose(found, expected, 0.02, 0.02)


def _multiplies(dtype: torch.dtype) -> bool:
    """Return whether torch has fast matrix products of ``dtype`` on this CPU.

    Without oneDNN's kernels, 16-bit products run at a fifth of float32's speed."""
    if dtype is torch.float32:
        return True
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except (RuntimeError, AttributeError):
        return False


def _attends(dtype: torch.dtype) -> bool:
    """Return whether torch's attention is fast in ``dtype`` on a CPU.

    Its kernel multiplies bfloat16 with MKL or, without it (as in Debian's build), element by element, thirty times
    slower than float32; float16 is slow either way."""
    mkl: Any = torch.backends.mkl
    return dtype is torch.float32 or (dtype is torch.bfloat16 and bool(mkl.is_available()))
