"""Find a model: the built-in one, a directory, the Hugging Face cache, or a hub id to download."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vllmlite.errors import ModelError, ParameterError

BUILT_IN = Path(__file__).parent / "data" / "demo"
"""Directory of the built-in demo model."""
BUILT_IN_NAME = "vllmlite-demo"
"""What a server calls it."""

CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
"""What describes a model and its tokenizer; never code, and never pickled weights."""
WEIGHT_FILES = ["*.safetensors"]
INDEX = "model.safetensors.index.json"
NEVER = ["*/*", "consolidated*"]
"""Sub-directories and second copies of the weights."""


def find_model(
    name: str | None = None,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    weights: bool = True,
) -> Path:
    """The directory of model ``name``, downloaded if it has to be; None is the built-in model.

    What is cached is used without asking the network. Without ``weights`` only configuration and tokenizer are
    wanted. Raises :class:`ModelError` with the reason where there is nothing to return."""
    if name is None:
        if not (BUILT_IN / "config.json").is_file():
            raise ModelError(
                "this installation has no built-in model: name another one, or reinstall vllmlite"
            )
        return BUILT_IN
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ParameterError("revision", revision, f"is for models on the hub, and {name} is a directory")
        return path
    if path.exists():
        raise ModelError(f"{name}: is a file; a model is a directory with config.json and *.safetensors")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name, re.ASCII):
        raise ModelError(f"{name}: no such directory, and not a Hugging Face id (owner/name)")
    return _from_hub(name, revision, download_dir, weights)


def _from_hub(name: str, revision: str | None, download_dir: str | None, weights: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download, try_to_load_from_cache
    except ImportError:
        raise ModelError(
            f"{name}: no such directory; to look it up as a Hugging Face id, install huggingface-hub "
            "(Debian: python3-huggingface-hub)"
        ) from None
    cached: Path | None = None
    try:
        hit = try_to_load_from_cache(name, "config.json", cache_dir=download_dir, revision=revision)
        if isinstance(hit, str):
            cached = Path(hit).parent
            if is_complete(cached, weights) and not any(cached.parents[1].glob("blobs/*.incomplete")):
                return cached
        found = snapshot_download(
            name,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=CONFIG_FILES + (WEIGHT_FILES if weights else []),
            ignore_patterns=NEVER,
        )
    except Exception as error:  # whatever HTTP client the library uses raises errors of its own
        if cached is not None and is_complete(cached, weights):
            return cached
        raise ModelError(f"{name}: {_reason(error, revision, cached)}") from error
    directory = Path(found)
    if not is_complete(directory, weights):
        if (directory / INDEX).is_file():
            raise ModelError(f"{name}: the copy in the cache is incomplete, and the hub gave no more of it")
        raise ModelError(f"{name}: has no config.json with safetensors weights, which is what vllmlite reads")
    return directory


def is_complete(directory: Path, weights: bool = True) -> bool:
    """Whether ``directory`` holds config.json and, if ``weights`` are wanted, every safetensors file of its index."""
    if not (directory / "config.json").is_file():
        return False
    if not weights:
        return True
    index = directory / INDEX
    if not index.is_file():
        return any(directory.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return False
    return all((directory / str(shard)).is_file() for shard in shards)


def _reason(error: Exception, revision: str | None, cached: Path | None) -> str:
    """What a download error means to the user, in plain words."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and len(chain) < 8:
        chain.append(cause)
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    status = next(
        (s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))), None
    )
    partly = "" if cached is None else " (the copy in the cache is incomplete)"
    if "OfflineModeIsEnabled" in names:
        return f"not in the cache, and HF_HUB_OFFLINE forbids downloads{partly}"
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
        return f"not in the cache, and the hub cannot be reached{partly}"
    text = " ".join(str(error).split())
    return f"cannot be downloaded: {text or type(error).__name__}"
