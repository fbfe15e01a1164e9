"""Mixtures of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from op_backends import Array, check, host, invariant, numbers, put
from op_formulas import gated

from vllmlite.backends.base import Backend, Expert
from vllmlite.weights.adapter import EXPERTS, AdapterLimits, LowRank
from vllmlite.weights.host import FLOAT_DTYPES, HostWeight


def mixture(
    x: Array,
    logits: Array,
    gate_up: list[Array],
    down: list[Array],
    top_k: int,
    renormalise: bool,
    activation: str = "silu",
    biases: list[tuple[Array, Array]] | None = None,
) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        chosen = sorted(np.argsort(-logits[token], kind="stable")[:top_k])
        total = weights[token, chosen].sum() if renormalise else 1.0
        for expert in chosen:
            first, second = biases[expert] if biases else (0.0, 0.0)
            inner = gated(gate_up[expert] @ row + first, activation)
            out[token] += weights[token, expert] / total * (down[expert] @ inner + second)
    return out


def experts_of(
    backend: Backend,
    gate_up: list[Array],
    down: list[Array],
    biases: list[tuple[Array, Array]] | None = None,
    quantization: str | None = None,
) -> Any:
    def packed(values: Array) -> HostWeight:
        weight = host(backend, values)
        return weight if quantization is None else backend.quantize(weight, quantization)

    experts = []
    for index, (first, second) in enumerate(zip(gate_up, down, strict=True)):
        own, last = biases[index] if biases else (None, None)
        halves = [] if own is None else [host(backend, half) for half in np.split(own, 2)]
        experts.append(
            Expert(
                backend.linear_weight([packed(part) for part in np.split(first, 2)], halves),
                backend.linear_weight([packed(second)], [] if last is None else [host(backend, last)]),
            )
        )
    return backend.experts(experts)


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


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (9, 3), (90, 2)])
def test_experts_have_adapters(backend: Backend, tokens: int, top_k: int) -> None:
    """Each token's own adapter changes the weights of the experts that it chooses, whatever the other tokens have."""
    if EXPERTS not in backend.adapter_abilities:
        pytest.skip("the backend has no adapters of experts")
    count, hidden, inner = 7, 48, 40
    x, logits, gate_up, down = a_mixture(tokens, count, hidden, inner)
    adapters = np.arange(tokens) * 5 % 4  # 3 changes nothing
    limits = AdapterLimits(3, 8)
    up_tables = [backend.alloc_low_rank([inner, inner], hidden, limits) for _ in range(count)]
    down_tables = [backend.alloc_low_rank([hidden], inner, limits) for _ in range(count)]
    changed = {0: (gate_up, down), 3: (gate_up, down)}
    for index in (1, 2):
        changed[index] = [part.copy() for part in gate_up], [part.copy() for part in down]
        for expert in range(count - index):  # not all experts
            a, b = (
                numbers((index + 3, hidden), 10 * index + expert, hidden**-0.5),
                numbers((inner, index + 3)),
            )
            changed[index][0][expert][inner:] += 0.5 * b @ a
            backend.set_low_rank(
                up_tables[expert], index, [None, LowRank(host(backend, a), host(backend, b), 0.5)]
            )
            a, b = numbers((4, inner), expert, inner**-0.5), numbers((hidden, 4), index)
            changed[index][1][expert] += 0.5 * b @ a
            backend.set_low_rank(
                down_tables[expert], index, [LowRank(host(backend, a), host(backend, b), 0.5)]
            )
    tables = backend.expert_tables(up_tables, down_tables)
    rows = backend.adapter_rows(adapters.astype(np.int32))
    experts = experts_of(backend, gate_up, down)
    found = backend.moe(put(backend, x), put(backend, logits), experts, top_k, True, "silu", tables, rows)
    expected = np.zeros_like(x)
    for index, weights in changed.items():
        own = adapters == index
        expected[own] = mixture(x[own], logits[own], *weights, top_k, True)
    check(backend, found, expected)


@pytest.mark.parametrize("tokens", [1, 17, 150])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_experts_with_biases(exact: Backend, tokens: int, quantization: str | None) -> None:
    """The mixture of gpt-oss."""
    if exact.name == "cuda":
        pytest.skip("the cuda backend does not have biases of experts")
    x, logits, gate_up, down = a_mixture(tokens, 7, 64, 32)
    biases = [(numbers((64,), 30 + expert), numbers((64,), 40 + expert)) for expert in range(7)]
    found = exact.moe(
        put(exact, x),
        put(exact, logits),
        experts_of(exact, gate_up, down, biases, quantization),
        2,
        True,
        "clamped_swiglu",
    )
    expected = mixture(x, logits, gate_up, down, 2, True, "clamped_swiglu", biases)
    if quantization is None:
        check(exact, found, expected)
    else:
        error = np.abs(exact.to_host(found) - expected).max(-1)
        assert (error <= 0.06 * np.abs(expected).max(-1)).all()


def a_mixture(
    tokens: int, count: int, hidden: int, inner: int
) -> tuple[Array, Array, list[Array], list[Array]]:
    x, logits = numbers((tokens, hidden)), numbers((tokens, count), 1, 2)
    logits[:, 5] = -100  # an expert that no token chooses
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


def test_equal_router_logits_choose_the_first_experts(exact: Backend) -> None:
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
