"""Save the cached prefix of a text in a named file, and restore it from there to the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vllmlite.engine.block_pool import block_hash
from vllmlite.engine.tiers import Copies, Tiers
from vllmlite.errors import ParameterError


class PrefixFile(Protocol):
    """A file of blocks."""

    def digests(self) -> list[bytes]:
        """Return the hashes of its blocks, in the order in which they were written."""
        ...

    def read(self, digest: bytes, *parts: Any) -> bool:
        """Read the block with this hash into ``parts``, bytes in host memory. Returns False if it is damaged."""
        ...

    def write(self, digest: bytes, *parts: Any) -> None:
        """Append a block, given as bytes in host memory. Raises OSError if that fails."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class PrefixFiles(Protocol):
    """Named files of blocks, and the host memory that they are read into and written from."""

    memory: Any

    def create(self, name: str, num_blocks: int) -> Any:
        """Start a file for ``num_blocks`` blocks, which gets ``name`` once it is finished."""
        ...

    def finish(self, file: Any, name: str) -> None:
        """Complete ``file`` and give it ``name``."""
        ...

    def abandon(self, file: Any) -> None:
        """Remove an unfinished file."""
        ...

    def open(self, name: str) -> Any:
        """Open the finished file ``name`` to read it. Raises ParameterError if there is none."""
        ...


class SavedPrefixes:
    """Moves whole prefixes between the cache and files, while no request runs."""

    def __init__(
        self, tiers: Tiers, files: PrefixFiles, root: bytes, block_size: int, run: Callable[[Copies], None]
    ) -> None:
        """Save and restore prefixes of texts without salt and adapter, whose first block has the parent hash ``root``.
        ``run`` has the runner make block copies."""
        self._tiers, self._files = tiers, files
        self._root, self._block_size, self._run = root, block_size, run
        self._chunk = max(tiers.num_places // 4, 1)

    def change(self, token_ids: Sequence[int], action: str, name: str) -> int:
        """Call the method named ``action``: :meth:`save`, :meth:`restore` or :meth:`erase`; returns the number of
        tokens."""
        if action == "save":
            return self.save(name, token_ids)
        return self.restore(name) if action == "restore" else self.erase(token_ids)

    def save(self, name: str, token_ids: Sequence[int]) -> int:
        """Save the blocks of a text that the cache has to the file ``name``. Returns the number of their tokens, which
        is smaller if host memory was too full to save the last ones."""
        tiers, digests = self._tiers, self._digests(token_ids)
        known = 0
        while known < len(digests) and (tiers.pool.has(digests[known]) or tiers.host.has(digests[known])):
            known += 1
        if not known:
            raise ParameterError(
                "id_slot", len(token_ids), "tokens: no whole block of the text is in the cache"
            )
        file: PrefixFile = self._files.create(name, known)
        saved = 0
        try:
            while saved < known:
                chunk = digests[saved : min(saved + self._chunk, known)]
                count = self._save(chunk, file)
                saved += count
                if count < len(chunk):
                    break
        except OSError as error:
            self._files.abandon(file)
            raise ParameterError("filename", name, f"cannot be written: {error.strerror}") from None
        self._files.finish(file, name)
        return saved * self._block_size

    def restore(self, name: str) -> int:
        """Copy the blocks of the file ``name`` to the cache, up to the first damaged one. Returns the number of their
        tokens."""
        file: PrefixFile = self._files.open(name)
        try:
            digests = file.digests()[: self._tiers.pool.num_free]
            found = 0
            for at in range(0, len(digests), self._chunk):
                chunk = digests[at : at + self._chunk]
                count = self._restore(chunk, file)
                found += count
                if count < len(chunk):
                    break
        finally:
            file.close()
        return found * self._block_size

    def erase(self, token_ids: Sequence[int]) -> int:
        """Remove the blocks of a text from the caches in memory. Returns the number of their tokens."""
        digests = self._digests(token_ids)
        count = sum(self._tiers.pool.has(digest) or self._tiers.host.has(digest) for digest in digests)
        self._tiers.pool.forget(digests)
        self._tiers.host.forget(digests)
        return count * self._block_size

    def _digests(self, token_ids: Sequence[int]) -> list[bytes]:
        parent, found = self._root, []
        for end in range(self._block_size, len(token_ids) + 1, self._block_size):
            parent = block_hash(parent, token_ids[end - self._block_size : end])
            found.append(parent)
        return found

    def _save(self, digests: Sequence[bytes], file: PrefixFile) -> int:
        """Save blocks by way of host memory. Returns how many of the first have been saved; fewer than all if host
        memory dropped one to make room for another."""
        host, pool, copies = self._tiers.host, self._tiers.pool, Copies()
        kept = [place for digest in digests for place in host.find((digest,))]
        host.share(kept)
        try:
            for digest in digests:
                found = pool.find((digest,))
                if not host.has(digest) and not (found and self._tiers.save(found[0], digest, copies)):
                    break
            self._run(copies)
            places = host.find(digests)
            for digest, place in zip(digests, places, strict=False):
                file.write(digest, *self._files.memory[place])
        finally:
            host.release(kept)
        return len(places)

    def _restore(self, digests: Sequence[bytes], file: PrefixFile) -> int:
        """Restore blocks by way of host memory. Returns how many of the first the pool has afterwards."""
        tiers, host, pool, copies = self._tiers, self._tiers.host, self._tiers.pool, Copies()
        blocks: list[int] = []
        for digest in digests:
            found = pool.find((digest,))
            if found:
                pool.share(found)
            else:
                if not host.has(digest):
                    [place] = host.allocate(1)
                    if file.read(digest, *self._files.memory[place]):
                        host.cache(place, digest)
                    host.release((place,))
                if not host.has(digest):
                    break
                found = pool.allocate(1)
                tiers.load(digest, found[0], copies)
            blocks += found
        self._run(copies)
        pool.release(blocks)
        return len(blocks)
