"""The tensors of a decoder and where its checkpoint stores them, from a spec's shapes and its family's keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vllmlite.models.keys import Fused
from vllmlite.models.shard import whole
from vllmlite.models.spec import DecoderSpec, MoeSpec, Shard
from vllmlite.weights.host import Scheme
from vllmlite.weights.parts import HEAD, TABLE, Source, Span

Named = Iterator[tuple[str, Source]]
EXPERT_PARTS = ("gate", "up", "down")


def sources(spec: DecoderSpec) -> dict[str, Source]:
    """Return where the checkpoint stores each tensor of the model, by its name in ``models/decoder.py``. The names of
    layer 3 begin with ``3.``."""
    return dict(_Sources(spec).all())


def stored_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor in a checkpoint of the whole model, as if all weights were floats."""
    return {source.key: source.stored for source in sources(spec.whole or spec).values()}


def stored_schemes(spec: DecoderSpec, tensors: Mapping[str, Source] | None = None) -> dict[str, Scheme]:
    """Return the tensors that the checkpoint of ``spec`` stores quantised, with the scheme of each: those of
    ``tensors``, by default of the whole model."""
    if spec.quantization is None:
        return {}
    tensors = sources(spec.whole or spec) if tensors is None else tensors
    keys = {source.key for source in tensors.values() if source.product}
    found = {key: spec.quantization.scheme(key) for key in keys}
    return {key: scheme for key, scheme in found.items() if scheme is not None}


class _Sources:
    """The sources of the tensors of ``spec``, which may be a rank's part of the whole model ``stored``."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec, self.keys = spec, spec.keys
        self.stored: DecoderSpec = spec.whole or spec
        self.shard: Shard = spec.shard or whole(spec)

    def all(self) -> Named:
        spec, stage = self.spec, self.spec.stage
        if stage.has_table:
            yield TABLE, self.table()
        if stage.is_first:
            yield from self.embeddings()
        for index in range(spec.num_layers):
            yield from self.layer(index)
        if stage.is_last:
            yield from self.outputs()

    def table(self) -> Source:
        """Return the table of embeddings."""
        spec, keys = self.spec, self.keys
        return _whole(f"{keys.prefix}{keys.embedding}.weight", (spec.vocab_size, spec.output_size))

    def embeddings(self) -> Named:
        """Return the tensors before the first layer other than the table of embeddings."""
        spec, keys = self.spec, self.keys
        if spec.learned_positions:
            stored = spec.learned_positions + spec.position_offset, spec.hidden_size
            yield (
                "positions.weight",
                Source(
                    f"{keys.prefix}{keys.positions}.weight",
                    stored,
                    (spec.learned_positions, spec.hidden_size),
                    ((spec.position_offset, stored[0]),) if spec.position_offset else None,
                ),
            )
        if spec.embedding_norm:
            yield from self.norm("embedding_norm", keys.prefix + keys.embedding_norm)
        if spec.embedding_size is not None:
            sizes = spec.hidden_size, spec.embedding_size
            yield from self.linear("project_in", keys.prefix + keys.project_in, *sizes, False)

    def outputs(self) -> Named:
        """Return the tensors after the last layer."""
        spec, keys = self.spec, self.keys
        table = (spec.vocab_size, spec.output_size)
        if spec.embedding_size is not None:
            sizes = spec.embedding_size, spec.hidden_size
            yield from self.linear("project_out", keys.prefix + keys.project_out, *sizes, False)
        if spec.final_norm:
            yield from self.norm("final_norm", keys.prefix + keys.final_norm)
        if not spec.tied_head:
            key = f"{keys.prefix}{keys.embedding}" if self.stored.tied_head else keys.head
            part = self.shard.uneven_part(spec.vocab_size)
            shape = _size(part), table[1]
            yield HEAD, Source(f"{key}.weight", table, shape, _rows(part, table[0]), product=True)

    def layer(self, index: int) -> Named:
        spec, keys, number = self.spec, self.keys, self.spec.stage.first + index
        name, key = f"{index}.", f"{keys.prefix}{keys.layer}{number}."
        for norm in ("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm"):
            if getattr(spec, norm):
                yield from self.norm(name + norm, key + getattr(keys, norm))
        yield from self.attention_input(name, key)
        yield from self.head_norm(f"{name}q_norm", key + keys.q_norm, self.shard.heads)
        yield from self.head_norm(f"{name}k_norm", key + keys.k_norm, self.shard.kv_heads)
        if spec.attention_sinks:
            count = self.stored.num_heads
            rows = _rows(self.shard.heads, count)
            yield f"{name}sinks", Source(key + keys.sinks, (count,), (_size(self.shard.heads),), rows)
        head, stored = spec.head_dim, self.stored
        columns = self.shard.heads[0] * head, self.shard.heads[1] * head
        attended = stored.num_heads * head
        yield from self.output(f"{name}o", key + keys.o, attended, columns, spec.o_bias)
        moe, inner = stored.layers[number].moe, stored.intermediate_size
        if moe is not None:
            yield from self.moe(name, key, moe)
            return
        part = self.shard.part(inner)
        if spec.gated_mlp:
            yield from self.gate_up(name, key, inner, part)
        else:
            yield from self.linear(
                f"{name}up", key + keys.up, inner, spec.hidden_size, spec.mlp_bias, _rows(part, inner)
            )
        yield from self.output(f"{name}down", key + keys.down, inner, part, spec.mlp_bias)

    def attention_input(self, name: str, key: str) -> Named:
        """Return the weights of q, k and v, which a family stores as separate tensors, or in one: one after the other,
        or interleaved by key/value head."""
        size, stored, modules = self.spec.head_dim, self.stored, self.keys.qkv
        counts = stored.num_heads, stored.num_kv_heads, stored.num_kv_heads
        heads = self.shard.heads, self.shard.kv_heads, self.shard.kv_heads
        if not isinstance(modules, Fused):
            for part, module, count, own in zip("qkv", modules, counts, heads, strict=True):
                rows = _rows((own[0] * size, own[1] * size), count * size)
                yield from self.linear(
                    name + part, key + module, count * size, self.spec.hidden_size, self.spec.qkv_bias, rows
                )
            return
        group = counts[0] // counts[1]
        for index, part in enumerate("qkv"):
            if modules.by_group:
                spans = self.in_groups(group, index)
            else:
                first = sum(counts[:index])
                spans = [(first + heads[index][0], first + heads[index][1])]
            rows = tuple((first * size, last * size) for first, last in spans)
            own_rows = _rows((heads[index][0] * size, heads[index][1] * size), counts[index] * size)
            alone = counts[index] * size, own_rows
            yield from self.fused(
                name, key, modules, part, (sum(counts) * size, rows), alone, self.spec.qkv_bias
            )

    def in_groups(self, group: int, part: int) -> list[Span]:
        """Return the spans of this rank's heads of q (``part`` 0), k (1) or v (2) in a tensor that stores, for each
        key/value head, its ``group`` query heads, its key and its value."""
        spans = []
        for kv_head in range(*self.shard.kv_heads):
            begin = kv_head * (group + 2)
            if part:
                spans.append((begin + group + part - 1, begin + group + part))
                continue
            first = max(self.shard.heads[0] - kv_head * group, 0)
            last = min(self.shard.heads[1] - kv_head * group, group)
            spans.append((begin + first, begin + last))
        return spans

    def gate_up(self, name: str, key: str, inner: int, part: Span) -> Named:
        modules = self.keys.gate_up
        if not isinstance(modules, Fused):
            for own, module in zip(("gate", "up"), modules, strict=True):
                yield from self.linear(
                    name + own,
                    key + module,
                    inner,
                    self.spec.hidden_size,
                    self.spec.mlp_bias,
                    _rows(part, inner),
                )
            return
        for own, first in (("gate", 0), ("up", inner)):
            rows = ((first + part[0], first + part[1]),)
            alone = inner, _rows(part, inner)
            yield from self.fused(name, key, modules, own, (2 * inner, rows), alone, self.spec.mlp_bias)

    def moe(self, name: str, key: str, moe: MoeSpec) -> Named:
        keys, hidden = self.keys, self.spec.hidden_size
        yield f"{name}router.weight", _whole(f"{key}{keys.router}.weight", (moe.num_experts, hidden))
        if moe.bias:
            yield f"{name}router.bias", _whole(f"{key}{keys.router}.bias", (moe.num_experts,))
        inner = moe.intermediate_size
        for expert in range(moe.num_experts):
            if keys.interleaved_experts is not None:
                yield from self.interleaved_expert(
                    f"{name}experts.{expert}.", key, keys.interleaved_experts, expert, moe
                )
            elif keys.stacked_experts is None:
                parts = [f"{key}{keys.expert}{expert}.{part}" for part in keys.expert_parts]
                yield from self.expert(f"{name}experts.{expert}.", parts, inner, bias=moe.bias)
            else:
                parts = [key + module for module in keys.stacked_experts]
                yield from self.expert(
                    f"{name}experts.{expert}.", parts, inner, expert, moe.num_experts, bias=moe.bias
                )
        if moe.shared_intermediate_size:
            parts = [key + keys.shared_expert + part for part in keys.shared_parts]
            yield from self.expert(f"{name}shared.", parts, moe.shared_intermediate_size)
            yield f"{name}shared_gate.weight", _whole(f"{key}{keys.shared_gate}.weight", (1, hidden))

    def expert(
        self,
        name: str,
        modules: Sequence[str],
        inner: int,
        index: int = 0,
        stacked: int = 1,
        *,
        bias: bool = False,
    ) -> Named:
        """Return the gate, up and down projections of expert ``index``; each stored tensor holds ``stacked``
        experts."""
        hidden, part = self.spec.hidden_size, self.shard.part(inner)
        for own, module in zip(EXPERT_PARTS, modules, strict=True):
            out, size, columns = (hidden, inner, part) if own == "down" else (inner, hidden, None)
            rows = (0, out) if own == "down" else part
            own_rows = index * out + rows[0], index * out + rows[1]
            yield (
                f"{name}{own}.weight",
                self.product(
                    f"{module}.weight",
                    (stacked * out, size),
                    _rows(own_rows, stacked * out),
                    _columns(columns, size),
                ),
            )
            if bias and (own != "down" or self.shard.rank == 0):
                yield (
                    f"{name}{own}.bias",
                    Source(f"{module}.bias", (stacked, out), (_size(rows),), (own_rows,), stacked=True),
                )

    def interleaved_expert(
        self, name: str, key: str, modules: tuple[str, str], expert: int, moe: MoeSpec
    ) -> Named:
        """Gate, up and down of an expert whose gate and up projections are stored in turn; see
        :attr:`Keys.interleaved_experts`."""
        hidden, inner, count = self.spec.hidden_size, moe.intermediate_size, moe.num_experts
        first, last = self.shard.part(inner)
        gate_up, down = (key + module for module in modules)
        for turn, part in enumerate(("gate", "up")):
            begin, end = 2 * first + turn, 2 * last
            yield (
                f"{name}{part}.weight",
                self.stacked(gate_up, expert, count, (2 * inner, hidden), (begin, end), None, 2),
            )
            if moe.bias:
                rows = ((expert * 2 * inner + begin, expert * 2 * inner + end),)
                yield (
                    f"{name}{part}.bias",
                    Source(
                        f"{gate_up}.bias", (count, 2 * inner), (last - first,), rows, stacked=True, step=2
                    ),
                )
        yield (
            f"{name}down.weight",
            self.stacked(down, expert, count, (hidden, inner), (0, hidden), (first, last)),
        )
        if moe.bias and self.shard.rank == 0:
            rows = ((expert * hidden, (expert + 1) * hidden),)
            yield f"{name}down.bias", Source(f"{down}.bias", (count, hidden), (hidden,), rows, stacked=True)

    def stacked(
        self,
        module: str,
        expert: int,
        count: int,
        size: tuple[int, int],
        rows: Span,
        columns: Span | None,
        step: int = 1,
    ) -> Source:
        """Every ``step``-th of ``rows``, and ``columns``, of the weight ``[out, in]`` of ``size`` of one of ``count``
        experts."""
        (out, inner), key, quantization = size, f"{module}.weight", self.spec.quantization
        shape = len(range(*rows, step)), inner if columns is None else _size(columns)
        if quantization is not None and quantization.scheme(key) is not None:
            own = (expert * out + rows[0], expert * out + rows[1])
            columns = columns and _columns(columns, inner)
            return Source(
                key, (count, out, inner), shape, (own,), columns, product=True, stacked=True, step=step
            )
        first, last = columns or (0, inner)
        own_columns = expert * inner + first, expert * inner + last
        return Source(
            key, (count, inner, out), shape, (rows,), own_columns, True, product=True, stacked=True, step=step
        )

    def norm(self, name: str, module: str) -> Named:
        yield f"{name}.weight", _whole(f"{module}.weight", (self.spec.hidden_size,))
        if self.spec.norm.bias:
            yield f"{name}.bias", _whole(f"{module}.bias", (self.spec.hidden_size,))

    def head_norm(self, name: str, module: str, heads: Span) -> Named:
        """Return the norm of q or k: one tensor, or one for each of ``heads``."""
        kind, size = self.spec.qk_norm, self.spec.head_dim
        if kind == "layer":
            for index, head in enumerate(range(*heads)):
                yield f"{name}.{index}.weight", _whole(f"{module}.{head}.weight", (size,))
        elif kind is not None:
            width = _size(heads) * size if kind == "whole" else size
            yield f"{name}.weight", _whole(f"{module}.weight", (width,))

    def linear(
        self, name: str, module: str, out: int, size: int, bias: bool, rows: tuple[Span, ...] | None = None
    ) -> Named:
        """Return a weight ``[out, size]``, or the given rows of it, and its bias."""
        yield f"{name}.weight", self.product(f"{module}.weight", (out, size), rows)
        if bias:
            yield f"{name}.bias", self.bias(f"{module}.bias", out, rows)

    def output(self, name: str, module: str, size: int, columns: Span, bias: bool) -> Named:
        """Return the weight of a product whose results are added over the ranks; only the first rank adds the bias."""
        hidden = self.spec.hidden_size
        yield (
            f"{name}.weight",
            self.product(f"{module}.weight", (hidden, size), None, _columns(columns, size)),
        )
        if bias and self.shard.rank == 0:
            yield f"{name}.bias", self.bias(f"{module}.bias", hidden, None)

    def fused(
        self,
        name: str,
        key: str,
        modules: Fused,
        part: str,
        together: tuple[int, tuple[Span, ...]],
        alone: tuple[int, tuple[Span, ...] | None],
        bias: bool,
    ) -> Named:
        """Return one of the weights of a fused module. ``together`` is the module's number of rows and the rows of this
        weight; ``alone`` is the same for a tensor that holds only this weight, as in vllmlite's own quantised
        format."""
        module, quantization = key + modules.module, self.spec.quantization
        apart = quantization is not None and quantization.own
        total, rows = alone if apart else together
        stored = f"{module}.{part}" if apart else module
        yield from self.linear(name + part, stored, total, self.spec.hidden_size, False, rows)
        if bias:
            yield f"{name}{part}.bias", self.bias(f"{module}.bias", *together)

    def bias(self, key: str, size: int, rows: tuple[Span, ...] | None) -> Source:
        return Source(key, (size,), (sum(map(_size, rows)) if rows else size,), rows)

    def product(
        self, key: str, stored: tuple[int, int], rows: tuple[Span, ...] | None, columns: Span | None = None
    ) -> Source:
        """Return the source of a product's weight. A quantised weight is stored as ``[out, in]`` even if the family's
        float weights are transposed."""
        shape = sum(map(_size, rows)) if rows else stored[0], _size(columns) if columns else stored[1]
        quantization = self.spec.quantization
        transposed = self.keys.transposed and (quantization is None or quantization.scheme(key) is None)
        return Source(
            key, stored[::-1] if transposed else stored, shape, rows, columns, transposed, product=True
        )


def _whole(key: str, shape: tuple[int, ...]) -> Source:
    return Source(key, shape, shape)


def _size(span: Span) -> int:
    return span[1] - span[0]


def _rows(span: Span, total: int) -> tuple[Span, ...] | None:
    """Return ``span`` as the rows of a source, or None if it is all ``total`` rows."""
    return None if span == (0, total) else (span,)


def _columns(span: Span | None, total: int) -> Span | None:
    return None if span == (0, total) else span
