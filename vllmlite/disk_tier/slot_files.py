"""Files of saved prompts, each with a name; llama.cpp's endpoint ``/slots`` saves and restores them."""

from __future__ import annotations

import os
import re

from vllmlite.disk_tier.block_file import BlockFile, file_size, stored_slots
from vllmlite.disk_tier.place_memory import PlaceMemory
from vllmlite.disk_tier.private_directory import PrivateDirectory
from vllmlite.errors import ParameterError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
PARTIAL = ".saving"
"""Name of the file that is being written."""


class SlotFiles:
    """Named files in one directory, each with the blocks of one prompt."""

    def __init__(
        self, directory: PrivateDirectory, memory: PlaceMemory, fingerprint: bytes, max_bytes: int
    ) -> None:
        """Keep files of blocks as the places of ``memory`` have them, in a directory of at most ``max_bytes``."""
        self.memory = memory
        self._max_bytes = max_bytes
        self._directory = directory
        self._fingerprint = fingerprint

    def create(self, name: str, num_blocks: int) -> BlockFile:
        """Begin a file with room for ``num_blocks``, which will replace one of the same name. Raises ParameterError if
        it would exceed the directory's size, or cannot be written."""
        _check(name)
        size = file_size(num_blocks, self._block_bytes)
        try:
            sizes = self._directory.sizes()
            used = sum(size for other, size in sizes.items() if other not in (name, PARTIAL))
            if used + size > self._max_bytes:
                raise ParameterError(
                    "filename",
                    name,
                    f"the file takes {size} bytes, and other files take {used} of the {self._max_bytes} that "
                    "slot_save_size allows: remove some, or raise it",
                )
            fd = self._directory.open(PARTIAL, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            return BlockFile(fd, size, self._block_bytes, self._fingerprint)
        except OSError as error:
            raise ParameterError("filename", name, f"cannot be written: {error.strerror}") from None

    def finish(self, file: BlockFile, name: str) -> None:
        """Give the started file its name; it replaces a file of that name."""
        file.close()
        self._directory.replace(PARTIAL, name)

    def abandon(self, file: BlockFile) -> None:
        """Remove the started file."""
        file.close()
        self._directory.remove(PARTIAL)

    def open(self, name: str) -> BlockFile:
        """Open a file. Raises ParameterError if it is missing, or belongs to another model."""
        _check(name)
        try:
            fd = self._directory.open(name, os.O_RDWR)
        except OSError as error:
            raise ParameterError("filename", name, f"cannot be read: {error.strerror}") from None
        num_blocks = stored_slots(fd, self._block_bytes, self._fingerprint)
        if num_blocks is None:
            os.close(fd)
            raise ParameterError(
                "filename", name, "was saved with another model, dtype or version, or is damaged"
            )
        return BlockFile(fd, file_size(num_blocks, self._block_bytes), self._block_bytes, self._fingerprint)

    @property
    def _block_bytes(self) -> int:
        return self.memory.block_bytes


def _check(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ParameterError(
            "filename", name, "must be letters, digits, _, - and ., at most 128, not beginning with - or ."
        )
