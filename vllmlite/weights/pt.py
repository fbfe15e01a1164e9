"""PyTorch's ``.bin`` and ``.pt`` files, read with torch's weights-only loader, which unpickles only tensors."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from vllmlite.errors import ModelError, not_installed
from vllmlite.weights.host import ITEM_SIZE, HostTensor
from vllmlite.weights.not_checkpoints import refuse_foreign_file


def read_pt(path: Path, content: bytes | None = None) -> dict[str, HostTensor]:
    """Return the tensors of ``path`` by name, memory-mapped if the format (PyTorch 1.6 or newer) allows; or those of a
    file with the given ``content``, for which ``path`` is only a name.

    Raises ModelError if the file contains anything but a mapping of names to dense tensors."""
    refuse_foreign_file(path, ("zip", "pickle", "tar"))
    try:
        import torch
    except ImportError:
        raise ModelError(f"{path}: {not_installed('torch')}; safetensors files need no torch") from None
    try:
        if content is None:
            mapped = zipfile.is_zipfile(path) or None
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        else:
            _check_unpacked(path, content)
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ModelError(
            f"{path}: contains objects other than tensors, which are never loaded: {reason}"
        ) from error
    except Exception as error:  # torch raises various exceptions for damaged files
        raise ModelError(f"{path}: cannot be read by torch: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds {type(found).__name__}; accepted: a mapping of names to tensors")
    return {name: _host_tensor(path, name, value) for name, value in found.items()}


def _check_unpacked(path: Path, content: bytes) -> None:
    """Raise ModelError if a zip archive is compressed, so that it may be much larger than its file."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ModelError(f"{path}: is a compressed archive, which torch does not write")


def _host_tensor(path: Path, name: object, value: Any) -> HostTensor:
    import torch

    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    if not (isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided):
        raise ModelError(f"{path}: {str(name)[:80]!r}: is not a dense tensor")
    if dtype not in ITEM_SIZE:
        raise ModelError(f"{path}: tensor {name[:80]!r}: is of {dtype}; accepted: {', '.join(ITEM_SIZE)}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ModelError(f"{path}: tensor {name[:80]!r}: has more elements than are stored")
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return HostTensor(dtype, tuple(value.shape), flat.numpy())
