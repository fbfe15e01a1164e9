"""Choose the compute backend: candidates are tried in order, and each one that cannot be used gives its reason."""

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
from vllmlite.config.engine_config import AT_LOAD, FLOAT_DTYPES
from vllmlite.errors import BackendError, ParameterError, not_installed
from vllmlite.weights.packing import LOAD_SCHEMES


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRequest:
    """Options that the chosen backend must support. Raises :class:`ParameterError` for values that no backend
    supports."""

    backend: str = "auto"
    """``auto`` or a name in ``CANDIDATES``."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    gpu: int = 0
    """Number of the GPU that is meant by the devices ``auto`` and ``cuda``."""
    dtype: str = "auto"
    """``auto`` or one of ``FLOAT_DTYPES``. ``auto`` is ``checkpoint_dtype``, except float16 instead of bfloat16 on GPUs
    without bfloat16, and float32 instead of float16 on the CPU."""
    checkpoint_dtype: str = "float32"
    threads: int | None = None
    cpu_isa: str = "auto"
    quantization: str | None = None
    """The scheme to quantise float weights to at load, one of ``AT_LOAD``; None: do not quantise."""
    packed: bool = False
    """Whether most weight matrices will be packed, if the backend multiplies their schemes."""
    model: str = "the model"
    only: Collection[str] = ()
    """Names of the only backends that can run ``model``; empty: all can."""
    batch_invariant: bool = False
    """Whether results must be bit-identical for any batch composition; only native backends support that."""
    movable: bool = False
    """Whether the backend must support :meth:`Backend.release` and :meth:`Backend.restore`; matters only for CUDA."""

    def __post_init__(self) -> None:
        names = ("auto", *dict.fromkeys(name for name, _, _ in CANDIDATES))
        if self.backend not in names:
            raise ParameterError("backend", self.backend, ", ".join(names))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ParameterError("device", self.device, "auto, cpu, cuda or cuda:N")
        if self.dtype not in ("auto", *FLOAT_DTYPES):
            raise ParameterError("dtype", self.dtype, ", ".join(("auto", *FLOAT_DTYPES)))
        if self.quantization not in (None, *AT_LOAD):
            raise ParameterError("quantization", self.quantization, ", ".join(AT_LOAD))

    @property
    def cuda_device(self) -> str:
        """The CUDA device ``cuda:N`` that ``device`` means."""
        if self.device not in ("auto", "cuda"):
            return self.device
        return f"cuda:{self.gpu}" if self.gpu else "cuda"


GPU_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap")
"""Device files; at least one exists wherever CUDA runs (Linux, WSL, Tegra)."""


def _cuda(request: BackendRequest) -> Backend:
    device = request.cuda_device
    if not device.startswith("cuda"):
        raise BackendError(f"device {device} was requested")
    return CudaBackend(
        device, request.dtype, request.checkpoint_dtype, request.batch_invariant, request.movable
    )


def _refuse_invariance(request: BackendRequest) -> None:
    if request.batch_invariant:
        raise BackendError("torch's products are not batch-invariant")


def _torch_cuda(request: BackendRequest) -> Backend:
    _refuse_invariance(request)
    device = request.cuda_device
    if not device.startswith("cuda"):
        raise BackendError(f"device {device} was requested")
    if request.device == "auto" and not any(os.path.exists(node) for node in GPU_NODES):
        # This check avoids importing torch, which takes about a second.
        raise BackendError("this machine has no NVIDIA GPU")
    torch_module: Any = _import_torch()
    torch = torch_module.torch
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise BackendError(
            f"torch, built for CUDA {built}, finds no GPU" if built else "this torch is built without CUDA"
        )
    dtype = request.checkpoint_dtype if request.dtype == "auto" else request.dtype
    native = torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)
    if request.dtype == "auto" and dtype == "bfloat16" and not native:
        dtype = "float16"
    backend: Backend = torch_module.TorchBackend(device, dtype, request.threads)
    return backend


def _torch_cpu(request: BackendRequest) -> Backend:
    _refuse_invariance(request)
    torch_module: Any = _import_torch()
    if request.device not in ("auto", "cpu"):
        raise BackendError(f"device {request.device} was requested")
    dtype = request.checkpoint_dtype if request.dtype == "auto" else request.dtype
    if request.dtype == "auto" and dtype == "float16":
        # Few CPUs compute in float16: torch emulates it, several times slower than float32 and less exactly.
        dtype = "float32"
    backend: Backend = torch_module.TorchBackend("cpu", dtype, request.threads)
    return backend


def _cpu(request: BackendRequest) -> Backend:
    if request.device not in ("auto", "cpu"):
        raise BackendError(f"device {request.device} was requested")
    dtype = request.checkpoint_dtype if request.dtype == "auto" else request.dtype
    return CpuBackend(dtype, request.threads, request.cpu_isa, request.packed)


CANDIDATES: tuple[tuple[str, str, Callable[[BackendRequest], Backend]], ...] = (
    ("cuda", "cuda", _cuda),
    ("torch", "cuda", _torch_cuda),
    ("cpu", "cpu", _cpu),
    ("torch", "cpu", _torch_cpu),
)
"""Backend name, kind of device, and a function that makes the backend or raises BackendError; preferred first."""


def select_backend(request: BackendRequest) -> tuple[Backend, str]:
    """Return the first candidate that supports ``request``, and a text with the reasons why the ones before it were not
    chosen. Raises BackendError with all reasons if no candidate does."""
    declined = []
    for name, kind, make in CANDIDATES:
        if request.backend not in ("auto", name):
            declined.append(f"{name} on {kind} declined: backend {request.backend} was requested")
            continue
        if request.only and name not in request.only:
            declined.append(
                f"{name} on {kind} declined: {request.model} runs on {', '.join(request.only)} only"
            )
            continue
        try:
            chosen = make(request)
            _check_quantization(request.quantization, chosen)
        except BackendError as error:
            declined.append(f"{name} on {kind} declined: {error}")
        else:
            details = f" ({chosen.details})" if chosen.details else ""
            choice = f"{name} on {chosen.device} in {chosen.dtype}{details}"
            return chosen, "; ".join((choice, *declined))
    raise BackendError("no backend can run: " + "; ".join(declined))


def _check_quantization(quantization: str | None, backend: Backend) -> None:
    """Raise BackendError unless ``backend`` multiplies weights that are quantised so at load."""
    if quantization is not None and LOAD_SCHEMES[quantization].name not in backend.schemes:
        raise BackendError(f"it does not multiply {quantization} weights in {backend.dtype} here")


def _import_torch() -> object:
    try:
        return importlib.import_module("vllmlite.backends.torch")
    except ModuleNotFoundError as error:
        raise BackendError(not_installed(str(error.name))) from None
    except ImportError as error:
        raise BackendError(f"torch cannot be imported: {error}") from error
