"""Paged attention of the torch reference: a step's rows become a few padded, vectorised attention calls.

Rows are grouped by the powers of two of their query length and number of keys, so that padding is bounded and no loop
runs over sequences. A group gathers its keys and values from the pool and attends in one call. All gather indices are
clamped to the row's own tokens, so blocks that were never written, or reused after a window passed them, are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vllmlite.backends.host_blocks import Ids
from vllmlite.backends.kv_cache import LEAST_SCALE, KVFormat, KVSpec

Ints = NDArray[np.int64]
Put = Callable[..., list[torch.Tensor]]
"""Copies host arrays to the device asynchronously, in one transfer, and returns their tensors."""

LIMIT = 256 * 2**20
"""Maximum bytes of one group's gathered keys, values and mask; a single row may exceed it."""
_KEEP_MASK = 32 * 2**20  # masks up to this many bytes are reused by all layers
_SMALL = 256  # rows with up to this many keys are grouped together


_ELEMENTS = {"int8": torch.int8, "float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""Dtypes of the elements of quantised caches."""


class TorchKV:
    """A pool of key/value blocks: per layer ``[num_blocks * block_size, 2 * K * D]``, a token's keys, then its values.

    A quantised pool holds bytes, ``[num_blocks * block_size, 2 * K * spec.head_bytes]``: a head's elements, then the
    bytes of its scale, if it has one."""

    def __init__(self, spec: KVSpec, num_blocks: int, device: torch.device) -> None:
        self.spec = spec
        self.dtype = torch.uint8 if spec.format else getattr(torch, spec.dtype)
        head = spec.head_bytes if spec.format else spec.head_dim
        shape = (spec.num_layers, num_blocks * spec.block_size, 2 * spec.num_kv_heads * head)
        memory = torch.empty(shape, dtype=self.dtype, device=device)
        self.layers = list(memory)
        self.blocks = memory.view(spec.num_layers, num_blocks, -1)
        """A view of all layers by block."""
        self._scales = torch.tensor(spec.scales or [(1.0, 1.0)] * spec.num_layers, device=device)
        self._scratch: dict[torch.dtype, torch.Tensor] = {}

    def release(self) -> None:
        """Free the memory of the blocks, whose contents are lost, until :meth:`restore`."""
        self.blocks.untyped_storage().resize_(0)
        self._scratch.clear()

    def restore(self) -> None:
        """Allocate the memory of the blocks again. Raises RuntimeError if there is too little."""
        self.blocks.untyped_storage().resize_(self.blocks.numel() * self.blocks.element_size())

    def _layer_scales(self, layer: int) -> torch.Tensor:
        """Return the scales of a layer's keys and values for all its heads, ``[2 * K, 1]``."""
        return self._scales[layer].repeat_interleave(self.spec.num_kv_heads)[:, None]

    def write(self, layer: int, index: torch.Tensor, new: torch.Tensor) -> None:
        """Store keys and values ``new [T, 2 * K * D]`` at the pool indices ``index [T]``."""
        form = self.spec.format
        if form is not None:
            heads = new.reshape(len(new), -1, self.spec.head_dim)
            new = _quantised(heads, form, None if form.head_scales else self._layer_scales(layer)).flatten(1)
        self.layers[layer].index_copy_(0, index, new.to(self.dtype))

    def copy(self, blocks: Ids, places: Ids, memory: NDArray[np.uint8], to_host: bool) -> None:
        """Copy blocks to or from rows of ``memory``: a row has a block's layers, one after the other."""
        for what, indices, limit in (("place", places, len(memory)), ("block", blocks, self.blocks.shape[1])):
            if len(indices) and not 0 <= indices.min() <= indices.max() < limit:
                raise IndexError(f"a {what} is not within 0 and {limit - 1}")
        pool = self.blocks.view(torch.uint8)
        index = torch.from_numpy(blocks.astype(np.int64)).to(pool.device)
        shape = len(blocks), len(pool), pool.shape[2]
        if to_host:
            memory[places] = pool.index_select(1, index).transpose(0, 1).reshape(shape[0], -1).cpu().numpy()
        else:
            rows = torch.from_numpy(memory[places]).view(shape).transpose(0, 1)
            pool.index_copy_(1, index, rows.to(pool.device))

    def gather(
        self, layer: int, index: torch.Tensor, rows: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values ``[rows, K, S, D]`` of the pool indices ``index [rows * S]``, valid until the next
        call."""
        pool = self.layers[layer]
        found = self._buffer((len(index), pool.shape[1]), self.dtype)
        torch.index_select(pool, 0, index, out=found)
        form = self.spec.format
        if form is not None:
            heads = found.view(len(index), -1, self.spec.head_bytes)
            elements, stored = heads[..., : self.spec.head_dim], heads[..., self.spec.head_dim :]
            scales = (
                stored.contiguous().view(torch.float32) if form.head_scales else self._layer_scales(layer)
            )
            floats = self._buffer(elements.shape, dtype)
            numbers = elements.view(_ELEMENTS[form.element])
            if form.element != "int8":
                numbers = numbers.float()
            found = torch.mul(numbers, scales, out=floats)
        elif dtype != self.dtype:
            found = self._buffer(found.shape, dtype).copy_(found)
        both = found.view(rows, -1, 2, self.spec.num_kv_heads, self.spec.head_dim)
        return both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2)

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return scratch memory that all layers reuse: newly allocated memory would cause page faults each time."""
        size = math.prod(shape)
        kept = self._scratch.get(dtype)
        if kept is None or len(kept) < size:
            kept = self._scratch[dtype] = torch.empty(size, dtype=dtype, device=self.layers[0].device)
        return kept[:size].view(shape)


def check_copies(
    source: TorchKV, sources: NDArray[np.int32], target: TorchKV, targets: NDArray[np.int32]
) -> None:
    """Raise IndexError or ValueError for block copies that ``Backend.copy_blocks`` refuses."""
    if source.spec != target.spec or len(sources) != len(targets):
        raise ValueError(
            "copy_blocks: the pools have blocks of different forms, or sources and targets differ in length"
        )
    for what, kv, blocks in (("source", source, sources), ("target", target, targets)):
        limit = kv.blocks.shape[1]
        wrong = blocks[(blocks < 0) | (blocks >= limit)]
        if len(wrong):
            raise IndexError(f"{what} block {wrong[0]} is not within 0 and {limit - 1}")
    if len(np.unique(targets)) < len(targets):
        raise ValueError("copy_blocks: a block is the target of two copies")
    if source is target and np.isin(sources, targets).any():
        raise ValueError("copy_blocks: a block is both source and target")


def _quantised(x: torch.Tensor, form: KVFormat, scale: torch.Tensor | None) -> torch.Tensor:
    """Quantise heads ``x [..., D]`` to bytes: with ``scale`` ``[..., D]``, otherwise ``[..., D + 4]``, the elements
    and then the bytes of the head's own scale."""
    x, own = x.float(), scale is None
    if scale is None:
        # Divide by a tensor: CUDA replaces division by a Python number with a multiplication, which rounds differently.
        scale = (x.abs().amax(-1, keepdim=True) / x.new_tensor(form.largest)).clamp(min=LEAST_SCALE)
    x = (x / scale).clamp(-form.largest, form.largest)
    if form.element == "int8":
        x = x.round().nan_to_num()
    elements = x.to(_ELEMENTS[form.element]).view(torch.uint8)
    return torch.cat((elements, scale.view(torch.uint8)), -1) if own else elements


@dataclass(slots=True)
class Rows:
    """Host arrays of a step, one entry per row: first token, number of tokens, context length, slot."""

    start: Ints
    length: Ints
    context: Ints
    slot: Ints


@dataclass(slots=True)
class Group:
    """Rows that attend in one call, padded to Q tokens and S keys each; g is their number."""

    rows: int
    queries: int
    causal: bool
    """Whether no row has earlier context, so that S = Q and torch's causal mask can be used."""
    tokens: torch.Tensor | None
    """[g * Q] indices into T; None: all tokens of the step, in order."""
    targets: torch.Tensor | None
    """Indices into T of tokens that are not padding; None if ``tokens`` is None."""
    real: torch.Tensor | None
    """Indices into g * Q of tokens that are not padding; None: all."""
    keys: torch.Tensor
    """[g * S] indices into the pool."""
    first_key: torch.Tensor
    """[g] position of the first key."""
    query_positions: torch.Tensor
    """[g, Q] positions of the queries in their sequences."""
    num_keys: int
    window: int | None
    open: bool
    """Whether every query attends to every key: one token per row, and equal numbers of keys."""
    kept_mask: torch.Tensor | None = None

    def mask(self, heads_together: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the additive mask ``[g, 1, Q * heads_together, S]`` (for Q = 1 ``[g, 1, 1, S]``), or None if not
        needed."""
        if self.open:
            return None
        if self.kept_mask is not None and self.kept_mask.dtype == dtype:
            return self.kept_mask
        keys = torch.arange(self.num_keys, device=self.first_key.device)
        positions = (self.first_key[:, None] + keys)[:, None, :]
        queries = self.query_positions[:, :, None]
        hidden = positions > queries
        if self.window is not None:
            hidden |= positions <= queries - self.window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        if self.queries > 1:
            shape = (self.rows, self.queries, heads_together, self.num_keys)
            mask = mask[:, :, None].expand(shape).reshape(self.rows, -1, self.num_keys)
        mask = mask[:, None]
        if mask.nbytes <= _KEEP_MASK:
            self.kept_mask = mask
        return mask


def plan_groups(
    rows: Rows,
    spec: KVSpec,
    heads: int,
    item_size: int,
    window: int | None,
    edited: bool,
    block_table: torch.Tensor,
    put: Put,
) -> list[Group]:
    """Return the groups of a step for layers with sliding ``window``.

    ``item_size``: bytes per number in the computation; ``edited``: scores are materialised, per head, query and key."""
    num_tokens = int(rows.length.sum())
    score_bytes = 3 * heads * item_size if edited else heads // spec.num_kv_heads * (item_size + 1)
    rows = _split(rows, window, score_bytes, edited)
    first = np.zeros_like(rows.context)
    if window is not None:
        first = np.maximum(rows.context - rows.length - window + 1, 0)
    groups = []
    for members in _buckets(rows, rows.context - first):
        queries = int(rows.length[members].max())
        keys = int((rows.context - first)[members].max())
        row_bytes = 2 * keys * spec.num_kv_heads * spec.head_dim * item_size
        row_bytes += queries * heads * (2 * spec.head_dim * item_size + keys * (item_size + 1))
        step = max(1, LIMIT // row_bytes)
        for at in range(0, len(members), step):
            some = members[at : at + step]
            part = Rows(rows.start[some], rows.length[some], rows.context[some], rows.slot[some])
            groups.append(
                _group(part, first[some], window, edited, spec.block_size, block_table, num_tokens, put)
            )
    return groups


def _split(rows: Rows, window: int | None, mask_bytes: int, all_masked: bool) -> Rows:
    """Split rows whose mask (``mask_bytes`` per query and key) would exceed half the limit into chunks."""
    keys = rows.context if window is None else np.minimum(rows.context, window + rows.length)
    masked = (rows.context > rows.length) | (keys < rows.context) | all_masked
    most = np.where(masked, np.maximum(LIMIT // 2 // (keys * mask_bytes), 16), rows.length)
    pieces = -(-rows.length // most)
    if pieces.max() == 1:
        return rows
    which = np.repeat(np.arange(len(pieces)), pieces)
    index = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = index * most[which]
    length = np.minimum(rows.length[which] - begin, most[which])
    context = rows.context[which] - rows.length[which] + begin + length
    return Rows(rows.start[which] + begin, length, context, rows.slot[which])


def _buckets(rows: Rows, keys: Ints) -> Iterator[Ints]:
    """Yield indices of rows whose query lengths and key counts round up to the same powers of two.

    Rows without earlier context are grouped separately."""
    power = np.ceil(np.log2(rows.length)) * 64 + np.ceil(np.log2(np.maximum(keys, _SMALL)))
    power = np.where((rows.context == rows.length) & (rows.length > 1), -power, power)
    if (power == power[0]).all():
        yield np.arange(len(power))
        return
    for value in np.unique(power):
        yield np.flatnonzero(power == value)


def _group(
    rows: Rows,
    first: Ints,
    window: int | None,
    edited: bool,
    block_size: int,
    block_table: torch.Tensor,
    num_tokens: int,
    put: Put,
) -> Group:
    queries, keys = int(rows.length.max()), int((rows.context - first).max())
    causal = (
        bool((rows.context == rows.length).all())
        and queries > 1
        and (window is None or window >= queries)
        and not edited
    )
    opened = queries == 1 and bool((rows.context - first == keys).all())
    if not causal and not opened:
        keys = -(-keys // 8) * 8  # the memory-efficient CUDA kernel needs an aligned mask
    offsets = np.minimum(np.arange(queries), rows.length[:, None] - 1)
    tokens = (rows.start[:, None] + offsets).ravel()
    everything = len(tokens) == num_tokens and bool((tokens == np.arange(num_tokens)).all())
    arrays = [first, rows.context - 1, rows.slot, (rows.context - rows.length)[:, None] + offsets]
    padded = int(rows.length.sum()) != len(tokens)
    if not everything:
        arrays.append(tokens)
    if padded:
        real = np.flatnonzero((np.arange(queries) < rows.length[:, None]).ravel())
        arrays += [tokens[real], real]
    first_key, last_key, slots, query_positions, *indices = put(*arrays)
    at = first_key[:, None] + torch.arange(keys, device=block_table.device)
    at = torch.minimum(at, last_key[:, None])
    blocks = block_table[slots[:, None], at // block_size].long()
    return Group(
        rows=len(first),
        queries=queries,
        causal=causal,
        tokens=None if everything else indices[0],
        targets=None if everything else indices[padded],
        real=indices[2] if padded else None,
        keys=(blocks * block_size + at % block_size).view(-1),
        first_key=first_key,
        query_positions=query_positions,
        num_keys=keys,
        window=window,
        open=opened,
    )


@dataclass(frozen=True, slots=True)
class Scores:
    """How attention scores are changed before the softmax: scaled, soft-capped, and with ALiBi's slope times distance
    added. ``sinks`` are scores of keys without values, one for each head, that take part in the softmax."""

    scale: float
    soft_cap: float | None = None
    alibi: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    @property
    def edited(self) -> bool:
        """Whether scores are changed beyond scaling."""
        return self.soft_cap is not None or self.alibi is not None or self.sinks is not None


def attend(
    q: torch.Tensor, kv: TorchKV, layer: int, groups: list[Group], scores: Scores, dtype: torch.dtype
) -> torch.Tensor:
    """Attend with ``q [T, H, D]`` over the pool, computing in ``dtype``; return ``[T, H * D]`` in the dtype of
    ``q``."""
    if len(groups) == 1 and groups[0].tokens is None:
        return _attend_group(q.to(dtype), kv, layer, groups[0], scores).to(q.dtype)
    out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    for group in groups:
        assert group.tokens is not None and group.targets is not None
        result = _attend_group(q.index_select(0, group.tokens).to(dtype), kv, layer, group, scores)
        if group.real is not None:
            result = result.index_select(0, group.real)
        out.index_copy_(0, group.targets, result.to(q.dtype))
    return out


def _attend_group(q: torch.Tensor, kv: TorchKV, layer: int, group: Group, scores: Scores) -> torch.Tensor:
    """Attend with padded ``q [g * Q, H, D]``; return ``[g * Q, H * D]``."""
    heads, size = q.shape[1:]
    kv_heads = kv.spec.num_kv_heads
    together = heads // kv_heads
    keys, values = kv.gather(layer, group.keys, group.rows, q.dtype)
    if group.causal:
        if together > 1:
            shape = (group.rows, kv_heads, together, group.num_keys, size)
            keys = keys[:, :, None].expand(shape).reshape(group.rows, heads, group.num_keys, size)
            values = values[:, :, None].expand(shape).reshape(group.rows, heads, group.num_keys, size)
        padded = q.view(group.rows, group.queries, heads, size).transpose(1, 2)
        out = F.scaled_dot_product_attention(padded, keys, values, is_causal=True, scale=scores.scale)
        return out.transpose(1, 2).reshape(-1, heads * size)
    # The query heads of a key/value head become additional queries, so keys and values need not be repeated.
    folded = q.view(group.rows, group.queries, kv_heads, together, size).permute(0, 2, 1, 3, 4)
    folded = folded.reshape(group.rows, kv_heads, -1, size)
    mask = group.mask(together, q.dtype)
    if scores.edited:
        out = _edited_attention(folded, keys, values, mask, group, scores)
    else:
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scores.scale)
    out = out.view(group.rows, kv_heads, group.queries, together, size).permute(0, 2, 1, 3, 4)
    return out.reshape(-1, heads * size)


def _edited_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    group: Group,
    scores: Scores,
) -> torch.Tensor:
    """Attend with explicit float32 scores: ``q [g, K, Q * together, D]``, ``keys`` and ``values [g, K, S, D]``."""
    found = (q @ keys.transpose(-1, -2)).float() * scores.scale
    if scores.soft_cap is not None:
        found = found.div_(scores.soft_cap).tanh_().mul_(scores.soft_cap)
    if scores.alibi is not None:
        at = group.first_key[:, None] + torch.arange(group.num_keys, device=q.device)
        distance = at[:, None, :] - group.query_positions[:, :, None]
        slopes = scores.alibi.view(1, q.shape[1], 1, -1, 1)
        found.view(group.rows, q.shape[1], group.queries, -1, group.num_keys).addcmul_(
            slopes, distance[:, None, :, None, :].float()
        )
    if mask is not None:
        found += mask
    if scores.sinks is None:
        return found.softmax(-1).to(values.dtype) @ values
    shape = found.shape[0], q.shape[1], group.queries, -1
    sinks = scores.sinks.view(1, q.shape[1], 1, -1).expand(shape).reshape(*found.shape[:-1], 1)
    return torch.cat((found, sinks), -1).softmax(-1)[..., :-1].to(values.dtype) @ values
