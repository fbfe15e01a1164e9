"""Every op of the contract × backend × dtype, against small float64 formulas of numpy.

A new backend is added to ``BACKENDS``, and starts by making this file pass. Where torch is not installed, as on the
machines that build the native backend's package alone, the reference is left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from paged import Paged, host_batch, host_tensor

from vllmlite.backends.base import Backend, Expert, KVSpec, Rope, SlotParams, SlotSpec
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.native import load_extension
from vllmlite.errors import BackendError
from vllmlite.weights.host import FLOAT_DTYPES, HostTensor

Array = NDArray[Any]

BACKENDS: dict[str, Callable[[str], Backend]] = {}
HAS_TORCH = find_spec("torch") is not None
of_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


def reference(device: str) -> Callable[[str], Backend]:
    from vllmlite.backends.torch import TorchBackend

    return lambda dtype: TorchBackend(device, dtype)


def native(isa: str) -> Callable[[str], Backend]:
    return lambda dtype: CpuBackend(dtype, isa=isa)


def cuda(dtype: str) -> Backend:
    try:
        return CudaBackend("cuda", dtype)
    except BackendError as error:
        pytest.skip(str(error))


def invariant(dtype: str) -> Backend:
    try:
        return CudaBackend("cuda", dtype, batch_invariant=True)
    except BackendError as error:
        pytest.skip(str(error))


BACKENDS["cuda"] = cuda
BACKENDS["cuda-invariant"] = invariant
if HAS_TORCH:
    import torch

    BACKENDS["torch-cpu"] = reference("cpu")
    if torch.cuda.is_available():
        BACKENDS["torch-cuda"] = reference("cuda")
try:
    BACKENDS |= {f"cpu-{isa}": native(isa) for isa in load_extension("_cpu").instruction_sets()}
except BackendError as error:
    warnings.warn(f"the cpu backend is not tested: {error}", stacklevel=1)

TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error of an op, as a part of its largest result."""


@pytest.fixture(params=[f"{name}-{dtype}" for name in BACKENDS for dtype in FLOAT_DTYPES])
def backend(request: pytest.FixtureRequest) -> Backend:
    name, dtype = request.param.rsplit("-", 1)
    return BACKENDS[name](dtype)


@pytest.fixture(params=BACKENDS)
def exact(request: pytest.FixtureRequest) -> Backend:
    """Each backend in float32 alone, for what has no rounding to speak of."""
    return BACKENDS[request.param]("float32")


def numbers(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Array:
    """Normal numbers that every float dtype holds exactly."""
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return (
        (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000))
        .view(np.float32)
        .astype(np.float64)
    )


def put(backend: Backend, values: Array) -> Any:
    return backend.tensor(np.ascontiguousarray(values, np.float32), backend.dtype)


def host(backend: Backend, values: Array) -> HostTensor:
    return host_tensor(values, backend.dtype)


def check(backend: Backend, found: Any, expected: Array) -> None:
    array = backend.to_host(found)
    assert array.shape == expected.shape
    error = np.abs(array.astype(np.float64) - expected).max(initial=0)
    assert error <= TOLERANCE[backend.dtype] * np.abs(expected).max(initial=0)


# Tensors


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_tensor_there_and_back(exact: Backend, dtype: str) -> None:
    values = (numbers((5, 3), 1) * 3).astype(dtype)
    for given in (values, host_tensor(values, dtype)):
        found = exact.to_host(exact.tensor(given))
        assert found.dtype == values.dtype
        assert (found == values).all()


def test_tensor_converts(backend: Backend) -> None:
    values = numbers((4, 6))
    for dtype in FLOAT_DTYPES:
        check(backend, backend.tensor(host_tensor(values, dtype), backend.dtype), values)
    assert backend.to_host(backend.tensor(host_tensor(values, "bfloat16"))).dtype == np.float32


def test_tensor_of_read_only_memory_is_silent(exact: Backend, recwarn: pytest.WarningsRecorder) -> None:
    data = np.frombuffer(numbers((8,)).astype("<f4").tobytes(), np.uint8)
    assert not data.flags.writeable
    exact.tensor(HostTensor("float32", (8,), data))
    assert not list(recwarn)


def test_empty_and_scalar_shapes(exact: Backend) -> None:
    assert exact.to_host(exact.empty((0, 3), "float32")).shape == (0, 3)
    assert exact.to_host(exact.tensor(host_tensor(np.zeros((), np.float32)))).shape == ()
    assert exact.to_host(exact.tensor(host_tensor(np.zeros((2, 0), np.float32)))).shape == (2, 0)


def test_rows_copies(backend: Backend) -> None:
    values = numbers((6, 4))
    index = np.array([5, 0, 5], np.int32)
    check(backend, backend.rows(put(backend, values), backend.tensor(index)), values[index])


def test_memory_is_plausible(exact: Backend) -> None:
    memory = exact.memory()
    assert 0 < memory.free <= memory.total


# Model ops


def test_embedding_and_tied_weight(backend: Backend) -> None:
    table = numbers((50, 64))
    weight = backend.tensor(host(backend, table), backend.dtype)
    ids = np.array([3, 49, 0, 3], np.int32)
    check(backend, backend.embedding(backend.tensor(ids), weight), table[ids])
    x = numbers((5, 64), 1)
    found = backend.logits(put(backend, x), backend.tied_weight(weight))
    assert backend.to_host(found).dtype == np.float32
    check(backend, found, x @ table.T)


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 70])
@pytest.mark.parametrize("biases", [False, True])
def test_linear(backend: Backend, num_tokens: int, biases: bool) -> None:
    x = numbers((num_tokens, 96))
    parts = [numbers((out, 96), out, 0.1) for out in (64, 32, 33)]
    bias = [numbers((len(part),), 9) for part in parts]
    weight = backend.linear_weight(
        [host(backend, p) for p in parts], [host(backend, b) for b in bias] if biases else ()
    )
    expected = x @ np.concatenate(parts).T + (np.concatenate(bias) if biases else 0)
    check(backend, backend.linear(put(backend, x), weight), expected)


@pytest.mark.parametrize("columns", [96, 512, 1032])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_batch_invariant_products(dtype: str, columns: int) -> None:
    backend = invariant(dtype)
    x = numbers((300, columns))
    weight = backend.linear_weight([host(backend, numbers((200, columns), 1, 0.1))])
    whole = backend.to_host(backend.linear(put(backend, x), weight))
    for first, last in ((0, 1), (7, 15), (3, 19), (40, 57), (100, 164), (30, 95), (290, 300)):
        part = backend.to_host(backend.linear(put(backend, x[first:last]), weight))
        assert (part == whole[first:last]).all()


@of_torch
def test_linear_where_the_cpu_must_widen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllmlite.backends.torch._blocked_layout_runs", lambda dtype: False)
    monkeypatch.setattr("vllmlite.backends.torch._multiplies", lambda dtype: False)
    monkeypatch.setattr("vllmlite.backends.torch._WIDEN_PART", 50)
    for dtype in FLOAT_DTYPES:
        test_linear(reference("cpu")(dtype), 16, True)
        test_linear(reference("cpu")(dtype), 15, False)


def test_linear_of_one_part(backend: Backend) -> None:
    x, part = numbers((4, 32)), numbers((48, 32), 1)
    check(backend, backend.linear(put(backend, x), backend.linear_weight([host(backend, part)])), x @ part.T)


def rms(x: Array, weight: Array, eps: float) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight)


@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(backend: Backend, residual: bool) -> None:
    x, other, weight = numbers((5, 80), 0, 0.01), numbers((5, 80), 1, 0.01), numbers((80,), 2)
    total = x + other if residual else x
    normed, added = backend.rms_norm(
        put(backend, x), put(backend, weight), 1e-5, put(backend, other) if residual else None
    )
    check(backend, normed, rms(total, weight, 1e-5))
    check(backend, added, total)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_ops_of_a_layer_in_a_row(backend: Backend, rows: int, activation: str) -> None:
    """Residual, norm, product, gate and product, which backends may put together as they like."""
    hidden, inner = 96, 160
    x, other, scale = numbers((rows, hidden)), numbers((rows, 48), 1), numbers((hidden,), 2)
    up, down = numbers((2 * inner, hidden), 3, 0.2), numbers((hidden, inner), 4, 0.2)
    onto = numbers((hidden, 48), 5, 0.2)
    weights = {
        name: backend.linear_weight([host(backend, w)]) for name, w in (("o", onto), ("u", up), ("d", down))
    }
    residual, norm = put(backend, x), put(backend, scale)
    for _ in range(2):
        x = x + other @ onto.T
        expected = rms(x, scale, 1e-5)
        normed, residual = backend.rms_norm(
            backend.linear(put(backend, other), weights["o"]), norm, 1e-5, residual
        )
        check(backend, residual, x)
        inside = gated(expected @ up.T, activation)
        product = backend.linear(
            backend.gated_activation(backend.linear(normed, weights["u"]), activation), weights["d"]
        )
        x = x + inside @ down.T
        kept, kept_product = normed, backend.linear(normed, weights["u"])
        normed, residual = backend.rms_norm(product, norm, 1e-5, residual)
        check(backend, normed, rms(x, scale, 1e-5))
        check(backend, product, inside @ down.T)
        check(backend, kept, expected)  # of the residual as it was
        check(backend, kept_product, expected @ up.T)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm(backend: Backend, residual: bool, bias: bool) -> None:
    x, other, weight = numbers((5, 83), 0, 0.01) + 0.5, numbers((5, 83), 1, 0.01), numbers((83,), 2)
    x, added = np.trunc(x * 256) / 256, numbers((83,), 3)  # bfloat16 holds them still
    total = x + other if residual else x
    if residual:
        total = backend.to_host(put(backend, total)).astype(np.float64)
    away = total - total.mean(-1, keepdims=True)
    expected = away / np.sqrt((away**2).mean(-1, keepdims=True) + 1e-5) * weight + (added if bias else 0)
    normed, found = backend.layer_norm(
        put(backend, x),
        put(backend, weight),
        put(backend, added) if bias else None,
        1e-5,
        put(backend, other) if residual else None,
    )
    if backend.dtype == "float32" or not residual:  # elsewhere, how a sum of 16 bits is rounded is magnified
        check(backend, normed, expected)
    check(backend, found, total)


def test_rms_norm_with_float32_weights(backend: Backend) -> None:
    x, weight = numbers((5, 80)), 1 + numbers((80,), 2, 1e-3)
    normed, _ = backend.rms_norm(put(backend, x), backend.tensor(weight.astype(np.float32)), 1e-5)
    check(backend, normed, rms(x, weight, 1e-5))


def test_sums_and_multiples(backend: Backend) -> None:
    x, other = numbers((5, 700)), numbers((5, 700), 1)
    check(backend, backend.add(put(backend, x), put(backend, other)), x + other)
    check(backend, backend.scale(put(backend, x), 0.22), x * 0.22)
    logits = backend.tensor((x * 20).astype(np.float32))
    found = backend.to_host(backend.soft_cap(logits, 30.0))
    np.testing.assert_allclose(found, 30 * np.tanh(x * 20 / 30), rtol=0, atol=1e-5 * 30)


def activated(x: Array, activation: str) -> Array:
    if activation == "silu":
        return np.asarray(x / (1 + np.exp(-x)))
    if activation == "gelu":
        return np.asarray(x * 0.5 * np.vectorize(math.erfc)(-x / np.sqrt(2)))
    if activation == "gelu_tanh":
        return np.asarray(x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
    return np.maximum(x, 0)


def gated(x: Array, activation: str) -> Array:
    gate, up = np.split(x, 2, 1)
    return np.asarray(activated(gate, activation) * up)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_activation(backend: Backend, activation: str) -> None:
    x = numbers((7, 60), 0, 3)
    check(backend, backend.gated_activation(put(backend, x), activation), gated(x, activation))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activation(backend: Backend, activation: str) -> None:
    x = numbers((7, 61), 0, 3)
    check(backend, backend.activation(put(backend, x), activation), activated(x, activation))


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_gated_linear(backend: Backend, num_tokens: int) -> None:
    x, gate, up = numbers((num_tokens, 24)), numbers((10, 24), 1), numbers((10, 24), 2)
    weight = backend.linear_weight([host(backend, gate), host(backend, up)])
    sums = x @ gate.T
    check(
        backend,
        backend.gated_linear(put(backend, x), weight, "silu"),
        sums / (1 + np.exp(-sums)) * (x @ up.T),
    )


def test_unknown_activation_is_an_error(exact: Backend) -> None:
    with pytest.raises(BackendError, match="relu"):
        exact.gated_activation(put(exact, numbers((1, 4))), "relu")
    with pytest.raises(BackendError, match="relu2"):
        exact.activation(put(exact, numbers((1, 4))), "relu2")


# Mixtures of experts


def mixture(
    x: Array, logits: Array, gate_up: list[Array], down: list[Array], top_k: int, renormalise: bool
) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        chosen = sorted(np.argsort(-logits[token], kind="stable")[:top_k])
        total = weights[token, chosen].sum() if renormalise else 1.0
        for expert in chosen:
            gate, up = np.split(gate_up[expert] @ row, 2)
            out[token] += weights[token, expert] / total * (down[expert] @ (activated(gate, "silu") * up))
    return out


def experts_of(backend: Backend, gate_up: list[Array], down: list[Array]) -> Any:
    return backend.experts(
        [
            Expert(
                backend.linear_weight([host(backend, part) for part in np.split(first, 2)]),
                backend.linear_weight([host(backend, second)]),
            )
            for first, second in zip(gate_up, down, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("tokens", "top_k", "count", "hidden", "inner"),
    [
        (1, 1, 7, 48, 40),
        (3, 2, 7, 48, 40),
        (17, 4, 7, 48, 40),
        (150, 3, 7, 48, 40),
        (300, 4, 7, 136, 72),
        (17, 3, 7, 45, 21),
        (70, 9, 67, 24, 16),
    ],
)
@pytest.mark.parametrize("renormalise", [False, True])
def test_moe(
    backend: Backend, tokens: int, top_k: int, count: int, hidden: int, inner: int, renormalise: bool
) -> None:
    x, logits, gate_up, down = a_mixture(tokens, count, hidden, inner)
    found = backend.moe(
        put(backend, x),
        put(backend, logits),
        experts_of(backend, gate_up, down),
        top_k,
        renormalise,
        "silu",
    )
    check(backend, found, mixture(x, logits, gate_up, down, top_k, renormalise))


def a_mixture(
    tokens: int, count: int, hidden: int, inner: int
) -> tuple[Array, Array, list[Array], list[Array]]:
    x, logits = numbers((tokens, hidden)), numbers((tokens, count), 1, 2)
    logits[:, 5] = -100  # an expert that nobody asks
    gate_up = [numbers((2 * inner, hidden), 10 + expert, 0.2) for expert in range(count)]
    down = [numbers((hidden, inner), 20 + expert, 0.2) for expert in range(count)]
    return x, logits, gate_up, down


@pytest.mark.parametrize(("hidden", "inner"), [(136, 72), (45, 21)])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_batch_invariant_mixtures(dtype: str, hidden: int, inner: int) -> None:
    backend = invariant(dtype)
    x, logits, gate_up, down = a_mixture(600, 7, hidden, inner)
    experts = experts_of(backend, gate_up, down)

    def mixed(rows: slice) -> Array:
        return backend.to_host(
            backend.moe(put(backend, x[rows]), put(backend, logits[rows]), experts, 3, True, "gelu_tanh")
        )

    whole = mixed(slice(None))
    for first, last in ((0, 1), (7, 15), (3, 19), (40, 57), (100, 230), (30, 95), (590, 600)):
        assert (mixed(slice(first, last)) == whole[first:last]).all()


def test_equal_experts_are_taken_in_order(exact: Backend) -> None:
    x, logits = numbers((4, 16)), np.zeros((4, 5))
    gate_up = [numbers((16, 16), 10 + expert) for expert in range(5)]
    down = [numbers((16, 8), 20 + expert) for expert in range(5)]
    experts = experts_of(exact, gate_up, down)
    found = exact.moe(put(exact, x), put(exact, logits), experts, 2, True, "silu")
    check(exact, found, mixture(x, logits, gate_up, down, 2, True))


def test_sigmoid_gate(backend: Backend) -> None:
    x, weight = numbers((5, 40)), numbers((1, 40), 1)
    gate = backend.linear(put(backend, x), backend.linear_weight([host(backend, weight)]))
    check(backend, gate, x @ weight.T)
    gate = numbers((5, 1), 2)
    check(backend, backend.sigmoid_gate(put(backend, x), put(backend, gate)), x / (1 + np.exp(-gate)))


# Attention


def rotated(x: Array, table: Array, interleaved: bool) -> Array:
    """``x [T, heads, D]`` by ``table [T, rotary_dim]`` of its tokens."""
    half = table.shape[1] // 2
    turns = (table[:, :half] + 1j * table[:, half:])[:, None]
    out = x.copy()
    first, second = (np.s_[0 : 2 * half : 2], np.s_[1 : 2 * half : 2]) if interleaved else (
        np.s_[:half],
        np.s_[half : 2 * half],
    )  # fmt: skip
    turned = (x[..., first] + 1j * x[..., second]) * turns
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    alibi: Array | None = None,
) -> Array:
    """Of one row: ``q [n, H, D]`` its last tokens, ``k``, ``v [context, K, D]``."""
    heads, kv_heads = q.shape[1], k.shape[1]
    out = np.empty_like(q)
    at = np.arange(len(k) - len(q), len(k))[:, None]
    keys = np.arange(len(k))[None]
    seen = (keys <= at) & (True if window is None else keys > at - window)
    for head in range(heads):
        group = head * kv_heads // heads
        scores = q[:, head] @ k[:, group].T * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        if alibi is not None:
            scores = scores + alibi[head] * (keys - at)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights @ v[:, group] / weights.sum(-1, keepdims=True)
    return out.reshape(len(q), -1)


def through_int8(x: Array) -> Array:
    """What an int8 cache gives back of heads ``x [..., D]``, which float32 holds exactly."""
    x = x.astype(np.float32)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.float32(2**-126))
    return np.asarray(scale.astype(np.float64) * np.rint(x / scale))


class Rows:
    """Rows fed to :class:`Paged` step by step, with everything remembered on the host to compare with."""

    def __init__(
        self, backend: Backend, heads: int, kv_heads: int, size: int, block_size: int, **options: Any
    ) -> None:
        spec = KVSpec(2, kv_heads, size, block_size, options.pop("kv_dtype", backend.dtype))
        self.backend, self.heads, self.kv_heads, self.size = backend, heads, kv_heads, size
        self.paged = Paged(backend, spec, **options)
        self.rope: Rope | None = None
        self.table: Array | None = None
        self.norms: tuple[Array, Array] | None = None
        self.norm_dtype = backend.dtype
        self.interleaved = False
        self.soft_cap: float | None = None
        self.alibi: Array | None = None
        self.keys: dict[int, Array] = {}
        self.values: dict[int, Array] = {}
        self.seed = 0

    def admit(self, slot: int) -> None:
        self.paged.admit(slot)
        self.keys[slot] = self.values[slot] = np.zeros((0, self.kv_heads, self.size))

    def step(self, slots: list[int], counts: list[int], windows: tuple[int | None, ...] = (None,)) -> None:
        """One step of layer 1, compared for each of ``windows``."""
        self.attend(*self.write(slots, counts), slots, counts, windows)

    def write(self, slots: list[int], counts: list[int]) -> tuple[Any, Any, Array]:
        """A step's keys and values: its batch, and its queries as found and as they should be."""
        backend, heads, kv_heads, size = self.backend, self.heads, self.kv_heads, self.size
        host_side = self.paged.batch(slots, counts)
        batch = self.paged.upload(host_side)
        self.seed += 1
        qkv = numbers((host_side.num_tokens, heads + 2 * kv_heads, size), self.seed)
        q_norm, k_norm = (
            (backend.tensor(weight.astype(np.float32), self.norm_dtype) for weight in self.norms)
            if self.norms
            else (None, None)
        )
        q = backend.attn_prep(
            put(backend, qkv.reshape(len(qkv), -1)),
            heads,
            self.rope,
            self.paged.kv,
            1,
            batch,
            q_norm,
            k_norm,
            1e-5,
        )
        new_q, new_k, new_v = np.split(qkv, [heads, heads + kv_heads], 1)
        if self.norms is not None:
            new_q, new_k = (
                (part - part.mean(-1, keepdims=True)) / np.sqrt(part.var(-1, keepdims=True) + 1e-5) * weight
                if weight.ndim == 2
                else rms(part.reshape(len(part), -1, len(weight)), weight, 1e-5).reshape(part.shape)
                for part, weight in zip((new_q, new_k), self.norms, strict=True)
            )
        if self.table is not None:
            rows = self.table[host_side.positions]
            new_q, new_k = rotated(new_q, rows, self.interleaved), rotated(new_k, rows, self.interleaved)
        check(backend, q, new_q)
        if self.paged.spec.dtype == "int8":
            new_k, new_v = through_int8(new_k), through_int8(new_v)
        begin = host_side.query_start_loc
        for row, slot in enumerate(slots):
            own = slice(begin[row], begin[row + 1])
            self.keys[slot] = np.concatenate((self.keys[slot], new_k[own]))
            self.values[slot] = np.concatenate((self.values[slot], new_v[own]))
        return batch, q, new_q

    def attend(
        self,
        batch: Any,
        q: Any,
        exact_q: Array,
        slots: list[int],
        counts: list[int],
        windows: tuple[int | None, ...],
    ) -> None:
        pieces = np.split(exact_q, np.cumsum(counts)[:-1])
        for window in (*windows, max(1, batch.max_context - 1), max(1, batch.max_query_len - 1)):
            expected = np.concatenate(
                [
                    attention(
                        piece, self.keys[slot], self.values[slot], 0.25, window, self.soft_cap, self.alibi
                    )
                    for piece, slot in zip(pieces, slots, strict=True)
                ]
            )
            slopes = None if self.alibi is None else self.backend.tensor(self.alibi.astype(np.float32))
            found = self.backend.paged_attention(
                q, self.paged.kv, 1, batch, 0.25, window, self.soft_cap, slopes
            )
            check(self.backend, found, expected)


STEPS: list[tuple[list[int], list[int]]] = [
    ([0], [1]),
    ([1], [9]),
    ([2, 3, 4], [17, 5, 16]),
    ([0, 1, 2, 3, 4], [1, 1, 1, 1, 1]),
    ([4, 0, 3, 5, 1, 2], [1, 6, 1, 40, 3, 33]),
    ([5, 2, 6, 0], [1, 1, 8, 70]),
    ([6, 5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 1, 1, 1]),
    ([0], [3]),
]
"""Slots and their tokens: single and mixed, decode and ragged prefill, with context and without."""


shapes = pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block"), [(4, 4, 16, 16), (6, 2, 32, 4), (8, 1, 24, 1), (2, 1, 256, 16)]
)


@shapes
def test_attention_with_windows(
    backend: Backend, heads: int, kv_heads: int, size: int, block: int, kv_dtype: str | None = None
) -> None:
    rows = Rows(
        backend,
        heads,
        kv_heads,
        size,
        block,
        num_blocks=-(-400 // block),
        kv_dtype=kv_dtype or backend.dtype,
    )
    for slot in range(7):
        rows.admit(slot)
    for slots, counts in STEPS:
        rows.step(slots, counts, (None, 1, 5, 32, 1000))


@shapes
def test_attention_over_int8(backend: Backend, heads: int, kv_heads: int, size: int, block: int) -> None:
    test_attention_with_windows(backend, heads, kv_heads, size, block, "int8")


@pytest.mark.parametrize(
    ("soft_cap", "biased", "kv_heads"), [(1.5, False, 2), (None, True, 6), (2.0, True, 1)]
)
def test_attention_with_edited_scores(
    backend: Backend, soft_cap: float | None, biased: bool, kv_heads: int
) -> None:
    rows = Rows(backend, 6, kv_heads, 32, 4)
    rows.soft_cap, rows.alibi = soft_cap, 2.0 ** -np.arange(6) if biased else None
    for slot in range(7):
        rows.admit(slot)
    for slots, counts in STEPS:
        rows.step(slots, counts, (None, 5))


def test_edited_scores_over_int8_and_long_contexts(exact: Backend) -> None:
    rows = Rows(exact, 4, 2, 16, 16, num_blocks=64, kv_dtype="int8")
    rows.soft_cap, rows.alibi = 3.0, np.array([0.5, 0.25, 0.01, 0.001])
    rows.admit(0)
    rows.step([0], [300])
    rows.step([0], [1])


def test_many_query_heads_to_a_key(backend: Backend) -> None:
    rows = Rows(backend, 71, 1, 16, 16)
    rows.admit(0)
    rows.admit(1)
    rows.step([0, 1], [40, 3])
    rows.step([0, 1], [1, 1])


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_attention_over_long_and_short_contexts(exact: Backend, kv_dtype: str) -> None:
    rows = Rows(exact, 4, 2, 16, 16, num_blocks=96, kv_dtype=kv_dtype)
    for slot, length in enumerate((700, 300, 2, 30)):
        rows.admit(slot)
        rows.step([slot], [length])
    rows.step([0, 1, 2, 3], [1, 1, 1, 1], (None, 20, 256))
    rows.step([3, 2, 1, 0], [2, 1, 50, 60], (None, 20, 256))


@pytest.mark.parametrize(("size", "block"), [(64, 16), (80, 32), (128, 16)])
def test_attention_of_many_queries(backend: Backend, size: int, block: int) -> None:
    rows = Rows(backend, 4, 2, size, block, num_blocks=96)
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 1, 2], [1, 300, 129], (None, 150))
    rows.step([2, 0, 1], [260, 70, 1], (None, 150, 20))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 64), (4, 1, 128), (4, 2, 256)])
def test_attention_over_very_long_contexts(backend: Backend, heads: int, kv_heads: int, size: int) -> None:
    if backend.device == "cpu":
        pytest.skip("too long for a CPU")
    rows = Rows(backend, heads, kv_heads, size, 16, num_blocks=2600)
    lengths = (32000, 4097, 1, 2047, 300)
    for slot, length in enumerate(lengths):
        rows.admit(slot)
        for begin in range(0, length, 4000):
            rows.write([slot], [min(4000, length - begin)])
    slots = list(range(len(lengths)))
    for _ in range(2):
        rows.step(slots, [1] * len(slots), (None, 20, 5000))
    rows.step(slots, [1, 3, 1, 70, 1], (None, 5000))


def test_attention_in_pieces(exact: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hardly any memory allowed, the reference cuts groups and rows, and nothing changes."""
    if exact.name != "torch":
        pytest.skip("a limit of the reference")
    monkeypatch.setattr("vllmlite.backends.torch_attention.LIMIT", 20000)
    monkeypatch.setattr("vllmlite.backends.torch_attention._KEEP_MASK", 0)
    test_attention_with_windows(exact, 6, 2, 32, 4)


@of_torch
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_attention_computed_in_float32(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for attends in (True, False):
        monkeypatch.setattr("vllmlite.backends.torch._attends", lambda dtype, attends=attends: attends)
        test_attention_with_windows(reference("cpu")(dtype), 6, 2, 32, 4)


def test_a_reused_slot_forgets(exact: Backend) -> None:
    rows = Rows(exact, 4, 2, 16, 4)
    rows.admit(0)
    rows.admit(1)
    rows.step([0, 1], [30, 9])
    rows.admit(0)
    rows.step([1, 0], [1, 5])
    rows.step([0, 1], [1, 1])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 12])
@pytest.mark.parametrize("norms", [None, "backend", "float32"])
def test_attn_prep(backend: Backend, interleaved: bool, rotary_dim: int, norms: str | None) -> None:
    rows = Rows(backend, 6, 2, 32, 4, max_context=60)
    if norms == "float32":
        rows.norm_dtype = norms
    angles = np.arange(60)[:, None] / 3 ** np.arange(rotary_dim // 2)
    rows.table = np.concatenate((np.cos(angles), np.sin(angles)), 1)
    rows.rope = Rope(backend.tensor(rows.table.astype(np.float32)), rotary_dim, interleaved)
    rows.interleaved = interleaved
    if norms:
        rows.norms = (numbers((32,), 100), numbers((32,), 101))
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 2], [3, 11])
    rows.step([2, 1, 0], [1, 20, 1])


@pytest.mark.parametrize("size", [32, 24])
def test_norms_over_all_heads(backend: Backend, size: int) -> None:
    rows = Rows(backend, 6, 2, size, 4, max_context=60)
    angles = np.arange(60)[:, None] / 3 ** np.arange(size // 2)
    rows.table = np.concatenate((np.cos(angles), np.sin(angles)), 1)
    rows.rope = Rope(backend.tensor(rows.table.astype(np.float32)), size)
    rows.norms = (numbers((6 * size,), 100), numbers((2 * size,), 101))
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 2], [3, 11])
    rows.step([2, 1, 0], [1, 20, 1])


def test_layer_norms_of_heads(backend: Backend) -> None:
    if backend.name == "cuda":
        pytest.skip("the cuda backend has no layer norms of heads")
    rows = Rows(backend, 6, 2, 32, 4, max_context=60)
    angles = np.arange(60)[:, None] / 3 ** np.arange(16)
    rows.table = np.concatenate((np.cos(angles), np.sin(angles)), 1)
    rows.rope = Rope(backend.tensor(rows.table.astype(np.float32)), 32)
    rows.norms = (numbers((6, 32), 100), numbers((2, 32), 101))
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 2], [3, 11])
    rows.step([2, 1, 0], [1, 20, 1])


def test_embedding_of_positions(exact: Backend) -> None:
    rows = Rows(exact, 4, 2, 16, 4)
    table = numbers((50, 24))
    for slot, count in ((0, 3), (1, 7)):
        rows.admit(slot)
        rows.step([slot], [count])
    batch = rows.paged.upload(rows.paged.batch([1, 0], [2, 4]))
    found = exact.embedding(batch.positions, exact.tensor(table.astype(np.float32)))
    check(exact, found, table[[7, 8, 3, 4, 5, 6]])


def test_two_ropes_in_one_step(exact: Backend) -> None:
    rows = Rows(exact, 4, 2, 16, 4, max_context=5)
    rows.admit(0)
    host_side = rows.paged.batch([0], [5])
    batch = rows.paged.upload(host_side)
    qkv = numbers((5, 8, 16))
    for base in (3.0, 7.0, 3.0):
        angles = np.arange(5)[:, None] / base ** np.arange(8)
        table = np.concatenate((np.cos(angles), np.sin(angles)), 1)
        rope = Rope(exact.tensor(table.astype(np.float32)), 16)
        q = exact.attn_prep(put(exact, qkv.reshape(5, -1)), 4, rope, rows.paged.kv, 0, batch)
        check(exact, q, rotated(qkv[:, :4], table, False))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_cache_in_sixteen_bits(exact: Backend, kv_dtype: str) -> None:
    # The numbers fit either dtype, so only the conversion is tested.
    rows = Rows(exact, 4, 2, 16, 4, kv_dtype=kv_dtype)
    rows.admit(0)
    rows.admit(1)
    rows.step([0, 1], [3, 11])
    rows.step([0, 1], [1, 1])


def test_int8_is_made_of_rotated_keys(exact: Backend) -> None:
    """By a table that rotates nothing and doubles some elements, so that every code is known exactly."""
    rows = Rows(exact, 6, 2, 32, 4, kv_dtype="int8", max_context=60)
    rows.table = np.concatenate(
        (2.0 ** (np.arange(60)[:, None] % 3 * np.arange(16) % 4), np.zeros((60, 16))), 1
    )
    rows.rope = Rope(exact.tensor(rows.table.astype(np.float32)), 32)
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 2], [3, 11])
    rows.step([2, 1, 0], [1, 20, 1])


def test_int8_of_extreme_heads(exact: Backend) -> None:
    """A lone token's attention is its value: of zeros, of subnormal and huge numbers; what is not finite stays so."""
    paged = Paged(exact, KVSpec(1, 2, 24, 4, "int8"))
    values = numbers((7, 2, 24))
    values *= np.array([0, 1e-44, 1e-39, 1e-30, 1, 1e30, 1])[:, None, None]
    values[6, 0, 5], values[6, 1, 9] = np.nan, -np.inf
    for slot in range(7):
        paged.admit(slot)
    batch = paged.upload(paged.batch(range(7), [1] * 7))
    qkv = np.concatenate((numbers((7, 4, 24), 1), values), 1)
    q = exact.attn_prep(put(exact, qkv.reshape(7, -1)), 2, None, paged.kv, 0, batch)
    found = exact.to_host(exact.paged_attention(q, paged.kv, 0, batch, 0.25)).reshape(7, 2, 24)
    np.testing.assert_allclose(found[:6], through_int8(values[:6]), rtol=1e-6, atol=0)
    assert (np.abs(found[:2]) <= 2**-126).all()
    assert not np.isfinite(found[6]).any()


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_copy_blocks(exact: Backend, kv_dtype: str) -> None:
    """A row goes on from a copy of its blocks, in the same pool and in another, as from the blocks themselves."""
    source = Rows(exact, 4, 2, 16, 4, num_blocks=64, kv_dtype=kv_dtype)
    source.admit(0)
    source.step([0], [11])
    other = Paged(exact, source.paged.spec, num_blocks=40)
    for target in (source.paged, other):
        target.admit(1)
        target.batch([1], [11])
        pairs = np.array([source.paged.owned[0], target.owned[1]], np.int64).T
        exact.copy_blocks(source.paged.kv, target.kv, pairs)
    source.keys[1], source.values[1] = source.keys[0], source.values[0]
    source.step([1, 0], [1, 2])
    source.paged, source.keys[1], source.values[1] = other, source.keys[0][:11], source.values[0][:11]
    source.step([1], [3])


def test_copying_no_blocks(exact: Backend) -> None:
    paged = Paged(exact, KVSpec(1, 1, 8, 4, "float32"), num_blocks=8)
    exact.copy_blocks(paged.kv, paged.kv, np.zeros((0, 2), np.int64))


def test_cache_size(exact: Backend) -> None:
    assert exact.kv_bytes_per_block(KVSpec(3, 2, 16, 4, "bfloat16")) == 3 * 2 * 2 * 16 * 4 * 2
    if "int8" in exact.kv_dtypes:
        assert exact.kv_bytes_per_block(KVSpec(3, 2, 16, 4, "int8")) == 3 * 2 * 2 * (16 + 4) * 4
    spec = KVSpec(3, 2, 16, 4, "float32")
    with pytest.raises(BackendError, match="free"):
        exact.alloc_kv(spec, exact.memory().total // exact.kv_bytes_per_block(spec) + 1)


def test_cache_dtypes(exact: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(dtype: str) -> None:
        accepted = ", ".join(exact.kv_dtypes)
        with pytest.raises(
            BackendError, match=f"kv cache dtype {dtype}: the {exact.name} backend has {accepted}$"
        ):
            exact.alloc_kv(KVSpec(3, 2, 16, 4, dtype), 1)

    refused("int4")
    monkeypatch.setattr(type(exact), "kv_dtypes", Backend.kv_dtypes)
    refused("int8")


@pytest.mark.parametrize(
    ("slot", "column", "block", "complaint"),
    [
        (1, 7, 40, "block 40 is not within 0 and 39"),
        (1, 7, -1, "block -1 is not within 0 and 39"),
        (1, 8, 0, "block table column 8 is not within 0 and 7"),
        (4, 0, 0, "slot 4 is not within 0 and 3"),
    ],
)
def test_blocks_outside_the_pool_are_refused(
    exact: Backend, slot: int, column: int, block: int, complaint: str
) -> None:
    """And nothing of the call is written: the row's own block stays where it was."""
    spec = KVSpec(1, 2, 16, 4, "float32")
    kv, slots = exact.alloc_kv(spec, 40), exact.alloc_slots(SlotSpec(4, 8, 32, 10, 40))

    def append(*entries: tuple[int, int, int]) -> None:
        exact.append_blocks(slots, *(np.array(part, np.int32) for part in zip(*entries, strict=True)))

    def attend(start: int, count: int) -> Array:
        batch = exact.upload(host_batch([0], [start], [count]), slots, spec)
        qkv = numbers((3, 6 * 16))[start : start + count]
        q = exact.attn_prep(put(exact, qkv), 2, None, kv, 0, batch)
        return exact.to_host(exact.paged_attention(q, kv, 0, batch, 0.25))

    append((0, 0, 39))
    whole = attend(0, 3)
    attend(0, 2)
    with pytest.raises(IndexError, match=complaint):
        append((0, 0, 5), (slot, column, block))
    np.testing.assert_allclose(attend(2, 1), whole[2:], rtol=0, atol=1e-6)


# Steps

SPEC = KVSpec(1, 1, 16, 4, "float32")


@pytest.mark.parametrize(
    ("field", "values", "complaint"),
    [
        ("token_ids", [3, -2, 5], "token id -2 is not within -1 and 9"),
        ("positions", [0, 1, 4], "position 4 is not within 0 and 3"),
        ("positions", [-1, 1, 0], "position -1 is not within 0 and 1"),
        ("context_lens", [2, 5], "context length 5 is not within 0 and 4"),
        ("query_start_loc", [0, 4, 3], "query_start_loc 4 is not within 0 and 3"),
        ("query_start_loc", [0, 2, 2], "query_start_loc does not run from 0 to num_tokens"),
    ],
)
def test_batches_that_point_elsewhere_are_refused(
    exact: Backend, field: str, values: list[int], complaint: str
) -> None:
    if exact.name == "torch":
        pytest.skip("the reference trusts its caller")
    slots = exact.alloc_slots(SlotSpec(2, 8, 32, 10, 8))
    batch = host_batch([0, 1], [0, 3], [2, 1])
    exact.upload(batch, slots, SPEC)
    setattr(batch, field, np.array(values, np.int32))
    with pytest.raises((IndexError, ValueError), match=complaint):
        exact.upload(batch, slots, SPEC)


@pytest.mark.parametrize(("max_context", "accepted"), [(11, 11), (40, 32)])
def test_contexts_that_slots_do_not_hold_are_refused(exact: Backend, max_context: int, accepted: int) -> None:
    if exact.name == "torch":
        pytest.skip("the reference trusts its caller")
    slots = exact.alloc_slots(SlotSpec(2, 8, max_context, 10, 8))
    exact.upload(host_batch([0], [accepted - 1], [1]), slots, SPEC)
    with pytest.raises(IndexError, match=f"max_context {accepted + 1} is not within 0 and {accepted}"):
        exact.upload(host_batch([0], [accepted], [1]), slots, SPEC)


def test_ropes_and_pools_that_do_not_fit_the_slots_are_refused(exact: Backend) -> None:
    if exact.name == "torch":
        pytest.skip("the reference trusts its caller")
    slots = exact.alloc_slots(SlotSpec(2, 8, 32, 10, 8))
    kv, batch = exact.alloc_kv(SPEC, 8), exact.upload(host_batch([0], [0], [1]), slots, SPEC)
    qkv = put(exact, numbers((1, 3 * 16)))

    def rope(positions: int) -> Rope:
        return Rope(exact.tensor(np.ones((positions, 16), np.float32)), 16)

    q = exact.attn_prep(qkv, 1, rope(32), kv, 0, batch)
    exact.paged_attention(q, kv, 0, batch, 1.0)
    with pytest.raises(ValueError, match="32 positions or more"):
        exact.attn_prep(qkv, 1, rope(31), kv, 0, batch)
    few, large = exact.alloc_kv(SPEC, 7), exact.alloc_kv(KVSpec(1, 1, 16, 8, "float32"), 8)
    for pool, complaint in (
        (few, "of a pool of 8 blocks, and this one has 7"),
        (large, "caches of blocks of 4 tokens, and this one's hold 8"),
    ):
        with pytest.raises(ValueError, match=complaint):
            exact.attn_prep(qkv, 1, None, pool, 0, batch)
        with pytest.raises(ValueError, match=complaint):
            exact.paged_attention(q, pool, 0, batch, 1.0)


def test_upload_fills_in_last_ids(exact: Backend) -> None:
    slots = exact.alloc_slots(SlotSpec(4, 8, 32, 10, 8))
    for slot in range(4):
        exact.set_slot(slots, slot, SlotParams())
    first = exact.upload(host_batch([2, 0], [0, 0], [1, 1]), slots, SPEC)
    sampled = exact.sample(put(exact, np.eye(10)[[7, 4]]), slots, first)
    exact.accept(sampled.ids, slots, first)
    assert exact.to_host(sampled.ids).tolist() == [7, 4]
    batch = host_batch([0, 1, 2], [1, 0, 1], [1, 3, 1])
    batch.token_ids = np.array([-1, 5, 6, 8, -1], np.int32)
    assert exact.to_host(exact.upload(batch, slots, SPEC).token_ids).tolist() == [4, 5, 6, 8, 7]
    assert batch.token_ids.tolist() == [-1, 5, 6, 8, -1]


def test_a_captured_step_equals_the_step(exact: Backend) -> None:
    """For each number of rows up to its own, as often as it is called, whatever other steps ran in between."""
    if not exact.graph_rows(8):
        pytest.skip("the backend captures nothing")
    slots = exact.alloc_slots(SlotSpec(8, 8, 32, 10, 8))
    table = numbers((10, 16), 3)
    weight = exact.tensor(table.astype(np.float32))

    def step(batch: Any) -> list[Any]:
        return [exact.rows(exact.embedding(batch.token_ids, weight), batch.logits_rows)]

    steps = {rows: exact.capture((rows, 1), step, slots, SPEC) for rows in exact.graph_rows(8)}
    for rows in (1, 5, 8, 2, 8, 5):
        size = min(size for size in steps if size >= rows)
        batch = host_batch(list(range(rows)), [0] * rows, [1] * rows)
        batch.token_ids = (np.arange(rows) * 3 % 10).astype(np.int32)
        (found,) = steps[size](exact.upload(batch, slots, SPEC, (size, 1)))
        check(exact, found, table[batch.token_ids])
