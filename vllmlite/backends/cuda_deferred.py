"""Ops of the CUDA backend that are put off until it shows what becomes of their result.

Where a step has few rows, kernels are so short that it is their number that counts. A product is therefore not
computed when it is asked for: the norm after it can take the residual into the product's kernel, a gated activation
can take the gates into it, and a product can normalise what it reads. Whoever wants the result itself gets it by
:func:`now`.
"""

from __future__ import annotations

from typing import Any

from vllmlite.backends.base import Tensor


class Normed:
    """``rms_norm`` of a residual to which a product was added, whose squares that product summed up."""

    def __init__(self, runtime: Any, residual: Tensor, squares: Tensor, weight: Tensor, eps: float) -> None:
        """Of ``residual [rows, hidden]``; ``squares`` are ``add_linear``'s."""
        self.runtime, self.reads, self.squares = runtime, residual, squares
        self.weight, self.eps = weight, eps
        self.result: Tensor | None = None

    def now(self) -> Tensor:
        """The tensor."""
        if self.result is None:
            self.result = self.runtime.rms_norm(self.reads, self.weight, self.eps, None)[0]
            self.reads = None
        return self.result


class Product:
    """``linear`` of few rows of ``x``."""

    def __init__(self, runtime: Any, x: Tensor | Normed, weight: Any) -> None:
        """Of ``x [rows, in]`` and a ``LinearWeight``."""
        self.runtime, self.x, self.weight = runtime, x, weight
        self.result: Tensor | None = None

    @property
    def reads(self) -> Tensor | None:
        """The tensor that must stay as it is until then."""
        return self.x.reads or self.x.result if isinstance(self.x, Normed) else self.x

    def now(self) -> Tensor:
        """The tensor."""
        if self.result is None:
            self.result = self._normed(None) or self.runtime.linear(now(self.x), self.weight)
            self.x = None
        return self.result

    def gated(self, activation: str) -> Tensor | None:
        """``gated_activation`` of the product in its own kernel, or None where that is not possible."""
        return self._normed(activation) if self.result is None else None

    def added_to(self, residual: Tensor) -> Tensor:
        """Add the product to ``residual``; the squares of that."""
        return self.runtime.add_linear(now(self.x), self.weight, residual)

    def _normed(self, activation: str | None) -> Tensor | None:
        x = self.x
        if not isinstance(x, Normed) or x.result is not None:
            return None
        return self.runtime.normed_linear(x.reads, x.squares, x.weight, x.eps, self.weight, activation)


def now(x: Any) -> Any:
    """The tensor that ``x`` stands for."""
    return x.now() if isinstance(x, Normed | Product) else x
