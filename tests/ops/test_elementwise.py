"""Norms, sums and activations."""

from __future__ import annotations

import numpy as np
import pytest
from op_backends import check, host, numbers, put
from op_formulas import activated, gated, rms

from vllmlite.backends.base import Backend
from vllmlite.errors import BackendError


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
def test_the_ops_of_a_layer_in_sequence(backend: Backend, rows: int, activation: str) -> None:
    """Residual, norm, product, activation and product, which backends may fuse."""
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


def test_add_scale_and_soft_cap(backend: Backend) -> None:
    x, other = numbers((5, 700)), numbers((5, 700), 1)
    check(backend, backend.add(put(backend, x), put(backend, other)), x + other)
    check(backend, backend.scale(put(backend, x), 0.22), x * 0.22)
    logits = backend.tensor((x * 20).astype(np.float32))
    found = backend.to_host(backend.soft_cap(logits, 30.0))
    np.testing.assert_allclose(found, 30 * np.tanh(x * 20 / 30), rtol=0, atol=1e-5 * 30)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_activation(backend: Backend, activation: str) -> None:
    x = numbers((7, 60), 0, 3)
    check(backend, backend.gated_activation(put(backend, x), activation), gated(x, activation))


def test_a_clamped_gated_activation(backend: Backend) -> None:
    x = numbers((7, 60), 0, 6)
    if backend.name == "cuda":
        with pytest.raises(BackendError, match="clamped_swiglu"):
            backend.gated_activation(put(backend, x), "clamped_swiglu")
        return
    check(backend, backend.gated_activation(put(backend, x), "clamped_swiglu"), gated(x, "clamped_swiglu"))


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
