"""Blocks of a key/value cache in host memory, and copies of whole blocks between there and the cache's pool."""

from __future__ import annotations

import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.memory import host_memory
from vllmlite.errors import BackendError

Ids: TypeAlias = NDArray[np.int32]
Copy: TypeAlias = Callable[[Ids, Ids, NDArray[np.uint8], bool], None]
"""Function that copies ``(blocks, places, memory, to_host)``: blocks to rows of ``memory`` or, if ``to_host`` is False,
back."""


class HostBlocks(ABC):
    """Host memory for blocks of one key/value cache, in places that are numbered from 0.

    Copies take effect in program order, as ops do: :meth:`save` reads what earlier ops have written, and later ops read
    what :meth:`load` has written."""

    memory: NDArray[np.uint8]
    """``[places, bytes of a block]``. Read a place after a save, or write it after a load, only once :meth:`wait` has
    returned."""

    @abstractmethod
    def save(self, blocks: Ids, places: Ids) -> None:
        """Copy each of ``blocks`` to the place of the same index. Ops may run beside the copies: none may write to
        these blocks before :meth:`join`.

        IndexError, and nothing copied, if there is no such block or place; the same for :meth:`load`."""

    @abstractmethod
    def load(self, places: Ids, blocks: Ids) -> None:
        """Copy each of ``places`` to the block of the same index."""

    def share(self, fd: int) -> None:
        """Move :attr:`memory`, of which nothing has been used, to the file behind ``fd``, which other processes map."""
        raise BackendError("the host memory of this backend cannot be shared with other processes")

    def join(self) -> None:  # noqa: B027  (copies of a synchronous backend are done)
        """Have later ops wait for the saves issued so far."""

    def wait(self) -> None:  # noqa: B027
        """Wait for the copies issued so far."""


def mapped(fd: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the bytes of the file behind ``fd`` as an array of ``shape``, which shares them."""
    return np.frombuffer(mmap.mmap(fd, math.prod(shape)), np.uint8).reshape(shape)


class SynchronousHostBlocks(HostBlocks):
    """Host memory for blocks whose copies are finished when a call returns."""

    def __init__(self, copy: Copy, num_places: int, block_bytes: int, ranks: int) -> None:
        """Allocate ``num_places`` places, as each of ``ranks`` on this host does. BackendError if main memory is too
        small."""
        needed, free = num_places * block_bytes, host_memory(ranks).free
        if needed > free:
            raise BackendError(f"{num_places} blocks in host memory take {needed} bytes; {free} are free")
        self.memory = np.empty((num_places, block_bytes), np.uint8)
        self._copy = copy

    def share(self, fd: int) -> None:
        """Move the memory, of which nothing has been used, to the file behind ``fd``, which other processes map."""
        os.ftruncate(fd, self.memory.nbytes)
        self.memory = mapped(fd, self.memory.shape)

    def save(self, blocks: Ids, places: Ids) -> None:
        """Copy each of ``blocks`` to the place in host memory of the same index. IndexError, and nothing copied, if
        there is no such block or place."""
        self._copy(blocks, places, self.memory, True)

    def load(self, places: Ids, blocks: Ids) -> None:
        """Copy each of ``places`` in host memory to the block of the same index. IndexError, and nothing copied, if
        there is no such block or place."""
        self._copy(blocks, places, self.memory, False)
