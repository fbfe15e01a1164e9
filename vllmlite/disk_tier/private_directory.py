"""Files that only their owner can read, in a directory of the owner; links are not followed."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress

from vllmlite.errors import ParameterError


class PrivateDirectory:
    """A directory of mode 0700, made if it is missing. Its files have mode 0600.

    Whoever could write to the directory could replace files, and whoever could read a file could learn the prompts
    whose keys and values are in it. Raises ParameterError, under the name ``field``, if the directory is not safe."""

    def __init__(self, path: str, field: str) -> None:
        """Open the directory."""
        self.path, self._field = path, field
        with suppress(FileExistsError):
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                raise
            except OSError as error:
                raise self._refuse(f"cannot be made: {error.strerror}") from None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            what = (
                "must not be a symbolic link"
                if os.path.islink(path)
                else f"cannot be opened: {error.strerror}"
            )
            raise self._refuse(what) from None
        try:
            self._check(os.fstat(self._fd), "the directory", "0700")
        except ParameterError:
            os.close(self._fd)
            raise

    def open(self, name: str, flags: int = os.O_RDWR | os.O_CREAT, lock: bool = True) -> int:
        """Open the file ``name``, locked against other processes unless ``lock`` is False; returns its descriptor.

        OSError if it cannot be opened."""
        try:
            fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._refuse(f"{name} in it must not be a symbolic link") from None
            raise
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise self._refuse(f"{name} in it must be a regular file with one name")
            self._check(found, name, "0600")
            if lock:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise self._refuse("is in use by another engine: give each its own directory") from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file."""
        with os.scandir(self._fd) as entries:
            return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}

    def replace(self, old: str, new: str) -> None:
        """Rename a file over another one."""
        os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Remove a file."""
        os.unlink(name, dir_fd=self._fd)

    def close(self) -> None:
        """Close the directory."""
        os.close(self._fd)

    def _check(self, found: os.stat_result, what: str, mode: str) -> None:
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise self._refuse(f"{what} must belong to the user of the engine, with mode {mode}")

    def _refuse(self, reason: str) -> ParameterError:
        return ParameterError(self._field, self.path, reason)
