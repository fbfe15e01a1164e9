"""Download models from the hub with huggingface-hub: one process per model at a time, and every file's checksum is
verified.
"""

from __future__ import annotations

import fcntl
import glob
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllmlite.errors import ModelError
from vllmlite.hub.snapshot import (
    BEGUN,
    VERIFIED,
    cached_snapshot,
    is_damaged,
    is_undisturbed,
    listed,
    model_in,
    repository_in,
    set_state,
    state,
    wanted_files,
)
from vllmlite.terminal import note
from vllmlite.weights.gguf_parts import is_later_part


class NotReached(ModelError):
    """Raised if the hub cannot be reached, or refuses the request."""


def download(
    name: str,
    *,
    root: Path,
    revision: str | None = None,
    weights: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    again: bool = False,
) -> Path:
    """Download model ``name`` to the cache ``root`` and return its snapshot; :func:`wanted_files` chooses the files.

    Files that are already there are kept. All files are compared with the hub's checksums; damaged ones are removed and
    named in a ModelError. Only one process at a time downloads a model; a process that waited uses what the other one
    downloaded, unless ``again`` asks the hub in any case. Raises :class:`NotReached` if the hub is unreachable or
    refuses."""
    library = _library(name)
    repository = repository_in(root, name)
    with _locked(root / ".locks" / repository.name / "vllmlite.lock"):
        cached = cached_snapshot(repository, revision)
        if not again and cached is not None and is_undisturbed(cached) and model_in(cached, weights):
            return cached
        try:
            endpoint = os.environ.get("HF_ENDPOINT")  # its current value; the library reads it at import
            info = library.HfApi(endpoint=endpoint).model_info(name, revision=revision, files_metadata=True)
            files = {file.rfilename: file for file in info.siblings or ()}
            wanted = _checked_choice(name, list(files), weights, include, exclude)
            snapshot = repository / "snapshots" / str(info.sha)
            known = state(snapshot)
            _announce(name, snapshot, [files[file] for file in wanted])
            if known != VERIFIED or not all((snapshot / file).exists() for file in wanted):
                set_state(snapshot, BEGUN)
            found = library.snapshot_download(
                name,
                revision=revision,
                cache_dir=root,
                endpoint=endpoint,
                allow_patterns=[glob.escape(file) for file in wanted],
            )
        except ModelError:
            raise
        except Exception as error:  # the library's HTTP client has exceptions of its own
            raise NotReached(f"{name}: {_reason(error, revision)}") from error
        if Path(found).resolve() != snapshot.resolve():
            raise ModelError(f"{name}: changed on the hub during the download: try again")
        _verify(name, snapshot, [files[file] for file in wanted])
        set_state(snapshot, VERIFIED)
    return snapshot


def _library(name: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise ModelError(
            f"{name}: no such directory; to look it up as a Hugging Face id, install huggingface-hub "
            "(Debian: python3-huggingface-hub)"
        ) from None


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``file``; it is released when the process ends."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ModelError(f"{file.parent}: models cannot be cached here: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _checked_choice(
    name: str, files: list[str], weights: bool, include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Return the names of the files to download. Raises ModelError if there are none, or several models."""
    wanted = wanted_files(files, weights, include, exclude)
    models = [file for file in wanted if file.endswith(".gguf") and not is_later_part(Path(file).name)]
    if len(models) > 1 and not include:
        raise ModelError(
            f"{name}: has several GGUF files ({listed(models)}): choose one with "
            f"vllmlite download {name} --include FILE"
        )
    if not wanted:
        what = "no file that --include and --exclude leave" if include or exclude else "no model's files"
        raise ModelError(f"{name}: has {what}; its files are {listed(sorted(files)) or 'none'}")
    return wanted


def _announce(name: str, snapshot: Path, files: Sequence[Any]) -> None:
    missing = [file for file in files if not (snapshot / file.rfilename).exists()]
    if missing:
        size = sum(file.size or 0 for file in missing) / 1e6
        count = f"{len(missing)} file{'s' * (len(missing) != 1)}"
        note(f"vllmlite: downloading {name}: {count}, {size:.1f} MB, to {snapshot.parents[2]}")


def _verify(name: str, snapshot: Path, files: Sequence[Any]) -> None:
    """Compare ``files`` with the hub's checksums. Remove damaged files, so that a retry downloads them again."""
    damaged = []
    for file in files:
        path = snapshot / file.rfilename
        if not path.is_file():
            raise ModelError(f"{name}: {file.rfilename} is missing after the download: try again")
        if is_damaged(path, file.blob_id if file.lfs is None else file.lfs.sha256):
            damaged.append(file.rfilename)
            blob = path.resolve()
            if blob.parent == (snapshot.parents[1] / "blobs").resolve():
                blob.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    if damaged:
        raise ModelError(
            f"{name}: damaged during download and removed: {listed(damaged)} (wrong checksum): try again"
        )


def _reason(error: Exception, revision: str | None) -> str:
    """Return a description of a download error for the user."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and len(chain) < 8:
        chain.append(cause)
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    status = next(
        (s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))), None
    )
    if "OfflineModeIsEnabled" in names:
        return "not in the cache, and HF_HUB_OFFLINE forbids downloads"
    if "GatedRepoError" in names or status == 403:
        return "access is restricted: accept its terms on the hub, and set HF_TOKEN"
    if "RevisionNotFoundError" in names:
        return f"has no revision {revision}"
    if "RepositoryNotFoundError" in names or status in (401, 404):
        return "no such directory, and no such model on the hub (if it is private, set HF_TOKEN)"
    if status == 429:
        return "the hub refuses more requests for now (429): wait, or set HF_TOKEN"
    if status is not None:
        return f"the hub answers with error {status}: try again later"
    if names & {
        "ConnectError",
        "TimeoutException",
        "ConnectionError",
        "LocalEntryNotFoundError",
        "TimeoutError",
    }:
        return "not in the cache, and the hub cannot be reached"
    text = " ".join(str(error).split())
    return f"cannot be downloaded: {text or type(error).__name__}"
