"""A disk tier in memory: transfers finish late and out of order, and some fail."""

from __future__ import annotations

from random import Random

from vllmlite.engine.tiers import Transfer


class FakeDisk:
    """Keeps the blocks of a FakeRunner's host. A transfer fails with probability ``failing``."""

    def __init__(self, seed: int = 0, failing: float = 0.0) -> None:
        self.host: dict[int, list[int]] = {}
        self.blocks: dict[bytes, list[int]] = {}
        self.seconds_per_block: float | None = None
        self._random = Random(seed)
        self._failing = failing
        self.pending: list[tuple[bytes, int, bool]] = []

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.blocks or any(digest == name and not read for name, _, read in self.pending)

    def read(self, digest: bytes, place: int) -> None:
        self.pending.append((digest, place, True))

    def write(self, digest: bytes, place: int) -> None:
        self.pending.append((digest, place, False))

    def finished(self) -> list[Transfer]:
        self._random.shuffle(self.pending)
        done, self.pending = self.pending[::2], self.pending[1::2]
        return [self._finish(*transfer) for transfer in done]

    def _finish(self, digest: bytes, place: int, read: bool) -> Transfer:
        works = self._random.random() >= self._failing
        if read:
            works = works and digest in self.blocks
            # A block that fails its checksum has been read into the place all the same.
            self.host[place] = self.blocks[digest] if works else [-2] * 16
            if not works:
                self.blocks.pop(digest, None)
        elif works:
            self.blocks[digest] = self.host[place]
        return Transfer(digest, place, read, works)

    def wait(self, seconds: float) -> None:
        assert self.pending, "waits for nothing"

    def cancel(self) -> None:
        self.pending.clear()

    def forget_all(self) -> None:
        self.blocks.clear()
