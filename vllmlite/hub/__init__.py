"""Find a model: built in, a directory, a GGUF file, a tarball, in the Hugging Face cache, or on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from vllmlite.errors import ModelError, ParameterError
from vllmlite.hub.snapshot import (
    BEGUN,
    TARBALLS,
    cache_root,
    cached_snapshot,
    gguf_files,
    is_tarball,
    is_undisturbed,
    listed,
    model_in,
    repository_in,
    snapshot_in,
    state,
)
from vllmlite.weights.not_checkpoints import what_directory_is, what_it_is

BUILT_IN = Path(__file__).parent.parent / "data" / "demo"
"""Directory of the built-in demo model."""
BUILT_IN_DRAFTS = BUILT_IN.parent / "drafts"
"""Directory with a subdirectory for each method of speculative decoding that has a drafter for the demo model."""
BUILT_IN_NAME = "vllmlite-demo"
"""Name of the demo model in the server's API."""


def find_model(
    name: str | None = None,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    weights: bool = True,
) -> Path:
    """Return the directory or GGUF file of model ``name``, downloading or unpacking it if necessary.

    None means the built-in model. A complete cached copy is used without asking the network. ``weights=False`` asks for
    configuration and tokenizer only. Raises :class:`ModelError` if the model cannot be provided."""
    if name is None:
        if not (BUILT_IN / "config.json").is_file():
            raise ModelError(
                "this installation has no built-in model: name another one, or reinstall vllmlite"
            )
        return BUILT_IN
    path = Path(name).expanduser()
    if path.is_file() and is_tarball(path):
        from vllmlite.hub.tarball import unpack  # only needed for tarballs

        path = unpack(path, cache_root(download_dir))
    if path.is_dir():
        return _in_directory(path, revision)
    if path.exists():
        if revision is not None:
            raise ParameterError("revision", revision, f"applies to models on the hub only; {name} is a file")
        if path.suffix.lower() != ".gguf":
            kind = what_it_is(path)
            if kind is not None and kind[0] == "gguf":  # Ollama stores GGUF files without a suffix
                return path
            if kind is not None and path.suffix not in (".safetensors", ".bin", ".pt"):
                raise ModelError(f"{name}: is {kind[1]}")
            raise ModelError(
                f"{name}: is a file; a model is a directory with config.json and weights, a *.gguf file, or a tarball "
                f"({', '.join(TARBALLS)}) of the Hugging Face cache's layout"
            )
        return path
    if not is_hub_id(name):
        raise ModelError(f"{name}: no such directory, and not a Hugging Face id (owner/name)")
    return _from_hub(name, revision, download_dir, weights)


def built_in_draft(method: str) -> Path:
    """Return the directory of what drafts for the built-in model by speculative ``method``. Raises ModelError."""
    path = BUILT_IN_DRAFTS / method
    if not (path / "config.json").is_file():
        raise ModelError(
            f"this installation has no {method} drafter for the built-in model: reinstall vllmlite"
        )
    return path


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` has the form of a model id on the hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name, re.ASCII) is not None and ".." not in name


def _in_directory(path: Path, revision: str | None) -> Path:
    """Return the model in a directory, which may be a snapshot or have the layout of a cache with one model."""
    snapshot = snapshot_in(path, revision)
    if snapshot is None:
        if revision is not None:
            raise ParameterError(
                "revision", revision, f"applies to models on the hub only; {path} is a directory"
            )
        snapshot = path
    if (snapshot / "config.json").is_file():
        return snapshot
    files = [str(file.relative_to(path)) for file in gguf_files(snapshot)]
    if len(files) > 1:
        raise ModelError(f"{path}: holds several GGUF files; name one: {listed(files)}")
    instead = None if files else what_directory_is(snapshot)
    if instead is not None:
        raise ModelError(f"{path}: {instead}")
    return path / files[0] if files else snapshot


def _from_hub(name: str, revision: str | None, download_dir: str | None, weights: bool) -> Path:
    root = cache_root(download_dir)
    snapshot = cached_snapshot(repository_in(root, name), revision)
    cached = None if snapshot is None else model_in(snapshot, weights)
    if snapshot is not None and cached is not None and is_undisturbed(snapshot):
        return cached
    from vllmlite.hub.download import NotReached, download  # only needed for downloads

    try:
        found = model_in(download(name, revision=revision, root=root, weights=weights), weights)
    except NotReached as error:
        if snapshot is None or cached is None or state(snapshot) == BEGUN:
            partly = "" if snapshot is None else " (the copy in the cache is incomplete)"
            raise ModelError(f"{error}{partly}") from error
        return cached
    if found is None:
        raise ModelError(f"{name}: has no config.json with a complete set of weights that vllmlite reads")
    return found
