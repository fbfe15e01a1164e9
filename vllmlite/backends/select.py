"""Which backend computes: every candidate is asked, each that declines says why, and the choice is never silent."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from vllmlite.backends.base import Backend
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.cuda import CudaBackend
from vllmlite.config.engine_config import FLOAT_DTYPES, QUANTIZATIONS
from vllmlite.errors import BackendError, ParameterError, not_installed


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a backend is to do. Raises :class:`ParameterError` for what no backend knows."""

    backend: str = "auto"
    """``auto`` or a name in ``CANDIDATES``."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: str = "auto"
    """``auto`` or one of ``FLOAT_DTYPES``; ``auto`` is ``checkpoint_dtype``, except float16 for bfloat16 on GPUs
    without it, and float32 for float16 on the CPU."""
    checkpoint_dtype: str = "float32"
    threads: int | None = None
    cpu_isa: str = "auto"
    quantization: str | None = None
    """One of ``QUANTIZATIONS``, the scheme in which float weights are quantised at load; None: they are not."""
    packed: bool = False
    """Most products will have packed weights if the backend multiplies their schemes."""
    model: str = "the model"
    only: Collection[str] = ()
    """The backends that ``model`` can run on; empty: all."""
    batch_invariant: bool = False
    """Rows are the same to the bit however they are batched, which native backends alone have."""

    def __post_init__(self) -> None:
        names = ("auto", *dict.fromkeys(name for name, _, _ in CANDIDATES))
        if self.backend not in names:
            raise ParameterError("backend", self.backend, ", ".join(names))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ParameterError("device", self.device, "auto, cpu, cuda or cuda:N")
        if self.dtype not in ("auto", *FLOAT_DTYPES):
            raise ParameterError("dtype", self.dtype, ", ".join(("auto", *FLOAT_DTYPES)))
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ParameterError("quantization", self.quantization, ", ".join(QUANTIZATIONS))


GPU_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap")
"""Device files, one of which is there wherever CUDA runs: Linux, WSL, Tegra."""


def _cuda(wanted: Wanted) -> Backend:
    device = "cuda" if wanted.device == "auto" else wanted.device
    if not device.startswith("cuda"):
        raise BackendError(f"device {device} was asked for")
    if wanted.quantization is not None and wanted.quantization not in CudaBackend.schemes:
        raise BackendError(f"vllmlite._cuda does not multiply {wanted.quantization} weights")
    return CudaBackend(device, wanted.dtype, wanted.checkpoint_dtype, wanted.batch_invariant)


def _refuse_invariance(wanted: Wanted) -> None:
    if wanted.batch_invariant:
        raise BackendError("torch's products are not batch-invariant")


def _torch_cuda(wanted: Wanted) -> Backend:
    _refuse_invariance(wanted)
    device = "cuda" if wanted.device == "auto" else wanted.device
    if not device.startswith("cuda"):
        raise BackendError(f"device {device} was asked for")
    if wanted.device == "auto" and not any(os.path.exists(node) for node in GPU_NODES):
        # Known without the second that importing torch takes.
        raise BackendError("this machine has no NVIDIA GPU")
    torch_module: Any = _import_torch()
    torch = torch_module.torch
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise BackendError(
            f"torch, built for CUDA {built}, finds no GPU" if built else "this torch is built without CUDA"
        )
    dtype = wanted.checkpoint_dtype if wanted.dtype == "auto" else wanted.dtype
    native = torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)
    if wanted.dtype == "auto" and dtype == "bfloat16" and not native:
        dtype = "float16"
    backend: Backend = torch_module.TorchBackend(device, dtype, wanted.threads)
    return backend


def _torch_cpu(wanted: Wanted) -> Backend:
    _refuse_invariance(wanted)
    torch_module: Any = _import_torch()
    if wanted.device not in ("auto", "cpu"):
        raise BackendError(f"device {wanted.device} was asked for")
    dtype = wanted.checkpoint_dtype if wanted.dtype == "auto" else wanted.dtype
    if wanted.dtype == "auto" and dtype == "float16":
        # CPUs rarely compute in float16: torch emulates it, several times slower than float32, and less exactly.
        dtype = "float32"
    backend: Backend = torch_module.TorchBackend("cpu", dtype, wanted.threads)
    return backend


def _cpu(wanted: Wanted) -> Backend:
    if wanted.device not in ("auto", "cpu"):
        raise BackendError(f"device {wanted.device} was asked for")
    dtype = wanted.checkpoint_dtype if wanted.dtype == "auto" else wanted.dtype
    return CpuBackend(dtype, wanted.threads, wanted.cpu_isa, wanted.packed)


CANDIDATES: tuple[tuple[str, str, Callable[[Wanted], Backend]], ...] = (
    ("cuda", "cuda", _cuda),
    ("torch", "cuda", _torch_cuda),
    ("cpu", "cpu", _cpu),
    ("torch", "cpu", _torch_cpu),
)
"""Backend, kind of device, and a function that makes it or says in a BackendError why not; best first."""


def select_backend(wanted: Wanted) -> tuple[Backend, str]:
    """The first candidate that can do what was asked, and a sentence that says which it is and why others declined.
    BackendError with every reason where no candidate is left."""
    declined = []
    for name, kind, make in CANDIDATES:
        if wanted.backend not in ("auto", name):
            declined.append(f"{name} on {kind} declined: backend {wanted.backend} was asked for")
            continue
        if wanted.only and name not in wanted.only:
            declined.append(
                f"{name} on {kind} declined: {wanted.model} runs on {', '.join(wanted.only)} alone"
            )
            continue
        try:
            chosen = make(wanted)
        except BackendError as error:
            declined.append(f"{name} on {kind} declined: {error}")
        else:
            details = f" ({chosen.details})" if chosen.details else ""
            choice = f"{name} on {chosen.device} in {chosen.dtype}{details}"
            return chosen, "; ".join((choice, *declined))
    raise BackendError("no backend can run: " + "; ".join(declined))


def _import_torch() -> object:
    try:
        return importlib.import_module("vllmlite.backends.torch")
    except ModuleNotFoundError as error:
        raise BackendError(not_installed(str(error.name))) from None
    except ImportError as error:
        raise BackendError(f"torch cannot be imported: {error}") from error
