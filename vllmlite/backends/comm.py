"""Collective operations of the ranks that compute one model together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllmlite.backends.batch import Tensor
from vllmlite.errors import BackendError


class Comm(Protocol):
    """Collective operations of the ranks that compute one model together; all ranks call them in the same order.

    Like a backend's ops they may run later, and a captured step contains them."""

    rank: int
    world: int
    sharing: int
    """Number of ranks that share the memory of this rank's device."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' ``x``, added in rank order and equal on all of them. May overwrite ``x``."""
        ...

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the ranks' ``x [N, widths[rank]]`` side by side in rank order: ``[N, sum(widths)]``."""
        ...

    def least(self, value: int) -> int:
        """Return the least ``value`` of the ranks of all stages of the pipeline."""
        ...

    def send(self, x: Tensor) -> None:
        """Send float32 ``x`` to this rank's counterpart in the next stage of the pipeline."""
        ...

    def receive(self, shape: Sequence[int], dtype: str) -> Tensor:
        """Return the tensor of ``shape`` that this rank's counterpart in the previous stage of the pipeline sends."""
        ...


class SingleRank:
    """The :class:`Comm` of a model on one rank."""

    rank = 0
    world = 1
    sharing = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return ``x``, the sum over one rank."""
        return x

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Return ``x``, all that there is to gather from one rank."""
        return x

    def least(self, value: int) -> int:
        """Return ``value``, the least of one rank."""
        return value

    def send(self, x: Tensor) -> None:
        """Raise BackendError: there is no other rank."""
        raise BackendError("there is no other stage to send to")

    def receive(self, shape: Sequence[int], dtype: str) -> Tensor:
        """Raise BackendError: there is no other rank."""
        raise BackendError("there is no other stage to receive from")
