"""The layout of the Hugging Face cache, ``models--owner--name/{blobs,refs,snapshots}``, and the files of a snapshot."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from vllmlite.errors import ModelError, ParameterError
from vllmlite.weights.gguf_parts import is_later_part

CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
"""Files that describe a model and its tokenizer; none of them is code."""
INDEX = "model.safetensors.index.json"
PT_INDEX = "pytorch_model.bin.index.json"
MEDUSA = "medusa_lm_head.pt"
"""File of Medusa heads, by their authors' code."""
WEIGHT_FILES = (("*.safetensors",), ("pytorch_model*.bin",), ("*.gguf",), (MEDUSA,))
"""Weight formats, the preferred one first."""
NEVER = ("*/*", "consolidated*", "*.bin.index.json")
"""Files not downloaded by default: sub-directories, second copies of the weights, indexes of unused formats."""

TARBALLS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
"""Suffixes of tarballs (:mod:`vllmlite.hub.tarball`)."""

_BESIDE = re.compile(r"mmproj|^imatrix\b", re.IGNORECASE)
"""GGUF files that are not models themselves: image projectors, importance matrices."""

BEGUN, VERIFIED = "begun", "verified"


def is_tarball(path: Path) -> bool:
    """Return whether the file name has a suffix of a tarball."""
    return path.name.lower().endswith(TARBALLS)


def cache_root(download_dir: str | None) -> Path:
    """Return ``download_dir``, or the directory in which Hugging Face's own tools cache models."""
    if download_dir is not None:
        return Path(download_dir).expanduser()
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    return Path(home).expanduser() / "hub"


def repository_in(root: Path, name: str) -> Path:
    """Return the directory of model ``name`` in the cache ``root``."""
    return root / f"models--{name.replace('/', '--')}"


def cached_snapshot(repository: Path, revision: str | None) -> Path | None:
    """Return the cached snapshot of a branch, tag or commit (None: ``main``), or None if there is none."""
    revision = revision or "main"
    if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", revision) or ".." in revision:
        raise ParameterError("revision", revision, "must be the name of a branch or tag, or a commit")
    try:
        commit = (repository / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision
    if not re.fullmatch(r"[\w.-]+", commit) or commit.strip(".") == "":
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def snapshot_in(directory: Path, revision: str | None) -> Path | None:
    """Return the snapshot of the only model in ``directory``, or None if it has no layout of a cache or repository."""
    repositories = [directory] if (directory / "snapshots").is_dir() else sorted(directory.glob("models--*"))
    repositories = [path for path in repositories if (path / "snapshots").is_dir()]
    if not repositories:
        return None
    if len(repositories) > 1:
        raise ModelError(
            f"{directory}: holds several models: {listed([path.name for path in repositories])}; name one of these "
            "directories"
        )
    snapshot = cached_snapshot(repositories[0], revision)
    present = sorted((repositories[0] / "snapshots").iterdir())
    if snapshot is None and revision is None and len(present) == 1:
        snapshot = present[0]
    if snapshot is None:
        raise ModelError(
            f"{repositories[0]}: has no snapshot of revision {revision or 'main'}; those here are "
            f"{listed([path.name for path in present]) or 'none'}"
        )
    return snapshot


def model_in(snapshot: Path, weights: bool = True) -> Path | None:
    """Return the complete model in ``snapshot`` (the directory, or its only GGUF file), or None if files are missing.

    ``weights=False`` requires the configuration only."""
    if (snapshot / "config.json").is_file() and (not weights or _has_weights(snapshot)):
        return snapshot
    files = gguf_files(snapshot)
    return files[0] if len(files) == 1 and not (snapshot / "config.json").exists() else None


def gguf_files(directory: Path) -> list[Path]:
    """Return the GGUF models in ``directory``: the first file of split models, no projectors or importance matrices."""
    files = [file for file in sorted(directory.glob("*.gguf")) if not is_later_part(file.name)]
    return [file for file in files if not _BESIDE.search(file.name)]


def wanted_files(
    names: Iterable[str], weights: bool = True, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Return which of the files ``names`` to download.

    By default these are the files that describe the model and, with ``weights``, the weights in the preferred format
    present. With ``include`` they are the files that match one of its patterns. Files that match a pattern of
    ``exclude`` are left out."""
    names = sorted(names)

    def matching(patterns: Sequence[str]) -> list[str]:
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]

    if include:
        found = matching(include)
    else:
        never = set(matching(NEVER))
        found = [name for name in matching(CONFIG_FILES) if name not in never]
        formats = [[n for n in matching(patterns) if n not in never] for patterns in WEIGHT_FILES]
        best = next((files for files in formats if files), []) if weights else []
        if best == formats[1] and PT_INDEX in names and best:
            best = [*best, PT_INDEX]
        found += best
    excluded = set(matching(exclude))
    return [name for name in found if name not in excluded]


def state(snapshot: Path) -> str | None:
    """Return ``BEGUN`` or ``VERIFIED`` if vllmlite downloaded the snapshot, or None if another program did."""
    try:
        return _state_file(snapshot).read_text(encoding="ascii")
    except OSError:
        return None


def set_state(snapshot: Path, new: str) -> None:
    """Record the state of ``snapshot``, which need not exist yet."""
    file = _state_file(snapshot)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(new, encoding="ascii")


def is_undisturbed(snapshot: Path) -> bool:
    """Return whether, as far as can be known, no download into ``snapshot`` was interrupted."""
    known = state(snapshot)
    return known == VERIFIED or (known is None and not any(snapshot.parents[1].glob("blobs/*.incomplete")))


def is_damaged(file: Path, digest: str | None) -> bool:
    """Return whether ``file`` differs from ``digest``, its SHA-256 (large files) or Git blob id (small files).

    A ``digest`` of another form is not checked."""
    if digest is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
        return False
    found = hashlib.sha256()
    if len(digest) == 40:
        found = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            found.update(chunk)
    return found.hexdigest() != digest


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the names as text for a message, at most ``most`` of them."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _state_file(snapshot: Path) -> Path:
    return snapshot.parents[1] / ".vllmlite" / snapshot.name


def _has_weights(directory: Path) -> bool:
    for single, index in (("*.safetensors", INDEX), ("pytorch_model*.bin", PT_INDEX), (MEDUSA, PT_INDEX)):
        if (directory / index).is_file():
            return _has_shards(directory, index)
        if any(directory.glob(single)):
            return True
    return False


def _has_shards(directory: Path, index: str) -> bool:
    try:
        shards = set(json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return False
    return all(isinstance(shard, str) and (directory / shard).is_file() for shard in shards)
