"""Every tensor of a decoder and where its checkpoint has it: a spec's shapes under its family's keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vllmlite.models.keys import Fused
from vllmlite.weights.parts import Rows, Source

if TYPE_CHECKING:
    from vllmlite.models.spec import DecoderSpec, MoeSpec

Named = Iterator[tuple[str, Source]]
EXPERT_PARTS = ("gate", "up", "down")


def sources(spec: DecoderSpec) -> dict[str, Source]:
    """By the model's own names; those of layer 3 begin with ``3.``."""
    return dict(_Sources(spec).all())


class _Sources:
    def __init__(self, spec: DecoderSpec) -> None:
        self.spec, self.keys = spec, spec.keys

    def all(self) -> Named:
        spec, keys = self.spec, self.keys
        table = (spec.vocab_size, spec.output_size)
        yield "embedding.weight", _whole(f"{keys.prefix}{keys.embedding}.weight", table)
        if spec.learned_positions:
            stored = spec.learned_positions + spec.position_offset, spec.hidden_size
            yield (
                "positions.weight",
                Source(
                    f"{keys.prefix}{keys.positions}.weight",
                    stored,
                    (spec.learned_positions, spec.hidden_size),
                    Rows(1, spec.position_offset, stored[0]) if spec.position_offset else None,
                ),
            )
        if spec.embedding_norm:
            yield from self.norm("embedding_norm", keys.prefix + keys.embedding_norm)
        if spec.embedding_size is not None:
            sizes = spec.hidden_size, spec.embedding_size
            yield from self.linear("project_in", keys.prefix + keys.project_in, *sizes, False)
            yield from self.linear("project_out", keys.prefix + keys.project_out, *sizes[::-1], False)
        for index in range(spec.num_layers):
            yield from self.layer(index)
        if spec.final_norm:
            yield from self.norm("final_norm", keys.prefix + keys.final_norm)
        if not spec.tied_head:
            yield "head.weight", Source(f"{keys.head}.weight", table, table, product=True)

    def layer(self, index: int) -> Named:
        spec, keys = self.spec, self.keys
        name, key = f"{index}.", f"{keys.prefix}{keys.layer}{index}."
        for norm in ("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm"):
            if getattr(spec, norm):
                yield from self.norm(name + norm, key + getattr(keys, norm))
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        yield from self.several(name, key, ("q", "k", "v"), (q, kv, kv), keys.qkv, spec.qkv_bias)
        yield from self.head_norm(f"{name}q_norm", key + keys.q_norm, spec.num_heads)
        yield from self.head_norm(f"{name}k_norm", key + keys.k_norm, spec.num_kv_heads)
        yield from self.linear(f"{name}o", key + keys.o, spec.hidden_size, q, spec.o_bias)
        moe, inner = spec.layers[index].moe, spec.intermediate_size
        if moe is not None:
            yield from self.moe(name, key, moe)
            return
        if spec.gated_mlp:
            yield from self.several(name, key, ("gate", "up"), (inner, inner), keys.gate_up, spec.mlp_bias)
        else:
            yield from self.linear(f"{name}up", key + keys.up, inner, spec.hidden_size, spec.mlp_bias)
        yield from self.linear(f"{name}down", key + keys.down, spec.hidden_size, inner, spec.mlp_bias)

    def moe(self, name: str, key: str, moe: MoeSpec) -> Named:
        keys, hidden = self.keys, self.spec.hidden_size
        yield f"{name}router.weight", _whole(f"{key}{keys.router}.weight", (moe.num_experts, hidden))
        inner = moe.intermediate_size
        for expert in range(moe.num_experts):
            if keys.stacked_experts is None:
                parts = [f"{key}{keys.expert}{expert}.{part}" for part in keys.expert_parts]
                yield from self.expert(f"{name}experts.{expert}.", parts, inner)
            else:
                yield from self.stacked(f"{name}experts.{expert}.", key, expert, moe)
        if moe.shared_intermediate_size:
            parts = [key + keys.shared_expert + part for part in keys.shared_parts]
            yield from self.expert(f"{name}shared.", parts, moe.shared_intermediate_size)
            yield f"{name}shared_gate.weight", _whole(f"{key}{keys.shared_gate}.weight", (1, hidden))

    def expert(self, name: str, modules: Sequence[str], inner: int) -> Named:
        for part, module, shape in zip(EXPERT_PARTS, modules, self.expert_shapes(inner), strict=True):
            yield from self.linear(name + part, module, *shape, False)

    def stacked(self, name: str, key: str, expert: int, moe: MoeSpec) -> Named:
        """An expert's rows among those of all."""
        modules, shapes = self.keys.stacked_experts or (), self.expert_shapes(moe.intermediate_size)
        for part, module, (out, size) in zip(EXPERT_PARTS, modules, shapes, strict=True):
            rows, total = Rows(1, expert * out, (expert + 1) * out), moe.num_experts * out
            yield (
                f"{name}{part}.weight",
                self.product(f"{key}{module}.weight", (total, size), (out, size), rows),
            )

    def expert_shapes(self, inner: int) -> tuple[tuple[int, int], ...]:
        hidden = self.spec.hidden_size
        return (inner, hidden), (inner, hidden), (hidden, inner)

    def norm(self, name: str, module: str) -> Named:
        yield f"{name}.weight", _whole(f"{module}.weight", (self.spec.hidden_size,))
        if self.spec.norm.bias:
            yield f"{name}.bias", _whole(f"{module}.bias", (self.spec.hidden_size,))

    def head_norm(self, name: str, module: str, heads: int) -> Named:
        """Of q or k, in one tensor or in one for each head."""
        kind, size = self.spec.qk_norm, self.spec.head_dim
        if kind == "layer":
            for head in range(heads):
                yield f"{name}.{head}.weight", _whole(f"{module}.{head}.weight", (size,))
        elif kind is not None:
            yield f"{name}.weight", _whole(f"{module}.weight", (heads * size if kind == "whole" else size,))

    def linear(self, name: str, module: str, out: int, size: int, bias: bool) -> Named:
        yield f"{name}.weight", self.product(f"{module}.weight", (out, size), (out, size), None)
        if bias:
            yield f"{name}.bias", _whole(f"{module}.bias", (out,))

    def several(
        self,
        name: str,
        key: str,
        parts: Sequence[str],
        sizes: Sequence[int],
        modules: Fused | Sequence[str],
        bias: bool,
    ) -> Named:
        """Products of one input, which a family keeps apart or together."""
        hidden = self.spec.hidden_size
        if not isinstance(modules, Fused):
            for part, size, module in zip(parts, sizes, modules, strict=True):
                yield from self.linear(name + part, key + module, size, hidden, bias)
            return
        blocks = self.spec.num_kv_heads if modules.by_group else 1
        total, first, module = sum(sizes), 0, key + modules.module
        for part, size in zip(parts, sizes, strict=True):
            rows = Rows(blocks, first, first + size // blocks)
            quantized = f"{module}.{part}.weight" if self.spec.quantization else f"{module}.weight"
            yield f"{name}{part}.weight", self.product(quantized, (total, hidden), (size, hidden), rows)
            if bias:
                yield f"{name}{part}.bias", Source(f"{module}.bias", (total,), (size,), rows)
            first += size // blocks

    def product(self, key: str, stored: tuple[int, int], shape: tuple[int, int], rows: Rows | None) -> Source:
        """Quantised ones are stored as the model has them, whatever they were made of."""
        if self.spec.quantization is not None:
            return Source(key, shape, shape, product=True)
        transposed = self.keys.transposed
        return Source(key, stored[::-1] if transposed else stored, shape, rows, transposed, product=True)


def _whole(key: str, shape: tuple[int, ...]) -> Source:
    return Source(key, shape, shape)
