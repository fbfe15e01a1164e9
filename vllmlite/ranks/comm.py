"""Collective operations of ranks, through shared memory; links keep it equal on several hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import Tensor
from vllmlite.backends.comm import Comm
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.native import load_extension
from vllmlite.errors import ParameterError


class NativeComm:
    """The collectives of the cpu backend: ops of its runtime, which a recorded step contains."""

    def __init__(self, native: Any, runtime: Any, ranks: Any, stages: int, sharing: int) -> None:
        """``native`` is ``vllmlite._cpu``, ``ranks`` its ``Ranks``; each of the ``stages`` has equally many.
        ``sharing`` of them run on this host."""
        self._native, self._runtime, self._ranks = native, runtime, ranks
        self.world = ranks.world // stages
        first = ranks.rank // self.world * self.world
        self.rank, self.sharing = ranks.rank - first, sharing
        self._exchange = native.Exchange(ranks, first, self.world)
        self._all = native.Exchange(ranks, 0, ranks.world, 1)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' ``x``, added in rank order and equal on all of them. May overwrite ``x``."""
        return self._runtime.all_reduce(x, self._exchange) if self.world > 1 else x

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the ranks' ``x [N, widths[rank]]`` side by side in rank order: ``[N, sum(widths)]``."""
        return self._runtime.all_gather(x, widths, self._exchange) if self.world > 1 else x

    def least(self, value: int) -> int:
        """Return the least ``value`` of the ranks of all stages of the pipeline."""
        own = self._native.over(np.array([[value]], np.int64), "int64", (1, 1))
        gathered = self._runtime.all_gather(own, [1] * self._ranks.world, self._all)
        return int(self._runtime.to_host(gathered).min())

    def send(self, x: Tensor) -> None:
        """Send float32 ``x`` to this rank's counterpart in the next stage of the pipeline."""
        self._runtime.send(x, self._ranks)

    def receive(self, shape: Sequence[int], dtype: str) -> Tensor:
        """Return the tensor of ``shape`` that this rank's counterpart in the previous stage of the pipeline sends."""
        return self._runtime.receive(shape, dtype, self._ranks.rank - self.world, self._ranks)


class CopyingComm:
    """The collectives of another backend: copies to host memory, on which a :class:`NativeComm` works at once."""

    def __init__(self, backend: Backend, native: Any, ranks: Any, stages: int, sharing: int) -> None:
        """See :class:`NativeComm`."""
        self._backend, self._native = backend, native
        self._runtime = native.Runtime("auto", [[]], "float32")
        self._comm = NativeComm(native, self._runtime, ranks, stages, sharing)
        self.rank, self.world, self.sharing = self._comm.rank, self._comm.world, self._comm.sharing

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' ``x``, added in rank order and equal on all of them. May overwrite ``x``. Sums
        are float32 and rounded at the end."""
        return self._on_device(self._comm.all_reduce(self._on_host(x, np.float32)), self._backend.dtype)

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the ranks' ``x [N, widths[rank]]`` side by side in rank order: ``[N, sum(widths)]``."""
        values = self._on_host(x)
        return self._on_device(self._comm.all_gather(values, widths), values.dtype)

    def least(self, value: int) -> int:
        """Return the least ``value`` of the ranks of all stages of the pipeline."""
        return self._comm.least(value)

    def send(self, x: Tensor) -> None:
        """Send float32 ``x`` to this rank's counterpart in the next stage of the pipeline."""
        self._comm.send(self._on_host(x, np.float32))
        self._runtime.flush()

    def receive(self, shape: Sequence[int], dtype: str) -> Tensor:
        """Return the tensor of ``shape`` that this rank's counterpart in the previous stage of the pipeline sends."""
        return self._on_device(self._comm.receive(shape, dtype), self._backend.dtype)

    def _on_host(self, x: Tensor, dtype: type[np.generic] | None = None) -> Tensor:
        values = np.ascontiguousarray(self._backend.to_host(x), dtype)
        return self._native.over(values, values.dtype.name, values.shape)

    def _on_device(self, tensor: Tensor, dtype: str) -> Tensor:
        return self._backend.tensor(self._runtime.to_host(tensor), dtype)


def connect(backend: Backend, ranks: Any, stages: int = 1, sharing: int | None = None) -> Comm:
    """Return the collectives of ``backend`` among ``ranks``, a ``Ranks`` of ``vllmlite._cpu``, in a pipeline of
    ``stages``; ``sharing`` ranks, by default all, run on this host."""
    sharing = ranks.world if sharing is None else sharing
    if backend.device != "cpu":
        raise ParameterError(
            "tensor_parallel_size" if stages == 1 else "pipeline_parallel_size",
            ranks.world if stages == 1 else stages,
            f"is for CPUs in this version, and the {backend.name} backend runs on {backend.device}: choose device=cpu",
        )
    native = load_extension("_cpu")
    if isinstance(backend, CpuBackend):
        return NativeComm(native, backend.runtime, ranks, stages, sharing)
    return CopyingComm(backend, native, ranks, stages, sharing)
