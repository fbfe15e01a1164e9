"""Integer codes as checkpoints pack them: native code and numpy bring them into the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from native import needs_native_cpu
from numpy.typing import NDArray

from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.native import host_extension
from vllmlite.weights.host import HostTensor
from vllmlite.weights.schemes.codes import StoredCodes

SHAPES = {
    "rows": [(1, 1), (3, 5), (16, 16), (17, 33), (40, 256), (5, 257), (33, 700)],
    "words": [(1, 32), (3, 64), (16, 32), (17, 96), (40, 256), (100, 544)],
    "awq": [(8, 1), (8, 3), (24, 17), (128, 256), (136, 300), (264, 33)],
}
CODES = [
    (packing, bits, shape)
    for packing, shapes in SHAPES.items()
    for bits in ((4,) if packing == "awq" else (2, 3, 4, 8))
    for shape in shapes
]


def stored(
    packing: Any, bits: int, shape: tuple[int, int], added: int = 0, order: bool = False
) -> StoredCodes:
    """Random codes, with unused bytes behind each row of the packing ``rows``."""
    draw = np.random.default_rng([bits, *shape])
    rows, columns = shape
    sizes = {
        "rows": (rows, -(-columns * bits // 32) * 4),
        "words": (columns * bits // 32, rows * 4),
        "awq": (columns, rows // 2),
    }
    data = draw.integers(0, 256, sizes[packing], np.uint8)
    tensor = HostTensor("int32", (data.shape[0], data.shape[1] // 4), data.reshape(-1))
    permuted = draw.permutation(columns).astype(np.int32) if order else None
    return StoredCodes(packing, bits, shape, tensor, added, permuted)


@needs_native_cpu
@pytest.mark.parametrize("order", [False, True], ids=["in order", "permuted"])
@pytest.mark.parametrize(("packing", "bits", "shape"), CODES)
def test_native_code_repacks_as_numpy_does(
    packing: str, bits: int, shape: tuple[int, int], order: bool
) -> None:
    backend = CpuBackend(threads=2)
    for to_bits in (4, 8):
        for added in (0, 128 if to_bits == 8 else (1 << to_bits - 1) - (1 << bits - 1)):
            if bits > to_bits:
                continue
            codes = stored(packing, bits, shape, added, order)
            found = backend.repack(codes, to_bits)
            np.testing.assert_array_equal(found, codes.repacked(to_bits))
            assert found.shape == (shape[0], -(-shape[1] * to_bits // 8))


def test_awq_words_hold_eight_rows() -> None:
    """The word 0x76543210 has the codes of rows 0, 2, 4, 6, 1, 3, 5 and 7 from its low end on."""
    word = np.array([[0x76543210]], "<u4")
    codes = StoredCodes("awq", 4, (8, 1), HostTensor("int32", (1, 1), word.view(np.uint8).reshape(-1)))
    assert codes.unpacked()[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_rows_of_as_many_bits_are_not_copied() -> None:
    codes = stored("rows", 4, (5, 33))
    found = codes.in_rows(4)
    assert found is not None and np.shares_memory(found, codes.data.data)
    np.testing.assert_array_equal(found[:, :16], codes.repacked(4)[:, :16])
    assert codes.in_rows(8) is None
    assert stored("rows", 4, (5, 33), order=True).in_rows(4) is None


@needs_native_cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "codes of 2, 3, 4 or 8 bits"),
        ({"to_bits": 2}, "codes of 2, 3, 4 or 8 bits"),
        ({"columns": 64}, "words of whole columns"),
        ({"columns": 0}, "there must be rows and columns"),
        ({"packing": "gemv"}, "not packed as gemv"),
        ({"packing": "awq"}, "words of eight rows"),
        ({"order": [0] * 31}, "one int32 for each column"),
        ({"order": [0] * 31 + [32]}, "must hold columns"),
        ({"order": [0] * 31 + [-1]}, "must hold columns"),
    ],
)
def test_native_code_checks_its_arguments(change: dict[str, Any], message: str) -> None:
    extension = host_extension()
    assert extension is not None
    native, runtime = extension
    values = {
        "packing": "words", "bits": 4, "rows": 3, "columns": 32, "data": np.zeros(48, np.uint8), "order": None,
        "added": 0, "to_bits": 4, **change
    }  # fmt: skip
    arrays: dict[str, NDArray[Any]] = {"data": values["data"]}
    if values["order"] is not None:
        arrays["order"] = np.array(values["order"], np.int32)
    tensors = {name: native.over(array, array.dtype.name, array.shape) for name, array in arrays.items()}
    with pytest.raises(ValueError, match=message):
        runtime.repack(*(values | tensors).values())
