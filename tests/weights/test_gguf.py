"""GGUF: what is read, the results of models, tokenizers, and what is refused with which message."""

from __future__ import annotations

import hashlib
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from gguf_files import SCALE_OFFSETS, Typed, contents, encode, random_blocks, tokenizer_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from model_runs import first_logits, float32_backend
from native import HAS_NATIVE_CPU, needs_native_cpu
from numpy.typing import NDArray
from paged import stored_data

from vllmlite import LLM, SamplingParams
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.cli import main
from vllmlite.errors import BackendError, ModelError, ParameterError
from vllmlite.hub import BUILT_IN, find_model
from vllmlite.models import load_model, read_spec
from vllmlite.models.gguf import gguf_config, treatment
from vllmlite.models.keys import LLAMA
from vllmlite.tokenizers.gguf import gguf_tokenizer
from vllmlite.tokenizers.gguf_splits import SPLITS
from vllmlite.tokenizers.tokenizer import Tokenizer
from vllmlite.weights.gguf import read_gguf
from vllmlite.weights.gguf_tokens import end_ids
from vllmlite.weights.host import FLOAT_DTYPES, ITEM_SIZE, HostTensor, PackedWeight, dequantized, float_values
from vllmlite.weights.packing import Packing
from vllmlite.weights.schemes.gguf_blocks import BLOCK_SCHEMES, BLOCKS, block_data, to_tiles, type_name
from vllmlite.weights.schemes.gguf_grids import grid
from vllmlite.weights.schemes.tiles import unpack

TYPES_DECODED = {
    "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "MXFP4",
    "TQ1_0", "TQ2_0",
}  # fmt: skip
CODES = [name for name, scheme in BLOCK_SCHEMES.items() if scheme.tiles is not None]
"""Types whose codes products take."""
GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_SCHEMES])
def test_blocks_decode_as_in_the_gguf_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="python3-gguf is not installed")
    data = random_blocks(kind, 40)
    part = BLOCK_SCHEMES[kind].pack((4, 10 * BLOCKS[kind][0]), data.reshape(-1))
    expected = gguf.quants.dequantize(data.reshape(4, -1), gguf.GGMLQuantizationType[kind])
    found = part.scheme.dequantize(part)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    for dtype, digits in (("bfloat16", 8), ("float16", 11)):
        rounded = float_values(dequantized(part, dtype))
        np.testing.assert_allclose(rounded, expected, rtol=2.0**-digits, atol=1e-6)


def test_many_blocks_are_decoded_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    part = random_weight("Q6_K", 33, 1)
    whole = dequantized(part, "float32")
    monkeypatch.setattr("vllmlite.weights.host.CHUNK", 1024)
    assert dequantized(part, "float32").data.tobytes() == whole.data.tobytes()


def random_weight(kind: str, rows: int = 37, blocks: int = 3) -> PackedWeight:
    """A random weight with rows of several blocks, of one group at least."""
    size = blocks * BLOCKS[kind][0]
    return BLOCK_SCHEMES[kind].pack((rows, size), random_blocks(kind, rows * blocks).reshape(-1))


@pytest.mark.parametrize("kind", CODES)
def test_tiles_decode_to_the_values_of_their_blocks(kind: str) -> None:
    part = random_weight(kind)
    made, exact = to_tiles(part), part.scheme.dequantize(part)
    if kind in ("Q8_0", "Q4_0"):
        halves = block_data(part).reshape(-1, BLOCKS[kind][1])[:, :2].copy().view("<f2").astype(np.float32)
        codes, scales, _ = unpack(made)
        np.testing.assert_allclose(scales, halves.reshape(37, 3), rtol=2.0**-8)
        np.testing.assert_array_equal(codes * halves.reshape(37, 3, 1), exact.reshape(37, 3, 32))
    else:
        np.testing.assert_array_equal(made.scheme.dequantize(made), exact)
    arrays = made.parts.values()
    assert made.scheme is BLOCK_SCHEMES[kind].tiles
    assert made.scheme.num_bytes(part.shape) == sum(one.data.nbytes for one in arrays)
    assert all(math.prod(one.shape) * ITEM_SIZE[one.dtype] == one.data.nbytes for one in arrays)


@needs_native_cpu
@pytest.mark.parametrize("kind", CODES)
def test_native_tiles_and_floats_equal_the_references(kind: str) -> None:
    backend, part = CpuBackend(packed=True), random_weight(kind)
    expected = to_tiles(part)
    made = backend._quantized(part)
    found = made.qweight, made.scales, made.sub_scales
    assert made.rows == 37
    for suffix, tensor in zip(("qweight", "scales", "sub_scales"), found, strict=True):
        stored = expected.parts.get(suffix)
        assert (tensor is None) == (stored is None)
        if stored is not None:
            np.testing.assert_array_equal(backend.to_host(tensor), backend.to_host(backend.tensor(stored)))
    for dtype in FLOAT_DTYPES:
        assert backend.dequantize(part, dtype).data.tobytes() == dequantized(part, dtype).data.tobytes()


def of_8_bits(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """x as a product rounds it: 8 bits in groups of 32, with float32 scales."""
    groups = x.reshape(len(x), -1, 32)
    extremes = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    inverse = np.divide(-128, extremes, out=np.zeros_like(extremes), where=extremes != 0)
    codes = np.clip(np.rint(groups * inverse), -128, 127)
    return (codes * (extremes / -128)).reshape(len(x), -1).astype(np.float64)


@needs_native_cpu
@pytest.mark.parametrize("kind", CODES)
def test_products_equal_the_references_and_are_batch_invariant(kind: str) -> None:
    from vllmlite import _cpu

    part = random_weight(kind, rows=53)
    x = np.random.default_rng(1).standard_normal((19, part.shape[1])).astype(np.float32)
    tiles = to_tiles(part)
    expected = of_8_bits(x) @ tiles.scheme.dequantize(tiles).T.astype(np.float64)
    for isa in _cpu.instruction_sets():
        backend = CpuBackend(threads=2, isa=isa, packed=True)
        weight = backend.linear_weight([part])
        together = backend.to_host(backend.linear(backend.tensor(x), weight))
        np.testing.assert_allclose(together, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        alone = [backend.to_host(backend.linear(backend.tensor(row[None]), weight)) for row in x]
        assert together.tobytes() == np.concatenate(alone).tobytes(), isa


@needs_native_cpu
def test_parts_of_several_types_form_one_weight() -> None:
    """q, k and v with the types of llama.cpp's usual mixture."""
    backend = CpuBackend(threads=2, packed=True)
    parts = [random_weight(kind, rows, 768 // BLOCKS[kind][0]) for kind, rows in
             (("Q4_K", 53), ("Q8_0", 16), ("Q6_K", 37), ("Q5_0", 5))]  # fmt: skip
    x = backend.tensor(np.random.default_rng(1).standard_normal((11, 768)).astype(np.float32))
    bias = HostTensor("float32", (111,), np.arange(111, dtype="<f4").view(np.uint8))
    together = backend.to_host(backend.linear(x, backend.linear_weight(parts, [bias])))
    apart = [backend.to_host(backend.linear(x, backend.linear_weight([part]))) for part in parts]
    np.testing.assert_array_equal(together, np.concatenate(apart, axis=1) + np.arange(111, dtype=np.float32))


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_SCHEMES if kind not in CODES])
def test_types_without_a_kernel_are_decoded_on_every_backend(kind: str) -> None:
    part = random_weight(kind, rows=5, blocks=8)
    assert kind in TYPES_DECODED
    for dtype in FLOAT_DTYPES:
        expected = dequantized(part, dtype)
        assert float32_backend().dequantize(part, dtype).data.tobytes() == expected.data.tobytes()
    bad = random_weight(kind, rows=2, blocks=8)
    blocks = block_data(bad).reshape(-1, BLOCKS[kind][1])
    if kind == "MXFP4":
        blocks[-1] = 254, *[0x77] * 16  # 12 times 2 to the 126
    elif kind == "IQ1_M":
        blocks[-1, 48:56] |= 0xF0
    else:
        at = SCALE_OFFSETS.get(kind, (0,))[0]
        blocks[-1, at : at + 2] = 0, 0x7C
    with pytest.raises(ModelError, match="a block's scale is not finite"):
        dequantized(bad, "float32")


def test_codebooks_equal_ggmls() -> None:
    """Compares digests that were made from the gguf package's tables."""
    for name, size, digest in (
        ("IQ2_XXS", 256, "05826b5d3e472a3a"),
        ("IQ2_XS", 512, "06e47aaca60b4dc1"),
        ("IQ2_S", 1024, "e1aa1473412b0552"),
        ("IQ3_XXS", 256, "46e35f5a997efdee"),
        ("IQ3_S", 512, "bd1af4945a1717c6"),
        ("IQ1_S", 2048, "07540ffc1aeaf6ad"),
    ):
        points = grid(name)
        assert len(points) == size, name
        assert hashlib.sha256(points.astype(np.int8).tobytes()).hexdigest()[:16] == digest, name


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01, 0x7FFF])
def test_scales_must_be_finite(kind: str, bits: int) -> None:
    part = random_weight(kind)
    at = 208 if kind == "Q6_K" else 0 if kind in ("Q8_0", "Q4_0", "Q5_0") else 2
    block_data(part).reshape(-1, BLOCKS[kind][1])[-1, at : at + 2] = np.array([bits], "<u2").view(np.uint8)
    refused = pytest.raises(ModelError, match=r"a weight of shape \[37, \d+\]: a block's scale is not finite")
    with refused:
        to_tiles(part)
    with refused:
        dequantized(part, "float32")
    if HAS_NATIVE_CPU:
        backend = CpuBackend(packed=True)
        with refused:
            backend.linear_weight([part])
        with refused:
            backend.dequantize(part, "bfloat16")


@needs_native_cpu
def test_blocks_that_do_not_fit_are_refused() -> None:
    backend = CpuBackend(packed=True)
    part = random_weight("Q4_K")
    unknown = replace(BLOCK_SCHEMES["Q4_K"], name="Q3_K")
    with pytest.raises(BackendError, match="a weight in Q3_K: the cpu backend multiplies Q4_0, "):
        backend.linear_weight([replace(part, scheme=unknown)])
    with pytest.raises(ModelError, match="there are no blocks of type Q3_K"):
        backend.dequantize(replace(part, scheme=unknown), "float32")
    with pytest.raises(ModelError, match="whole blocks of 256"):
        backend.linear_weight([replace(part, shape=(37 * 3, 255))])
    with pytest.raises(ModelError, match="are not uint8"):
        backend.dequantize(replace(part, shape=(38, 768)), "float32")
    made, native = backend._quantized(part), backend._native
    with pytest.raises(ValueError, match="sub_scales must be given"):
        native.QuantizedWeight(
            [native.QuantizedPart("q4_k", made.qweight, made.scales, None, part.shape[0])], 768
        )
    with pytest.raises(ValueError, match="no quantisation scheme q3_k"):
        native.QuantizedPart("q3_k", made.qweight, made.scales, None, part.shape[0])


# ---- Files


def test_a_file_of_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="python3-gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint32("a.number", 7)
    writer.add_int64("a.long", -(2**40))
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.truth", True)
    writer.add_string("a.text", "größer")
    writer.add_array("a.texts", ["x", "", "▁y"])
    writer.add_array("a.floats", [0.5, -1.0])
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((3, 64)).astype(np.float32)
    quantised = gguf.quants.quantize(dense, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("dense", dense)
    writer.add_tensor("quantised", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "x.gguf")
    plain = {key: value for key, value in found.metadata.items() if not isinstance(value, np.ndarray)}
    assert plain == {
        "general.architecture": "llama", "a.number": 7, "a.long": -(2**40), "a.float": 0.5, "a.truth": True,
        "a.text": "größer", "a.texts": ["x", "", "▁y"],
    }  # fmt: skip
    assert found.metadata["a.floats"].tolist() == [0.5, -1.0]
    assert (type_name(found.tensors["dense"]), found.tensors["dense"].shape) == ("F32", (3, 64))
    assert stored_data(found.tensors["dense"]).tobytes() == dense.tobytes()
    assert found.tensors["quantised"].shape == (3, 64)
    assert stored_data(found.tensors["quantised"]).tobytes() == quantised.tobytes()
    assert not stored_data(found.tensors["dense"]).flags.writeable, "a copy, not a view of the file"


GOOD_METADATA: dict[str, Any] = {"general.architecture": "llama", "b": [1, 2], "c": ["x", "y"]}
GOOD_TENSORS = {"t": ("F32", (2, 4), bytes(32)), "u": ("Q8_0", (1, 32), bytes(34))}
GOOD = encode(GOOD_METADATA, GOOD_TENSORS)


def with_tensor(*, kind: str = "F32", shape: tuple[int, ...] = (2, 4), data: bytes = bytes(32)) -> bytes:
    return encode(GOOD_METADATA, {"t": (kind, shape, data)})


def patched(old: bytes, new: bytes) -> bytes:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


MALFORMED = {
    "empty": (b"", "the magic"),
    "another magic": (b"GGML" + GOOD[4:], "expected b'GGUF'"),
    "version 1": (encode(GOOD_METADATA, GOOD_TENSORS, version=1), "version 1; accepted: 2 and 3"),
    "big-endian": (encode({}, {}, version=3 << 24), "big-endian"),
    "too many tensors": (GOOD[:8] + struct.pack("<Q", 2**40) + GOOD[16:], "the number of tensors"),
    "too many keys": (GOOD[:16] + struct.pack("<Q", 2**63) + GOOD[24:], "the number of metadata"),
    "key too long": (GOOD[:24] + struct.pack("<Q", 2**62) + GOOD[32:], "a key: "),
    "key not text": (patched(b"general.architecture", b"general.architectur\xff"), "not UTF-8"),
    "key twice": (patched(b"\x01\0\0\0\0\0\0\0c", b"\x01\0\0\0\0\0\0\0b"), "'b' occurs twice"),
    "unknown type of value": (encode({"a": Typed(0, 0)}, {}).replace(b"a\0\0\0\0", b"a\x0d\0\0\0"), "of type 13"),
    "array of arrays": (patched(b"\x09\0\0\0\x05", b"\x09\0\0\0\x09"), "of type 9"),
    "array too long": (patched(b"\x05\0\0\0\x02\0\0\0\0", b"\x05\0\0\0\x02\0\0\x7f\0"), "metadata 'b'"),
    "texts too many": (patched(b"\x08\0\0\0\x02\0\0\0\0", b"\x08\0\0\0\x02\0\0\x7f\0"), "metadata 'c'"),
    "texts too long": (patched(b"\x01\0\0\0\0\0\0\0y", b"\xff\0\0\0\0\0\0\x7fy"), "middle of a string"),
    "alignment of nothing": (encode({"general.alignment": 0}, {}), "multiples of 8"),
    "alignment of seven": (encode({"general.alignment": 7}, {}), "multiples of 8"),
    "alignment a text": (encode({"general.alignment": "32"}, {}), "multiples of 8"),
    "unknown type of tensor": (with_tensor(kind="NVFP4"), "'t': is in NVFP4; accepted: F32"),
    "no dimensions": (with_tensor(shape=()), "0 dimensions"),
    "five dimensions": (with_tensor(shape=(1,) * 5), "5 dimensions"),
    "an empty dimension": (with_tensor(shape=(0, 4)), "of shape [0, 4]"),
    "huge dimensions": (with_tensor(shape=(2**62, 2**62)), "of shape"),
    "part of a block": (with_tensor(kind="Q8_0", shape=(2, 40), data=bytes(100)), "not whole blocks of 32 in Q8_0"),
    "data past the end": (with_tensor(shape=(3, 4)), "bytes 0 to 48"),
    "tensor twice": (patched(b"\x01\0\0\0\0\0\0\0u", b"\x01\0\0\0\0\0\0\0t"), "tensor 't' occurs twice"),
    "odd offset": (patched(struct.pack("<IQ", 8, 32), struct.pack("<IQ", 8, 31)), "multiple of 32"),
    "overlap": (patched(struct.pack("<IQ", 8, 32), struct.pack("<IQ", 8, 0)), "overlaps"),
    "far offset": (patched(struct.pack("<IQ", 8, 32), struct.pack("<IQ", 8, 2**64 - 32)), "'u': bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case: str, tmp_path: Path) -> None:
    content, says = MALFORMED[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_gguf(path)
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_truncated_gguf_files_are_refused(tmp_path: Path) -> None:
    for size in range(len(GOOD)):
        (tmp_path / f"{size}.gguf").write_bytes(GOOD[:size])
        with pytest.raises(ModelError):
            read_gguf(tmp_path / f"{size}.gguf")
    with pytest.raises(ModelError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    try:
        found = read_gguf(path)
    except ModelError:
        return
    assert sum(stored_data(tensor).size for tensor in found.tensors.values()) <= len(content)


# ---- Models


def converted(source: Path, target: Path, kind_of: Any = lambda name: "F32", **metadata: Any) -> Path:
    found, tensors = contents(source, kind_of)
    target.write_bytes(encode({**found, **metadata}, tensors))
    return target


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_converted_model_equals_its_source(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, tie_word_embeddings=family == "Qwen3")
    path = converted(tmp_path, tmp_path / "x.gguf")
    assert replace(read_spec(path), keys=LLAMA) == read_spec(tmp_path)
    for backend in {float32_backend(), TorchBackend()}:
        assert first_logits(backend, path).tobytes() == first_logits(backend, tmp_path).tobytes()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_every_type_gives_the_logits_of_its_decoded_values(kind: str, tmp_path: Path) -> None:
    """The logits equal those of a file with the decoded values, on every backend, whether quantised weights are kept or
    not."""
    write_checkpoint(tmp_path)
    path = converted(tmp_path, tmp_path / "x.gguf", lambda name: kind)
    stored = read_gguf(path).tensors
    meant = {
        name: (
            "F32",
            one.shape,
            float_values(Packing(float32_backend()).floats(one, "float32")).astype("<f4").tobytes(),
        )
        for name, one in stored.items()
    }
    as_floats = tmp_path / "plain.gguf"
    as_floats.write_bytes(encode(contents(tmp_path)[0], meant))
    expected = first_logits(float32_backend(), as_floats)
    assert first_logits(float32_backend(), path).tobytes() == expected.tobytes()
    np.testing.assert_allclose(first_logits(TorchBackend(), path), expected, atol=1e-4)
    if not HAS_NATIVE_CPU:
        return
    kept = first_logits(CpuBackend("bfloat16", packed=True), path, keep_blocks=True)
    assert np.square(kept - expected).mean() < 0.01 * expected.var()


@pytest.mark.parametrize("kind", ["IQ4_XS", "Q2_K", "IQ1_S"])
def test_a_model_of_decoded_types_equals_its_float_model(kind: str, tmp_path: Path) -> None:
    """With another type that is kept, as in llama.cpp's mixtures; the startup line says how each type is loaded."""
    write_checkpoint(tmp_path, hidden_size=256, intermediate_size=512, head_dim=64)
    metadata, tensors = contents(tmp_path)
    for name, (_, shape, _) in tensors.items():
        if len(shape) == 2:
            is_q6 = name == "token_embd.weight" or "attn_v" in name or "ffn_down" in name
            stored = "Q6_K" if is_q6 else kind
            blocks = random_blocks(stored, math.prod(shape) // 256, seed=len(name))
            for at in SCALE_OFFSETS.get(stored, (0,)):
                blocks[:, at : at + 2] = np.full((len(blocks), 1), 0.01, "<f2").view(np.uint8)
            tensors[name] = stored, shape, blocks.tobytes()
    path, as_floats = tmp_path / "x.gguf", tmp_path / "plain.gguf"
    path.write_bytes(encode(metadata, tensors))
    stored_tensors = read_gguf(path).tensors
    meant = {
        name: (
            "F32",
            one.shape,
            float_values(Packing(float32_backend()).floats(one, "float32")).astype("<f4").tobytes(),
        )
        for name, one in stored_tensors.items()
    }
    as_floats.write_bytes(encode(metadata, meant))
    for backend in {float32_backend(), TorchBackend()}:
        np.testing.assert_array_equal(first_logits(backend, path), first_logits(backend, as_floats))
        assert re.search(
            rf"\d+ {kind} dequantised to float32", treatment(path, read_spec(path), Packing(backend))
        )
    if HAS_NATIVE_CPU:
        packed = CpuBackend("bfloat16", packed=True)
        line = treatment(path, read_spec(path), Packing(packed, keep_blocks=True))
        # What is multiplied together with floats, as one matrix, is dequantised too: v with q and k.
        assert re.search(rf"\d+ {kind} dequantised to bfloat16", line) and "3 Q6_K kept" in line
        assert "4 Q6_K dequantised to bfloat16" in line
        found, expected = (
            first_logits(packed, path, keep_blocks=True),
            first_logits(float32_backend(), as_floats),
        )
        assert np.square(found - expected).mean() < 0.01 * expected.var()
        assert f"{kind} quantised to int8" in treatment(path, read_spec(path), Packing(packed, "int8"))
        assert np.isfinite(first_logits(packed, path, quantization="int8")).all()


@needs_native_cpu
def test_weights_of_several_types_work_together(tmp_path: Path) -> None:
    """q, k and v form one product: if their types differ, all are decoded to floats."""
    write_checkpoint(tmp_path)
    kinds = {"attn_q": "Q8_0", "attn_k": "F16", "attn_v": "Q4_0", "ffn_gate": "Q4_0", "ffn_up": "Q4_0"}
    path = converted(
        tmp_path,
        tmp_path / "x.gguf",
        lambda name: next((k for part, k in kinds.items() if part in name), "F32"),
    )
    exact, kept = (
        first_logits(CpuBackend(), path),
        first_logits(CpuBackend("bfloat16", packed=True), path, keep_blocks=True),
    )
    assert np.square(kept - exact).mean() < 0.01 * exact.var()


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built-in model as GGUF files of several types."""
    base = tmp_path_factory.mktemp("built-in")
    tokenizer = tokenizer_metadata(BUILT_IN, "gpt-2")
    return {
        kind: converted(BUILT_IN, base / f"{kind}.gguf", lambda name, kind=kind: kind, **tokenizer)
        for kind in ("BF16", "Q8_0", "Q4_0")
    }


def texts(path: Path | None, **options: Any) -> list[str]:
    llm = LLM(None if path is None else str(path), max_model_len=128, **options)
    return [o.outputs[0].text for o in llm.generate(["Debian is", "The kernel"], GREEDY, use_tqdm=False)]


def test_the_built_in_model_writes_the_same_from_a_gguf_file(built_in: dict[str, Path]) -> None:
    for dtype in ("float32", "auto"):
        assert texts(built_in["BF16"], dtype=dtype) == texts(None, dtype=dtype)


@needs_native_cpu
@pytest.mark.parametrize(("kind", "ours"), [("Q8_0", "int8"), ("Q4_0", "int4")])
def test_weights_stay_quantised_unless_a_dtype_is_given(
    built_in: dict[str, Path], kind: str, ours: str
) -> None:
    llm = LLM(str(built_in[kind]), max_model_len=128)
    assert f"57 {kind} kept as {ours} with scales rounded to bfloat16" in llm.llm_engine.backend_choice
    llm = LLM(str(built_in[kind]), max_model_len=128, dtype="bfloat16")
    assert f"57 {kind} dequantised to bfloat16" in llm.llm_engine.backend_choice
    other = "int4" if ours == "int8" else "int8"
    llm = LLM(str(built_in[kind]), max_model_len=128, quantization=other)
    assert f"57 {kind} quantised to {other}" in llm.llm_engine.backend_choice
    assert texts(built_in[kind], quantization=ours) == texts(built_in[kind])


def test_rope_factors_are_read_as_llama_3_scaling(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    write_checkpoint(tmp_path, rope_parameters=rope, head_dim=64, max_position_embeddings=131072)
    metadata, tensors = contents(tmp_path)
    divisors = []
    for i in range(32):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 64)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / 32 + smooth))
    path = tmp_path / "x.gguf"
    data = np.array(divisors, "<f4")
    path.write_bytes(encode(metadata, {**tensors, "rope_freqs.weight": ("F32", (32,), data.tobytes())}))
    assert replace(read_spec(path), keys=LLAMA) == read_spec(tmp_path)
    load_model(float32_backend(), path, max_model_len=64, block_size=16)
    data[20] *= 1.01
    path.write_bytes(encode(metadata, {**tensors, "rope_freqs.weight": ("F32", (32,), data.tobytes())}))
    with pytest.raises(ModelError, match="not Llama 3's"):
        read_spec(path)


def test_scaled_rope_contexts_are_read(tmp_path: Path) -> None:
    for rope in ({"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0,
                                                          "original_max_position_embeddings": 64}):  # fmt: skip
        write_checkpoint(tmp_path, rope_parameters=rope | {"rope_theta": 10000.0})
        found = {"llama.rope.scaling.type": rope["rope_type"], "llama.rope.scaling.factor": 4.0}
        if rope["rope_type"] == "yarn":
            found["llama.rope.scaling.original_context_length"] = 64
        assert (
            read_spec(converted(tmp_path, tmp_path / "x.gguf", **found)).layers == read_spec(tmp_path).layers
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "mamba"}, r"general\.architecture='mamba'; accepted: llama"),
        ({"split.count": 3}, r"one of 3 files; expected a name like X-00001-of-00003\.gguf"),
        (
            {"llama.expert_count": 8},
            r"expert_count=8; accepted: the number of experts in blk\.0\.ffn_gate_exps",
        ),
        ({"llama.block_count": "two"}, r"llama\.block_count='two'; accepted: an integer"),
        ({"llama.attention.head_count": [4, 2, 4]}, "the same value for every layer"),
        ({"llama.rope.dimension_count": 8}, r"dimension_count=8; accepted: 16"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "none, linear or yarn"),
        ({"llama.feed_forward_length": 95}, r"ffn_gate\.weight.*expected \[95, 64\]; found \[96, 64\]"),
        ({"llama.block_count": 4}, r"missing from the file: blk\.3\."),
        ({"llama.block_count": 2}, r"unexpected tensors: blk\.2\."),
    ],
)
def test_unsupported_gguf_models_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = converted(tmp_path, tmp_path / "x.gguf", **changes)
    with pytest.raises(ModelError, match=says) as caught:
        load_model(float32_backend(), path, max_model_len=64, block_size=16)
    assert str(path) in str(caught.value)


def test_a_list_of_equal_per_layer_values_is_read_as_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = converted(tmp_path, tmp_path / "x.gguf", **{"llama.attention.head_count_kv": [2, 2, 2]})
    assert gguf_config(path)["num_key_value_heads"] == 2


def test_a_llama_with_a_window_is_read_as_mistral(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    spec = read_spec(converted(tmp_path, tmp_path / "x.gguf", **{"llama.attention.sliding_window": 8}))
    assert spec.architecture == "MistralForCausalLM"


def test_the_command_line(
    built_in: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(built_in["BF16"])
    assert (
        main(["generate", "--model", path, "--temperature", "0", "--max-tokens", "8", "-v", "Debian is"]) == 0
    )
    out, err = capsys.readouterr()
    assert out.strip() and "GGUF matrices: 57 BF16 in bfloat16" in err
    assert main(["generate", "--model", path, "--load-format", "pt", "x"]) == 1
    assert "is a GGUF file: auto, gguf or dummy" in capsys.readouterr().err
    assert main(["generate", "--model", str(BUILT_IN), "--load-format", "gguf", "x"]) == 1
    assert "is a directory: auto, safetensors, pt or dummy" in capsys.readouterr().err
    with pytest.raises(ParameterError, match="is a file"):
        find_model(path, revision="main")
    assert main(["quantize", "--model", path, "--quantization", "int8", "--output", str(tmp_path / "q")]) == 1
    assert "GGUF" in capsys.readouterr().err


def test_a_directory_of_one_file(built_in: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "x.gguf").symlink_to(built_in["BF16"])
    assert find_model(str(tmp_path)) == tmp_path / "x.gguf"
    (tmp_path / "y.gguf").symlink_to(built_in["BF16"])
    with pytest.raises(ModelError, match=r"several GGUF files; name one: x\.gguf, y\.gguf"):
        find_model(str(tmp_path))


def in_parts(source: Path, base: Path, count: int) -> list[Path]:
    """The checkpoint of directory ``source`` as a model of several files."""
    metadata, tensors = contents(source)
    paths = [base / f"x-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
    for number, path in enumerate(paths):
        split = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
        some = dict(list(tensors.items())[number::count])
        path.write_bytes(encode({**(metadata if number == 0 else {}), **split}, some))
    return paths


def test_a_model_in_parts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source")
    paths = in_parts(tmp_path / "source", tmp_path, 3)
    assert find_model(str(tmp_path)) == paths[0]
    expected = first_logits(float32_backend(), tmp_path / "source")
    for path in paths:
        assert first_logits(float32_backend(), path).tobytes() == expected.tobytes()
    content = paths[2].read_bytes()
    paths[2].unlink()
    with pytest.raises(ModelError, match=r"one of 3 files, of which 1 are missing: x-00003-of-00003\.gguf"):
        read_gguf(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(ModelError, match=r"x-00003.*split.no, split.count=\(1, 3\); expected \(2, 3\)"):
        read_gguf(paths[0])
    split = {"split.no": 2, "split.count": 3}
    paths[2].write_bytes(encode(split, {}))
    with pytest.raises(ModelError, match="tensors in all files; expected"):
        read_gguf(paths[0])
    paths[2].write_bytes(encode(split, {"token_embd.weight": ("F32", (1, 4), bytes(16))}))
    with pytest.raises(ModelError, match=r"'token_embd\.weight' is in another file, too"):
        read_gguf(paths[0])
    paths[2].write_bytes(content[:100])
    with pytest.raises(ModelError, match="x-00003-of-00003"):
        read_gguf(paths[0])


def test_random_weights_need_only_the_metadata(built_in: dict[str, Path]) -> None:
    assert texts(built_in["BF16"], load_format="dummy") != texts(built_in["BF16"])


# ---- Tokenizers

TEXTS = [
    "Hello, world! It's 12345 o'clock.", "  leading, trailing  \n\n\tand\r\nlines", "größer 日本語 🙂 x=y+z",
    "<|im_start|>user\nhi<|im_end|>", "", "1234567 89", "don't DON'T we'll",
]  # fmt: skip


def test_the_built_in_tokenizer(built_in: dict[str, Path]) -> None:
    found, expected = Tokenizer(built_in["BF16"]), Tokenizer(BUILT_IN)
    for text in TEXTS:
        assert found.encode(text) == expected.encode(text)
        for skip in (True, False):
            ids = expected.encode(text)
            assert found.decode(ids, skip) == expected.decode(ids, skip)
    assert found.eos_token_id == expected.eos_token_id and found.vocab_size == expected.vocab_size
    messages = [{"role": "user", "content": "x"}]
    assert found.apply_chat_template(messages) == expected.apply_chat_template(messages)
    assert found.vocabulary(found.vocab_size) == expected.vocabulary(found.vocab_size)


def tokenizer_file(path: Path, **metadata: Any) -> Path:
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    path.write_bytes(encode({"general.architecture": "llama", **keys}, {}))
    return path


def pieces(path: Path, text: str) -> list[str]:
    return [piece for piece, _ in gguf_tokenizer(path)[0].pre_tokenizer.pre_tokenize_str(text)]


def test_every_way_to_cut_text(tmp_path: Path) -> None:
    alphabet = [chr(256 + i) for i in range(4)]
    for pre in SPLITS:
        path = tokenizer_file(tmp_path / f"{pre}.gguf", model="gpt2", pre=pre, tokens=alphabet)
        for text in TEXTS:
            assert "".join(pieces(path, text)).count("Ġ") == text.count(" ")
    numbers = {
        pre: pieces(tmp_path / f"{pre}.gguf", "x 12345") for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")
    }
    assert numbers["gpt-2"] == ["x", "Ġ12345"]
    assert numbers["smollm"] == ["x", "Ġ", *"12345"]
    assert numbers["qwen2"] == ["x", "Ġ", *"12345"]
    assert numbers["llama-bpe"] == ["x", "Ġ", "123", "45"]


CHAT_TOKENS = [*"abc", "<|im_end|>", "<|endoftext|>", "<|fim_prefix|>", "</s>", "<|end|>"]


def test_tokens_known_by_name_end_a_text_whatever_their_type(tmp_path: Path) -> None:
    """The tokens have the type of ordinary text here, as converters often write it."""
    path = tokenizer_file(
        tmp_path / "x.gguf", model="gpt2", pre="gpt-2", tokens=CHAT_TOKENS, token_type=[1, 1, 1, 1, 4, 4, 1, 4],
        eos_token_id=0,
    )  # fmt: skip
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("a<|im_end|>b<|endoftext|>") == [0, 3, 1, 4]
    assert tokenizer.decode([0, 3, 1, 4, 5, 6, 2, 7]) == "ab</s>c"
    assert end_ids(read_gguf(path)) == [0, 3, 4, 7]


def test_an_end_of_message_token_does_not_end_a_text(tmp_path: Path) -> None:
    """gpt-oss continues after ``<|end|>``, which its parsers look for; ``</s>`` ends a text if its type says so."""
    for extra, ends in ((["<|return|>", "<|call|>"], [6, 8, 9]), (["<|return|>", "x"], [6, 7, 8])):
        path = tokenizer_file(
            tmp_path / f"{extra[1]}.gguf", model="gpt2", pre="gpt-4o", tokens=[*CHAT_TOKENS[:3], "d", "e", "f",
            "</s>", "<|end|>", *extra], token_type=[1, 1, 1, 1, 1, 1, 3, 3, 3, 3 if extra[1] != "x" else 1],
        )  # fmt: skip
        assert end_ids(read_gguf(path)) == ends
        assert Tokenizer(path).decode([0, 7]) == ("a<|end|>" if 7 not in ends else "a")


def by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """A slow SentencePiece encoding: join the neighbours whose union has the best score, the first among equals."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        _, at = min(pairs)
        parts[at : at + 2] = ["".join(parts[at : at + 2])]


LETTERS = ["▁", "a", "b", "c"]
WORDS = ["ab", "▁a", "abc", "bc", "▁ab", "▁abc", "ca", "aa", "▁b", "cab", "▁▁"]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = [*SPECIAL, *BYTES, *WORDS, *LETTERS]
    return tokenizer_file(
        tmp_path_factory.mktemp("sentencepiece") / "x.gguf",
        model="llama",
        tokens=tokens,
        scores=[0.0] * 259 + [-float(i) for i in range(len(WORDS) + len(LETTERS))],
        token_type=[2, 3, 3, *[6] * 256, *[1] * (len(WORDS) + len(LETTERS))],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )


@given(st.text(alphabet="abc ", max_size=30))
@settings(max_examples=100, deadline=None)
def test_sentencepiece_s_merges(sentencepiece: Path, text: str) -> None:
    made, _ = gguf_tokenizer(sentencepiece)
    scores = {word: -float(i) for i, word in enumerate([*WORDS, *LETTERS])}
    found = made.encode(text)
    assert found.tokens == ["<s>", *(by_scores(text, scores) if text else [])]
    assert made.decode(found.ids) == text


def test_sentencepiece_s_bytes_and_ends(sentencepiece: Path, tmp_path: Path) -> None:
    made, config = gguf_tokenizer(sentencepiece)
    assert made.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert made.decode(made.encode("é a").ids) == "é a"
    assert config["bos_token"] == "<s>" and config["eos_token"] == "</s>"
    metadata = {
        key.removeprefix("tokenizer.ggml."): value for key, value in read_gguf(sentencepiece).metadata.items()
    }
    del metadata["general.architecture"]
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()
    }
    ends = {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}
    made, _ = gguf_tokenizer(tokenizer_file(tmp_path / "y.gguf", **metadata, **ends))
    assert made.encode("ab").tokens == ["ab", "</s>"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "rwkv"}, r"tokenizer\.ggml\.model='rwkv'; accepted: gpt2, llama; .*--tokenizer"),
        ({"pre": "unheard-of"}, r"tokenizer\.ggml\.pre='unheard-of'.*--tokenizer"),
        ({"tokens": ["a", "a"]}, "a token twice"),
        ({"tokens": "a"}, "expected list; found 'a'"),
        ({"token_type": [1]}, "1 types for 3 tokens"),
        ({"merges": ["a c"]}, "'a c' does not consist of tokens"),
        ({"merges": ["ab"]}, "'ab' does not consist of tokens"),
        ({"add_bos_token": True}, "there is no bos token"),
        ({"model": "llama", "scores": [0.0]}, "1 scores of 3 tokens"),
    ],
)
def test_unsupported_tokenizers_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]} | changes
    with pytest.raises(ModelError, match=says):
        Tokenizer(tokenizer_file(tmp_path / "x.gguf", **metadata))


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = converted(tmp_path, tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.model"):
        Tokenizer(path)
    (output,) = LLM(str(path), skip_tokenizer_init=True).generate(
        [{"prompt_token_ids": [1, 2, 3]}], GREEDY, use_tqdm=False
    )
    assert len(output.outputs[0].token_ids) == 16


@needs_native_cpu
def test_neither_torch_nor_transformers_is_needed(built_in: dict[str, Path]) -> None:
    code = (
        "import sys; from vllmlite import LLM; LLM(sys.argv[1], backend='cpu', max_model_len=64)\n"
        "assert not {'torch', 'transformers', 'gguf'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(built_in["Q8_0"])], check=True, cwd=Path(__file__).parents[2]
    )
