"""The CUDA extension module: its Tensor class on any machine, its kernels on machines with a GPU."""

from __future__ import annotations

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from paged import host_batch

from vllmlite.backends.base import API
from vllmlite.backends.batch import SlotParams, SlotSpec
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.errors import BackendError

_cuda: Any = pytest.importorskip("vllmlite._cuda", reason="vllmlite._cuda is not built")

needs_gpu = pytest.mark.skipif(not _cuda.probe()["devices"], reason=f"no GPU: {_cuda.probe()['reason']}")


def to_device(array: np.ndarray[Any, Any], dtype: str | None = None) -> Any:
    tensor = _cuda.empty(array.shape, dtype or str(array.dtype))
    _cuda.copy(array, tensor)
    return tensor


def to_host(tensor: Any) -> np.ndarray[Any, Any]:
    array = np.empty(tensor.shape, tensor.dtype)
    _cuda.copy(tensor, array)
    return array


# ---- without a GPU


def test_interface_version() -> None:
    assert _cuda.API == API


def test_probe_names_devices_or_the_reason() -> None:
    found = _cuda.probe()
    assert found["runtime_version"] >= (12, 0)
    assert bool(found["devices"]) != bool(found["reason"])
    for device in found["devices"]:
        assert device.keys() == {"index", "name", "compute_capability", "total_bytes", "multiprocessors"}


def test_the_extension_links_neither_the_driver_nor_torch() -> None:
    try:
        out = subprocess.run(
            ["readelf", "-d", _cuda.__file__], check=True, capture_output=True, text=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("readelf is not installed")
    needed = [line for line in out.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "libcuda.so" in line or "torch" in line or "c10" in line]
    assert "RUNPATH" not in out
    assert "RPATH" not in out


def test_a_missing_device_is_a_typed_error() -> None:
    with pytest.raises(_cuda.CudaError, match="cuda"):
        _cuda.empty([4], "float32", device=4096)


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?"])
def test_numpy_arrays_are_shared_not_copied(dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    tensor = _cuda.Tensor.from_dlpack(array)
    assert tensor.shape == (2, 3, 4)
    assert tensor.dtype == array.dtype.name
    assert tensor.device == "cpu"
    assert tensor.nbytes == array.nbytes
    back = np.from_dlpack(tensor)
    assert np.shares_memory(array, back)
    array[1, 2, 3] = 0
    np.testing.assert_array_equal(back, array)


def test_the_memory_outlives_the_producer() -> None:
    tensor = _cuda.Tensor.from_dlpack(np.arange(1000.0))
    back = np.from_dlpack(tensor)
    del tensor
    np.testing.assert_array_equal(back, np.arange(1000.0))


def test_references_are_released() -> None:
    array = np.zeros(8)
    before = sys.getrefcount(array)
    for _ in range(10):
        tensor = _cuda.Tensor.from_dlpack(array)
        tensor.__dlpack__()
        tensor.__dlpack__(max_version=(1, 0))
        del tensor
    assert sys.getrefcount(array) == before


def test_read_only_memory_stays_read_only() -> None:
    array = np.arange(6)
    array.flags.writeable = False
    try:
        tensor = _cuda.Tensor.from_dlpack(array)
    except BufferError:
        pytest.skip("this numpy does not export read-only arrays")
    assert tensor.readonly
    assert not np.from_dlpack(tensor).flags.writeable
    with pytest.raises(BufferError, match="read-only"):
        tensor.__dlpack__()
    with pytest.raises(ValueError, match="read-only"):
        _cuda.copy(np.arange(6), tensor)


def test_torch_tensors_are_shared() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool):
        source = torch.ones(3, 5, dtype=dtype)
        tensor = _cuda.Tensor.from_dlpack(source)
        assert tensor.dtype == str(dtype).removeprefix("torch.")
        back = torch.from_dlpack(tensor)
        assert back.data_ptr() == source.data_ptr()
        assert back.dtype == dtype


def test_scalars_and_empty_tensors_pass() -> None:
    assert _cuda.Tensor.from_dlpack(np.array(3.0)).shape == ()
    empty = _cuda.Tensor.from_dlpack(np.empty((0, 7)))
    assert np.from_dlpack(empty).shape == (0, 7)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.zeros((4, 4))[:, ::2], ValueError, "contiguous.*axis 1.*stride 2"),
        (np.zeros((4, 6)).T, ValueError, "contiguous"),
        (np.zeros(3, "c16"), TypeError, "no Tensor dtype"),
        (np.zeros(3, "u4"), TypeError, "no Tensor dtype"),
        ([1, 2, 3], TypeError, "DLPack, not list"),
    ],
)
def test_unshareable_arrays_are_refused(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _cuda.Tensor.from_dlpack(value)


def test_exports_follow_the_dlpack_protocol() -> None:
    tensor = _cuda.Tensor.from_dlpack(np.zeros(3))
    assert tensor.__dlpack_device__() == (1, 0)
    assert "dltensor_versioned" in repr(tensor.__dlpack__(max_version=(1, 1)))
    assert "dltensor_versioned" not in repr(tensor.__dlpack__(max_version=(0, 8)))
    with pytest.raises(BufferError, match="without a copy"):
        tensor.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="own device"):
        tensor.__dlpack__(dl_device=(2, 0))


@pytest.mark.parametrize(
    ("source", "target", "error", "message"),
    [
        (np.zeros(3), np.zeros(3), ValueError, "neither side is on a CUDA device"),
        (np.zeros(3), np.zeros(3, "f4"), TypeError, "float64.*float32"),
        (np.zeros(3), np.zeros(4), ValueError, r"\[3\].*\[4\]"),
    ],
)
def test_copy_refuses_mismatched_tensors(
    source: object, target: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _cuda.copy(source, target)


# ---- with one


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool"])
def test_a_round_trip_keeps_every_byte(dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 2, (5, 7, 3)).astype(dtype)
    tensor = to_device(array)
    assert tensor.device == "cuda:0"
    np.testing.assert_array_equal(to_host(tensor), array)


@needs_gpu
def test_memory_is_allocated_and_freed() -> None:
    free, total = _cuda.memory()
    assert 0 < free <= total
    tensor = _cuda.empty([256 << 20], "uint8")
    assert _cuda.memory()[0] <= free - (256 << 20)
    del tensor
    assert _cuda.memory()[0] >= free - (32 << 20)


@needs_gpu
def test_too_much_memory_is_a_memory_error_and_the_next_call_works() -> None:
    with pytest.raises(MemoryError, match="cudaMalloc"):
        _cuda.empty([1 << 50], "uint8")
    assert to_host(to_device(np.arange(3))).tolist() == [0, 1, 2]


@needs_gpu
@pytest.mark.parametrize("shape", [[-1], [1 << 62, 4], [1 << 40, 1 << 40, 0]])
def test_impossible_shapes_are_value_errors(shape: list[int]) -> None:
    with pytest.raises(ValueError, match="shape"):
        _cuda.empty(shape, "float32")


@needs_gpu
def test_more_rows_than_the_y_axis_of_a_grid() -> None:
    backend, rows = CudaBackend("cuda", "float32"), 70_000
    spec = KVSpec(1, 1, 16, 16, "float32")
    slots = backend.alloc_slots(SlotSpec(rows, 1, 16, 8, 1))
    for slot in range(rows - 3, rows):
        backend.set_slot(slots, slot, SlotParams(temperature=1e-9, frequency_penalty=1.0))
    batch = backend.upload(host_batch(range(rows), [0] * rows, [1] * rows), slots, spec)
    for first, last in ((0, rows), (rows - 3, rows)):
        part = host_batch(range(first, last), [0] * (last - first), [1] * (last - first))
        batch = backend.upload(part, slots, spec)
        chosen = np.arange(first, last) % 8
        sampled = backend.sample(backend.tensor(np.eye(8, dtype=np.float32)[chosen]), slots, batch)
        backend.accept(sampled.ids, slots, batch)
        assert (backend.to_host(sampled.ids)[:-3] == chosen[:-3]).all()
        assert (backend.to_host(backend.upload(part, slots, spec).token_ids)[:-3] == chosen[:-3]).all()


@needs_gpu
def test_pools_and_slots_beyond_32_bits_are_refused() -> None:
    backend = CudaBackend("cuda", "float16")
    if backend.memory().free < 80 << 30:
        pytest.skip("the GPU has less memory than such a pool takes")
    with pytest.raises(BackendError, match="has pools of up to 8388607 of this size"):
        backend.alloc_kv(KVSpec(1, 8, 16, 16, "float16"), 2**23)
    with pytest.raises(ValueError, match="more than 32 bits count"):
        backend.alloc_slots(SlotSpec(2**16, 2**15, 2**19, 8, 8))


@needs_gpu
def test_results_are_read_in_many_threads() -> None:
    """Each thread reads the contents of its own tensor while other threads allocate and free tensors."""
    backend = CudaBackend("cuda", "float32")
    spec = KVSpec(1, 1, 16, 16, "float32")
    slots = backend.alloc_slots(SlotSpec(8, 1, 16, 1000, 1))
    with ThreadPoolExecutor(8) as pool:
        reads = []
        for step in range(500):
            chosen = (np.arange(8) * 7 + step) % 1000
            batch = backend.upload(host_batch(range(8), [0] * 8, [1] * 8), slots, spec)
            logits = backend.tensor(np.eye(1000, dtype=np.float32)[chosen])
            reads.append((chosen, pool.submit(backend.to_host, backend.sample(logits, slots, batch).ids)))
        for chosen, read in reads:
            assert (read.result() == chosen).all()


@needs_gpu
def test_device_memory_is_shared_with_torch() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    source = torch.arange(12, dtype=torch.bfloat16, device="cuda").reshape(3, 4)
    tensor = _cuda.Tensor.from_dlpack(source)
    assert (tensor.device, tensor.dtype, tensor.shape) == ("cuda:0", "bfloat16", (3, 4))
    back = torch.from_dlpack(tensor)
    assert back.data_ptr() == source.data_ptr()
    _cuda.copy(torch.full_like(source, 7), back)
    assert source.flatten().tolist() == [7] * 12


def test_importing_opens_no_device() -> None:
    """cuBLASLt maps the driver's library when it is loaded, so it must not be loaded before a GPU is used."""
    importlib.import_module("vllmlite._cuda")
    code = (
        "import os, sys, vllmlite; vllmlite.__path__ = eval(sys.argv[1]); import vllmlite._cuda;"
        "print([os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')])"
    )
    package = importlib.import_module("vllmlite")
    opened = subprocess.run(
        [sys.executable, "-c", code, repr(list(package.__path__))], check=True, capture_output=True, text=True
    ).stdout
    assert "/dev/nvidia" not in opened
