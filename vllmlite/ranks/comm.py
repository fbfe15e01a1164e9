"""Collective operations of the ranks of one host, through shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Backend, Comm, Tensor
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.native import load_extension
from vllmlite.errors import ParameterError


class NativeComm:
    """The collectives of the cpu backend: ops of its runtime, which a recorded step contains."""

    def __init__(self, runtime: Any, exchange: Any, rank: int, world: int) -> None:
        """``exchange`` is an ``Exchange`` of ``vllmlite._cpu``."""
        self._runtime, self._exchange = runtime, exchange
        self.rank, self.world, self.sharing = rank, world, world

    def all_reduce(self, x: Tensor) -> Tensor:
        """See :class:`Comm`."""
        return self._runtime.all_reduce(x, self._exchange)

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """See :class:`Comm`."""
        return self._runtime.all_gather(x, widths, self._exchange)


class CopyingComm:
    """The collectives of another backend: copies to host memory, on which a :class:`NativeComm` works at once."""

    def __init__(self, backend: Backend, native: Any, exchange: Any, rank: int, world: int) -> None:
        """``native`` is ``vllmlite._cpu``."""
        self._backend, self._native = backend, native
        self._runtime = native.Runtime("auto", [[]], "float32")
        self._comm = NativeComm(self._runtime, exchange, rank, world)
        self.rank, self.world, self.sharing = rank, world, world

    def all_reduce(self, x: Tensor) -> Tensor:
        """See :class:`Comm`. Sums are float32 and rounded at the end."""
        values = self._backend.to_host(x).astype(np.float32)
        return self._on_device(self._comm.all_reduce(self._on_host(values)), self._backend.dtype)

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """See :class:`Comm`."""
        values = np.ascontiguousarray(self._backend.to_host(x))
        return self._on_device(self._comm.all_gather(self._on_host(values), widths), values.dtype.name)

    def _on_host(self, values: NDArray[Any]) -> Tensor:
        return self._native.over(values, values.dtype.name, values.shape)

    def _on_device(self, tensor: Tensor, dtype: str) -> Tensor:
        return self._backend.tensor(self._runtime.to_host(tensor), dtype)


def connect(backend: Backend, ranks: Any) -> Comm:
    """Return the collectives of ``backend`` among ``ranks``, a ``Ranks`` of ``vllmlite._cpu``."""
    if backend.device != "cpu":
        raise ParameterError(
            "tensor_parallel_size",
            ranks.world,
            f"is for CPUs in this version, and the {backend.name} backend runs on {backend.device}: choose device=cpu",
        )
    native = load_extension("_cpu")
    exchange = native.Exchange(ranks, 0, ranks.world)
    if isinstance(backend, CpuBackend):
        return NativeComm(backend.runtime, exchange, ranks.rank, ranks.world)
    return CopyingComm(backend, native, exchange, ranks.rank, ranks.world)
