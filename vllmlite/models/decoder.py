"""The decoder: runs any :class:`DecoderSpec` on any backend, through the backend's ops only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllmlite.backends.base import (
    Backend,
    Expert,
    Experts,
    KVCache,
    LinearWeight,
    Rope,
)
from vllmlite.backends.batch import AdapterRows, ForwardBatch, Tensor
from vllmlite.backends.comm import Comm, SingleRank
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.models.changeable import ChangeableWeights, ExpertLinears, Linear
from vllmlite.models.rope import cos_sin
from vllmlite.models.shard import head_sizes
from vllmlite.models.spec import DecoderSpec, MoeSpec, RopeSpec
from vllmlite.weights.adapter import EMBEDDING, Adapter, AdapterLimits
from vllmlite.weights.adapter import HEAD as HEAD_PLACE
from vllmlite.weights.host import HostTensor
from vllmlite.weights.parts import HEAD, TABLE, ModelWeights

FINAL = -1
"""Number that stands for the hidden states after the last norm, where layer numbers stand for the inputs of layers."""


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class _Mlp:
    up: Linear
    """Up projection; for a gated MLP, gate and up projection in one weight."""
    down: Linear


@dataclass(frozen=True, slots=True)
class _Moe:
    spec: MoeSpec
    router: Linear
    experts: Experts
    linears: ExpertLinears
    shared: _Mlp | None
    shared_gate: LinearWeight | None


@dataclass(frozen=True, slots=True)
class _Layer:
    attn_norm: _Norm | None
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    rope: Rope | None
    window: int | None
    sinks: Tensor | None
    o: Linear
    attn_out_norm: _Norm | None
    mlp_norm: _Norm | None
    mlp: _Mlp | _Moe
    mlp_out_norm: _Norm | None


class Decoder:
    """A model on a backend; implements the runner's ``Model``.

    ``weights`` holds the tensors that ``models.tensors.sources(spec)`` names. The model runs sequences of up to
    ``max_model_len`` tokens, at positions below ``num_positions``."""

    def __init__(
        self,
        spec: DecoderSpec,
        backend: Backend,
        weights: ModelWeights,
        *,
        max_model_len: int,
        num_positions: int,
        kv_spec: KVSpec,
    ) -> None:
        self.spec = spec
        self.backend = backend
        self.vocab_size = spec.vocab_size
        self._comm: Comm = SingleRank() if spec.shard is None else backend.comm
        self.kv_spec = kv_spec
        self._scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        self._alibi = backend.tensor(np.array(spec.alibi, np.float32)) if spec.alibi else None
        ropes = {
            rope: Rope(backend.tensor(cos_sin(rope, num_positions, max_model_len)), rope.rotary_dim)
            for rope in dict.fromkeys(layer.rope for layer in spec.layers)
            if rope is not None
        }
        load = _Loader(spec, backend, weights, ropes)
        self._changeable = load.changeable
        stage, projected = spec.stage, spec.embedding_size is not None
        if stage.has_table:
            table = backend.tensor(weights.floats(TABLE), backend.dtype)
            self._embed = load.changeable.add(table, EMBEDDING)
            weights.release([TABLE])
        if stage.is_first:
            self._positions = (
                backend.tensor(weights.floats("positions.weight"), backend.dtype)
                if spec.learned_positions
                else None
            )
            self._embedding_norm = load.norm("embedding_norm") if spec.embedding_norm else None
            self._project_in = load.linear("", "project_in") if projected else None
        self._layers = [load.layer(layer) for layer in range(spec.num_layers)]
        if not stage.is_last:
            return
        self._project_out = load.linear("", "project_out") if projected else None
        self._final_norm = load.norm("final_norm") if spec.final_norm else None
        self._head_sizes = head_sizes(spec)
        if HEAD in weights.sources:
            head = load.product([HEAD])
        elif weights.packed_head is not None:
            head = load.product([TABLE])
        else:
            head = backend.tied_weight(self._embed.weight)
        self._head = load.changeable.add(head, HEAD_PLACE)

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Compute the final hidden states ``[T, output_size]`` of ``batch``; write its keys and values to ``kv``.

        A stage of a pipeline takes the hidden states of the one before, and sends its own, ``[T, hidden_size]``, to the
        one after it."""
        return self.forward_keeping(batch, kv, (), None)[0]

    def forward_keeping(
        self, batch: ForwardBatch, kv: KVCache, kept: Sequence[int], rows: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute :meth:`forward`, and copies of the hidden states ``kept`` of the tokens ``rows``, int32 ``[N]``.
        Layer numbers in ``kept`` stand for the layers' inputs, and :data:`FINAL` for the result of :meth:`forward`.

        A stage of a pipeline sends the hidden states of all tokens to the next stage, after its result."""
        ops, stage, shape = self.backend, self.spec.stage, (batch.num_tokens, self.spec.hidden_size)
        own = [layer - stage.first for layer in kept if layer >= stage.first]
        earlier = {layer for layer in kept if FINAL < layer < stage.first}
        x = self._embedded(batch) if stage.is_first else self._comm.receive(shape, "float32")
        states = {layer: self._comm.receive(shape, "float32") for layer in sorted(earlier)}
        if kept and not stage.is_last:
            rows = ops.tensor(np.arange(batch.num_tokens, dtype=np.int32))
        x, residual, found = self.through_layers(x, batch, kv, own, rows)
        states |= {layer + stage.first: state for layer, state in found.items()}
        if not stage.is_last:
            x = x if residual is None else ops.add(x, residual)
            for tensor in (x, *(states[layer] for layer in sorted(states))):
                self._comm.send(tensor)
            return x, []
        states |= {layer: ops.rows(states[layer], rows) for layer in earlier}
        x = self._normed(x, self._final_norm, residual)[0]
        if self._project_out is not None:
            x = self._linear(x, self._project_out, batch)
        if FINAL in kept:
            states[FINAL] = ops.rows(x, rows)
        return x, [states[layer] for layer in kept]

    def through_layers(
        self, x: Tensor, batch: ForwardBatch, kv: KVCache, kept: Sequence[int] = (), rows: Tensor = None
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """Compute the layers from hidden states ``x [T, hidden_size]``. Returns two tensors whose sum is the last
        layer's output (None for the second if the first is the sum), and the inputs of the layers ``kept`` at the
        tokens ``rows``."""
        ops, parallel, adapted = self.backend, self.spec.parallel, batch.adapters is not None
        residual = None
        states: dict[int, Tensor] = {}
        for index, layer in enumerate(self._layers):
            if index in kept:
                copy = ops.rows(x, rows)
                states[index] = copy if residual is None else ops.add(copy, ops.rows(residual, rows))
            if self.spec.post_norm:
                x = self._normed(self._attention(x, index, layer, batch, kv), layer.attn_norm, x)[0]
                x = self._normed(self._mlp(x, layer.mlp, batch), layer.mlp_norm, x)[0]
                continue
            alone = adapted or parallel
            h, residual = self._normed(x, layer.attn_norm, residual, None if alone else layer.qkv.weight)
            x = self._output(self._attention(h, index, layer, batch, kv), layer.attn_out_norm)
            if parallel:
                if layer.mlp_norm is not None:
                    h = self._normed(residual, layer.mlp_norm)[0]
                x = ops.add(self._output(self._mlp(h, layer.mlp, batch), layer.mlp_out_norm), x)
                continue
            up = layer.mlp.up.weight if isinstance(layer.mlp, _Mlp) and not adapted else None
            h, residual = self._normed(x, layer.mlp_norm, residual, up)
            x = self._output(self._mlp(h, layer.mlp, batch), layer.mlp_out_norm)
        return x, residual, states

    @property
    def embedding_table(self) -> Tensor:
        """The table of embeddings ``[V, hidden]``."""
        return self._embed.weight

    def logits(self, hidden: Tensor, adapters: AdapterRows = None) -> Tensor:
        """Return float32 logits ``[N, V]`` of hidden states ``[N, output_size]``, whose rows have ``adapters``."""
        own = self.backend.logits(hidden, self._head.weight)
        if adapters is not None and self._head.changes is not None:
            own = self.backend.add_lora(own, hidden, self._head.changes, adapters)
        logits = self._scaled(self._comm.all_gather(own, self._head_sizes), self.spec.logit_scale)
        cap = self.spec.logit_soft_cap
        return logits if cap is None else self.backend.soft_cap(logits, cap)

    def enable_adapters(self, limits: AdapterLimits) -> None:
        """Allocate tables for the changes by adapters within ``limits``."""
        self._changeable.allocate(limits)

    def set_adapter(self, index: int, adapter: Adapter | None) -> None:
        """Put ``adapter`` at ``index``, or remove the one there if it is None. Raises ParameterError if it does not fit
        the model."""
        for _ in self.set_adapter_parts(index, adapter):
            pass

    def set_adapter_parts(self, index: int, adapter: Adapter | None) -> Iterator[int]:
        """Put ``adapter`` at ``index``, or remove the one there, one weight after the other; yields the bytes of
        each."""
        yield from self._changeable.set_parts(index, adapter)

    def _embedded(self, batch: ForwardBatch) -> Tensor:
        ops = self.backend
        x = ops.embedding(batch.token_ids, self._embed.weight)
        if batch.adapters is not None and self._embed.changes is not None:
            x = ops.add_lora(x, batch.token_ids, self._embed.changes, batch.token_adapters)
        x = self._scaled(x, self.spec.embedding_scale)
        if self._project_in is not None:
            x = self._linear(x, self._project_in, batch)
        if self._positions is not None:
            x = ops.add(ops.embedding(batch.positions, self._positions), x)
        return x if self._embedding_norm is None else self._normed(x, self._embedding_norm)[0]

    def _attention(self, h: Tensor, index: int, layer: _Layer, batch: ForwardBatch, kv: KVCache) -> Tensor:
        ops, spec = self.backend, self.spec
        q = ops.attn_prep(
            self._linear(h, layer.qkv, batch),
            spec.num_heads,
            layer.rope,
            kv,
            index,
            batch,
            layer.q_norm,
            layer.k_norm,
            spec.norm.eps,
        )
        x = ops.paged_attention(
            q,
            kv,
            index,
            batch,
            self._scale,
            layer.window,
            spec.attention_soft_cap,
            self._alibi,
            layer.sinks,
        )
        return self._comm.all_reduce(self._linear(x, layer.o, batch))

    def _linear(self, x: Tensor, linear: Linear, batch: ForwardBatch) -> Tensor:
        """Multiply ``x [T, in]`` with a weight as it is changed by each row's adapter."""
        if batch.adapters is None or linear.changes is None:
            return self.backend.linear(x, linear.weight)
        return self.backend.lora_linear(x, linear.weight, linear.changes, batch)

    def _mlp(self, h: Tensor, mlp: _Mlp | _Moe, batch: ForwardBatch) -> Tensor:
        return self._comm.all_reduce(self._own_mlp(h, mlp, batch))

    def _own_mlp(self, h: Tensor, mlp: _Mlp | _Moe, batch: ForwardBatch) -> Tensor:
        """Return this rank's summand of the MLP's output; all ranks' summands are added by an all-reduce."""
        ops, spec = self.backend, self.spec
        if isinstance(mlp, _Mlp):
            if not spec.gated_mlp:
                inner = ops.activation(self._linear(h, mlp.up, batch), spec.activation)
            elif batch.adapters is None:
                inner = ops.gated_linear(h, mlp.up.weight, spec.activation, mlp.down.weight)
            else:
                inner = ops.gated_activation(self._linear(h, mlp.up, batch), spec.activation)
            return self._linear(inner, mlp.down, batch)
        adapted = (
            ()
            if batch.adapters is None or mlp.linears.tables is None
            else (mlp.linears.tables, batch.token_adapters)
        )
        routed = ops.moe(
            h,
            self._linear(h, mlp.router, batch),
            mlp.experts,
            mlp.spec.top_k,
            mlp.spec.renormalise,
            spec.activation,
            *adapted,
        )
        if mlp.shared is None or mlp.shared_gate is None:
            return routed
        shared = self._own_mlp(h, mlp.shared, batch)
        return ops.add(ops.sigmoid_gate(shared, ops.linear(h, mlp.shared_gate)), routed)

    def _normed(
        self, x: Tensor, norm: _Norm | None, residual: Tensor | None = None, feeds: LinearWeight | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of ``x + residual``, and that sum; without ``norm``, the sum twice. ``feeds`` is the weight
        of the product that is the only reader of the norm."""
        ops, eps = self.backend, self.spec.norm.eps
        if norm is None:
            total = x if residual is None else ops.add(x, residual)
            return total, total
        if self.spec.norm.kind == "layer":
            return ops.layer_norm(x, norm.weight, norm.bias, eps, residual)
        return ops.rms_norm(x, norm.weight, eps, residual, feeds)

    def _output(self, x: Tensor, norm: _Norm | None) -> Tensor:
        return self._scaled(x if norm is None else self._normed(x, norm)[0], self.spec.residual_scale)

    def _scaled(self, x: Tensor, factor: float) -> Tensor:
        return x if factor == 1.0 else self.backend.scale(x, factor)


class _Loader:
    """Loads the parts of a model onto its backend."""

    def __init__(
        self, spec: DecoderSpec, backend: Backend, weights: ModelWeights, ropes: Mapping[RopeSpec, Rope]
    ) -> None:
        self.spec, self.backend, self.weights, self.ropes = spec, backend, weights, ropes
        self.changeable = ChangeableWeights(spec, backend)

    def layer(self, index: int) -> _Layer:
        spec, layer, name = self.spec, self.spec.layers[index], f"{index}."
        return _Layer(
            attn_norm=self.norm(f"{name}attn_norm") if spec.attn_norm else None,
            qkv=self.linear(name, "q", "k", "v"),
            q_norm=self.head_norm(f"{name}q_norm", spec.num_heads) if spec.qk_norm else None,
            k_norm=self.head_norm(f"{name}k_norm", spec.num_kv_heads) if spec.qk_norm else None,
            rope=None if layer.rope is None else self.ropes[layer.rope],
            window=layer.window,
            sinks=self.backend.tensor(self.weights.floats(f"{name}sinks"), "float32")
            if spec.attention_sinks
            else None,
            o=self.linear(name, "o"),
            attn_out_norm=self.norm(f"{name}attn_out_norm") if spec.attn_out_norm else None,
            mlp_norm=self.norm(f"{name}mlp_norm") if spec.mlp_norm else None,
            mlp=self.mlp(name, spec.gated_mlp) if layer.moe is None else self.moe(name, layer.moe),
            mlp_out_norm=self.norm(f"{name}mlp_out_norm") if spec.mlp_out_norm else None,
        )

    def mlp(self, name: str, gated: bool = True) -> _Mlp:
        up = self.linear(name, "gate", "up") if gated else self.linear(name, "up")
        return _Mlp(up, self.linear(name, "down"))

    def expert(self, name: str) -> Expert:
        return Expert(self.weight(name, "gate", "up"), self.weight(name, "down"))

    def moe(self, name: str, moe: MoeSpec) -> _Moe:
        shared = bool(moe.shared_intermediate_size)
        experts = [f"{name}experts.{expert}." for expert in range(moe.num_experts)]
        return _Moe(
            spec=moe,
            router=self.changeable.add(self.float_weight(f"{name}router"), f"{name}router"),
            experts=self.backend.experts([self.expert(expert) for expert in experts]),
            linears=self.changeable.add_experts(experts),
            shared=self.mlp(f"{name}shared.") if shared else None,
            shared_gate=self.float_weight(f"{name}shared_gate") if shared else None,
        )

    def linear(self, name: str, *parts: str) -> Linear:
        return self.changeable.add(self.weight(name, *parts), *(name + part for part in parts))

    def weight(self, name: str, *parts: str) -> LinearWeight:
        biases = [self.weights.optional(f"{name}{part}.bias") for part in parts]
        return self.product(
            [f"{name}{part}.weight" for part in parts], [bias for bias in biases if bias is not None]
        )

    def product(self, names: Sequence[str], biases: Sequence[HostTensor] = ()) -> LinearWeight:
        """Return the weight matrices ``names`` as one weight."""
        weight = self.backend.linear_weight(self.weights.products(names), biases)
        self.weights.release(names)
        return weight

    def float_weight(self, name: str) -> LinearWeight:
        """Return a weight that is never quantised, a router or a gate, and its bias if it has one."""
        bias = self.weights.optional(f"{name}.bias")
        biases = [] if bias is None else [bias]
        return self.backend.linear_weight([self.weights.floats(f"{name}.weight")], biases)

    def norm(self, name: str) -> _Norm:
        bias = self.weights.optional(f"{name}.bias")
        return _Norm(
            self.norm_weight(f"{name}.weight"),
            None if bias is None else self.backend.tensor(bias, self.backend.dtype),
        )

    def norm_weight(self, name: str) -> Tensor:
        return norm_weight(self.backend, self.weights, name, self.spec.norm.unit_offset)

    def head_norm(self, name: str, heads: int) -> Tensor:
        """Return the norm weights of q or k: ``[D]``, or ``[heads, D]`` if each head has its own."""
        if self.spec.qk_norm != "layer":
            return self.norm_weight(f"{name}.weight")
        backend = self.backend
        rows = [
            backend.tensor(self.weights.floats(f"{name}.{head}.weight"), "float32") for head in range(heads)
        ]
        return backend.tensor(np.stack(list(map(backend.to_host, rows))), backend.dtype)


def norm_weight(backend: Backend, weights: ModelWeights, name: str, unit_offset: bool) -> Tensor:
    """Return a norm's weight. With ``unit_offset`` it is in float32: 16 bits are too few for values near 1."""
    host = weights.floats(name)
    if not unit_offset:
        return backend.tensor(host, backend.dtype)
    return backend.tensor(backend.to_host(backend.tensor(host, "float32")) + np.float32(1))
