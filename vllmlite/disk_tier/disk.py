"""The disk tier's thread, which moves blocks between places in host memory and a :class:`BlockFile`."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque

from vllmlite.disk_tier.block_file import BlockFile
from vllmlite.disk_tier.place_memory import PlaceMemory
from vllmlite.engine.tiers import Transfer

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 5.0
"""Maximum seconds for which queued blocks are still written when the process ends."""


class DiskTier:
    """Cache tier on disk: a thread reads blocks from a file into host memory, and writes them. Reads come before
    writes."""

    def __init__(self, file: BlockFile, memory: PlaceMemory) -> None:
        """Move blocks between ``file`` and the places of ``memory``."""
        self._worker = _Worker(file, memory)
        self.close = weakref.finalize(self, self._worker.close)
        """Write queued blocks for at most :data:`CLOSING_SECONDS`, and close the file; called when the process ends."""

    @property
    def seconds_per_block(self) -> float | None:
        """Measured time of a read; None before the first one."""
        return self._worker.seconds_per_block

    def __contains__(self, digest: bytes) -> bool:
        """Return whether the file has the block of this hash, or is about to write it."""
        worker = self._worker
        return not worker.erasing and (digest in worker.file or digest in worker.writing)

    def read(self, digest: bytes, place: int) -> None:
        """Begin to read a block to a place in host memory."""
        self._worker.ahead.append(digest)
        self._worker.put(self._worker.reads, (digest, place))

    def write(self, digest: bytes, place: int) -> None:
        """Begin to write the block at a place in host memory."""
        self._worker.writing.add(digest)
        self._worker.put(self._worker.writes, (digest, place))

    def finished(self) -> list[Transfer]:
        """Return the transfers that have finished since the last call."""
        if not self._worker.finished:
            return []
        with self._worker.changed:
            found, self._worker.finished = self._worker.finished, []
        return found

    def wait(self, seconds: float) -> None:
        """Wait until a transfer has finished, for at most ``seconds``."""
        worker = self._worker
        with worker.changed:
            worker.changed.wait_for(lambda: worker.finished, seconds)

    def cancel(self) -> None:
        """Drop the transfers that have not begun, and wait for one that has. None of them is reported as finished."""
        worker = self._worker
        with worker.changed:
            worker.drop_queued()
            worker.changed.wait_for(lambda: not worker.busy)
            worker.finished = []

    def forget_all(self) -> None:
        """Erase all blocks. Queued transfers fail."""
        worker = self._worker
        with worker.changed:
            worker.drop_queued()
            worker.erasing = True
        worker.wake()


class _Worker:
    """The state of the thread. It does not refer to the DiskTier, so that the thread ends when that is deleted."""

    def __init__(self, file: BlockFile, memory: PlaceMemory) -> None:
        self.file, self.memory = file, memory
        self.changed = threading.Condition()
        self.reads: deque[tuple[bytes, int]] = deque()
        self.writes: deque[tuple[bytes, int]] = deque()
        self.writing: set[bytes] = set()
        """Hashes of the blocks in ``writes``."""
        self.finished: list[Transfer] = []
        self.ahead: list[bytes] = []
        """Hashes of the blocks in ``reads`` that the system has not been asked to read ahead."""
        self.erasing = False
        self.busy = False
        self.seconds_per_block: float | None = None
        self._stopping = False
        self._warned = False
        self._thread: threading.Thread | None = None

    def put(self, queue: deque[tuple[bytes, int]], job: tuple[bytes, int]) -> None:
        """Queue a job; the first one starts the thread."""
        with self.changed:
            queue.append(job)
        self.wake()

    def wake(self) -> None:
        """Have the thread look for work."""
        with self.changed:
            self.changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="vllmlite-disk", daemon=True)
            self._thread.start()

    def drop_queued(self) -> None:
        """Drop the queued jobs, which fail. The caller holds ``changed``."""
        self.finished += [Transfer(digest, place, True, False) for digest, place in self.reads]
        self.finished += [Transfer(digest, place, False, False) for digest, place in self.writes]
        self.reads.clear()
        self.writes.clear()
        self.writing.clear()
        self.ahead.clear()

    def close(self) -> None:
        """Write queued blocks for at most :data:`CLOSING_SECONDS`, and close the file."""
        with self.changed:
            if self._thread is not None:
                self.changed.wait_for(lambda: not (self.writes or self.busy or self.erasing), CLOSING_SECONDS)
            self._stopping = True
            self.changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSING_SECONDS)
            if self._thread.is_alive():
                return  # it hangs in the system, with the file open
        self.file.close()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.busy = False
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.reads or self.writes or self.erasing or self._stopping)
                if self._stopping:
                    return
                self.busy, erasing = True, self.erasing
                to_host = bool(self.reads)
                job = None if erasing else (self.reads or self.writes).popleft()
                ahead, self.ahead = self.ahead, []
            if job is None:
                self._erase()
                continue
            self.file.read_ahead(ahead)
            done = self._read(*job) if to_host else self._write(*job)
            self._finish(Transfer(*job, to_host, done))

    def _finish(self, transfer: Transfer) -> None:
        with self.changed:
            if self.erasing:  # it began before
                transfer = Transfer(transfer.digest, transfer.place, transfer.to_host, False)
            if not transfer.to_host:
                self.writing.discard(transfer.digest)
            self.finished.append(transfer)
            self.changed.notify_all()

    def _read(self, digest: bytes, place: int) -> bool:
        begin = time.perf_counter()
        done = self.file.read(digest, *self.memory[place])
        seconds = time.perf_counter() - begin
        last = seconds if self.seconds_per_block is None else self.seconds_per_block
        self.seconds_per_block = 0.8 * last + 0.2 * seconds
        return done

    def _write(self, digest: bytes, place: int) -> bool:
        try:
            self.file.write(digest, *self.memory[place])
        except OSError as error:
            if not self._warned:
                logger.warning("a block cannot be written to disk: %s; more of these are not reported", error)
            self._warned = True
            return False
        return True

    def _erase(self) -> None:
        try:
            self.file.forget_all()
        except OSError as error:
            logger.error("the blocks on disk cannot be erased: %s", error)
        with self.changed:
            self.erasing = False
