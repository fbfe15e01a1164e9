"""Models as one file: a tarball with the layout of the Hugging Face cache, written reproducibly and unpacked safely.

It contains ``version.txt`` (:data:`VERSION`) and ``models--owner--name`` with ``blobs`` (the files, by checksum),
``refs`` (one file per branch, containing its commit) and ``snapshots/COMMIT`` (relative links into ``blobs``).
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import importlib
import io
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from vllmlite.errors import ModelError, ParameterError
from vllmlite.hub.snapshot import TARBALLS, is_damaged, is_tarball

VERSION = "1\n"
MAX_MEMBERS = 10_000
MAX_HEADER = 1 << 20
"""Largest number of bytes read at once for the archive's headers."""
MAX_RATIO = 64
"""Maximum ratio of unpacked to packed size of a tarball, unless it unpacks to less than :data:`MIN_UNPACKED` bytes."""
MIN_UNPACKED = 1 << 30
CHUNK = 1 << 20

try:
    _zstd: Any = importlib.import_module("compression.zstd")
except ImportError:  # before Python 3.14
    _zstd = None
_UNREADABLE: tuple[type[Exception], ...] = (
    *(tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, zlib.error),
    *((_zstd.ZstdError,) if _zstd else ()),
)
"""Exceptions that tarfile and the decompressors raise for bad data."""


def write_tarball(snapshot: Path, target: Path, revision: str | None = None) -> None:
    """Write the cached model's ``snapshot`` to ``target``, whose suffix selects the compression.

    The bytes depend only on the files and on ``revision``. Raises ParameterError if ``target`` exists or its suffix is
    not in :data:`TARBALLS`."""
    if not is_tarball(target):
        raise ParameterError("tarball", str(target), f"must end in one of {', '.join(TARBALLS)}")
    if target.exists():
        raise ParameterError("tarball", str(target), "exists already: name a new file")
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise ModelError(f"{target.parent}: cannot be written to: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            with _compressed(file, target) as stream:
                _write(stream, snapshot, revision)
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)
        os.rename(partial, target)
    except BaseException:
        os.unlink(partial)
        raise


def unpack(path: Path, root: Path) -> Path:
    """Return the directory of tarball ``path``, unpacking it in the cache ``root`` unless that was done before.

    A tarball that has changed is unpacked again. Only regular files, directories and links to files in the tarball are
    accepted. Raises ModelError for anything else, for damaged data, and above the size limit."""
    about = path.stat()
    stamp = f"{about.st_size} {about.st_mtime_ns} {about.st_ino}"
    identity = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    target = root / "vllmlite-tarballs" / f"{path.name.split('.tar')[0]}-{identity}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / f"{target.name}.lock", "a+", encoding="ascii") as lock:  # holds the stamp
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if lock.read() == stamp and target.is_dir():
                return target
            lock.truncate(0)
            limit = min(max(MAX_RATIO * about.st_size, MIN_UNPACKED), shutil.disk_usage(target.parent).free)
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                extract(path, partial, limit)
                for blob in sorted(partial.glob("models--*/blobs/*")):
                    if is_damaged(blob, blob.name):
                        raise ModelError(
                            f"{path}: blobs/{blob.name} is damaged: its checksum is not its name"
                        )
                if target.exists():  # running engines keep their mappings of its files
                    shutil.rmtree(target)
                partial.rename(target)
            except BaseException:
                shutil.rmtree(partial)
                raise
            lock.write(stamp)
    except OSError as error:
        raise ModelError(f"{path}: cannot be unpacked to {target}: {error.strerror or error}") from error
    return target


def extract(path: Path, target: Path, limit: int) -> None:
    """Unpack tarball ``path`` into the empty directory ``target``, at most ``limit`` bytes.

    Raises ModelError for members that are not allowed."""
    try:
        with (
            _decompressed(path) as stream,
            tarfile.open(fileobj=_Bounded(stream, path, limit), mode="r:") as archive,
        ):
            _extract(path, archive, target)
    except OSError as error:
        raise ModelError(f"{path}: cannot be unpacked: {error.strerror or error}") from error
    except _UNREADABLE as error:
        raise ModelError(f"{path}: is not a readable tarball: {error}") from error


def _extract(path: Path, archive: tarfile.TarFile, target: Path) -> None:
    files: set[PurePosixPath] = set()
    links: dict[PurePosixPath, PurePosixPath] = {}
    for count, member in enumerate(_members(archive)):
        name = _checked_name(path, member.name)
        if count >= MAX_MEMBERS:
            raise ModelError(f"{path}: holds more than {MAX_MEMBERS} files")
        if member.isdir():
            (target / name).mkdir(parents=True, exist_ok=True)
        elif name in files or name in links:
            raise ModelError(f"{path}: {_shown(member.name)}: occurs twice")
        elif member.issym():
            links[name] = _checked_link(path, name, member.linkname)
        elif member.isreg() and not member.issparse():
            files.add(name)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with (target / name).open("xb") as file:
                shutil.copyfileobj(cast(IO[bytes], archive.extractfile(member)), file, CHUNK)
                if file.tell() != member.size:
                    raise ModelError(f"{path}: ends in the middle of {_shown(member.name)}")
        else:
            raise ModelError(f"{path}: {_shown(member.name)}: neither a regular file nor a link to one")
    # Links are created last, and only to files, so nothing is ever written through a link.
    for name, destination in links.items():
        if destination not in files:
            raise ModelError(
                f"{path}: {_shown(str(name))}: a link to something other than a regular file in it"
            )
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(os.path.relpath(target / destination, (target / name).parent))


class _Bounded(io.RawIOBase):
    """Input stream for :mod:`tarfile` that moves forward only, in small steps, and at most ``limit`` bytes."""

    def __init__(self, stream: IO[bytes], path: Path, limit: int) -> None:
        self._stream, self._path, self._limit = stream, path, limit

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise ModelError(f"{self._path}: a record of {size} bytes; expected at most {MAX_HEADER}")
        self._check(self.tell() + size)
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self.tell():
            raise ModelError(f"{self._path}: is not a readable tarball: it seeks backwards")
        self._check(offset)
        return self._stream.seek(offset)

    def _check(self, position: int) -> None:
        if position > self._limit + MAX_HEADER:
            raise ModelError(f"{self._path}: unpacks to more than the allowed {self._limit} bytes")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        yield member


def _checked_name(path: Path, name: str) -> PurePosixPath:
    """Return a member's name as a path. Raises ModelError unless it is relative and stays within the target."""
    parts = PurePosixPath(name).parts
    if not name or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name or len(name) > 1000:
        raise ModelError(f"{path}: {_shown(name)}: a name outside the target directory")
    return PurePosixPath(name)


def _checked_link(path: Path, name: PurePosixPath, destination: str) -> PurePosixPath:
    """Return the destination of the link ``name`` relative to the target. Raises ModelError if it is outside."""
    found = (
        os.path.normpath(os.path.join("/root", name.parent, destination))
        if destination and "\0" not in destination
        else ""
    )
    if destination.startswith("/") or not found.startswith("/root/"):
        raise ModelError(
            f"{path}: {_shown(str(name))}: a link out of the target directory, to {_shown(destination)}"
        )
    return PurePosixPath(found).relative_to("/root")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _write(stream: IO[bytes], snapshot: Path, revision: str | None) -> None:
    repository = snapshot.parents[1].name
    members: dict[str, Path | bytes | str] = {"version.txt": VERSION.encode()}
    """Members by name: a Path is a file on disk, bytes a file in memory, a str the destination of a link."""
    if revision != snapshot.name:
        members[f"{repository}/refs/{revision or 'main'}"] = snapshot.name.encode()
    for file in sorted(snapshot.rglob("*")):
        if not file.is_file():
            continue
        blob = file.resolve()
        name = blob.name if blob.parent.name == "blobs" and file.is_symlink() else _sha256(blob)
        members[f"{repository}/blobs/{name}"] = blob
        place = f"{repository}/snapshots/{snapshot.name}/{file.relative_to(snapshot).as_posix()}"
        members[place] = os.path.relpath(f"{repository}/blobs/{name}", os.path.dirname(place))
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(
            {str(parent) for place in members for parent in PurePosixPath(place).parents} - {"."}
        ):
            archive.addfile(_info(name, tarfile.DIRTYPE, 0o755))
        for name, content in sorted(members.items()):
            if isinstance(content, str):
                info = _info(name, tarfile.SYMTYPE, 0o777)
                info.linkname = content
                archive.addfile(info)
            elif isinstance(content, bytes):
                archive.addfile(_info(name, tarfile.REGTYPE, 0o644, len(content)), io.BytesIO(content))
            else:
                with content.open("rb") as opened:
                    archive.addfile(_info(name, tarfile.REGTYPE, 0o644, content.stat().st_size), opened)


def _info(name: str, kind: bytes, mode: int, size: int = 0) -> tarfile.TarInfo:
    """Return a header without times, owners or other traces of where it was written."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size = kind, mode, size
    return info


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _compressed(file: IO[bytes], target: Path) -> Iterator[IO[bytes]]:
    suffix = target.name.lower()
    if suffix.endswith(".zst"):
        with _zstd_file(target, file, "w") as stream:
            yield stream
    elif suffix.endswith("gz"):
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as stream:
            yield cast(IO[bytes], stream)
    else:
        yield file


@contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Open the tar stream in ``path``; its first bytes, not its name, determine the compression."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start == b"\x28\xb5\x2f\xfd":
            with _zstd_file(path, file) as stream:
                yield stream
        elif start.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=file) as stream:
                yield cast(IO[bytes], stream)
        else:
            yield file


def _zstd_file(path: Path, file: IO[bytes], mode: str = "r") -> Any:
    if _zstd is None:
        raise ModelError(f"{path}: zstd needs Python 3.14: use .tar.gz or .tar")
    checked = {_zstd.CompressionParameter.checksum_flag: 1}
    return _zstd.ZstdFile(file, mode, options=checked if mode == "w" else None)
