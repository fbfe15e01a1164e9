"""Fuzzing of the readers of untrusted files: given damaged files, they may raise only typed errors, write nothing
elsewhere, and use limited memory.

A target has seeds and a check; :func:`mutated` damages an input. ``scripts/fuzz`` runs this for minutes, keeps inputs
that reach new lines, and puts those that fail into ``fuzz_seeds``, which the tests replay.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import math
import random
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from gguf_files import Typed, encode
from paged import stored_data

from vllmlite.backends.base import Backend
from vllmlite.backends.cpu import CpuBackend
from vllmlite.errors import BackendError, ModelError
from vllmlite.hub import BUILT_IN
from vllmlite.hub.tarball import extract
from vllmlite.models import read_spec
from vllmlite.models.families import FAMILIES
from vllmlite.models.gguf import open_gguf
from vllmlite.models.tensors import sources, stored_shapes
from vllmlite.tokenizers.gguf import gguf_tokenizer
from vllmlite.tokenizers.tokenizer import Tokenizer
from vllmlite.weights.gguf import read_gguf
from vllmlite.weights.packing import Packing
from vllmlite.weights.parts import ModelWeights
from vllmlite.weights.safetensors import read_safetensors

KEPT = Path(__file__).parent / "fuzz_seeds"
"""Inputs that failed once, in one directory for each target."""
NUMBERS = [
    0,
    1,
    2,
    7,
    31,
    32,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**48,
    2**63,
    2**64 - 1,
]
TEXTS = ["", "a", "\u2581", "\ud800", "\0", "../x", "/etc/passwd", "NaN", "x" * 300]


@dataclass(frozen=True)
class Target:
    """A reader to fuzz, with inputs like ``seeds``; ``check`` is called with an empty directory and an input."""

    seeds: Callable[[], list[bytes]]
    check: Callable[[Path, bytes], None]
    is_json: bool = False


def _safetensors(directory: Path, content: bytes) -> None:
    (directory / "x").write_bytes(content)
    tensors = read_safetensors(directory / "x")
    assert sum(tensor.data.size for tensor in tensors.values()) <= len(content)


def _gguf(directory: Path, content: bytes) -> None:
    path = directory / "x.gguf"
    path.write_bytes(content)
    found = read_gguf(path)
    assert sum(stored_data(tensor).size for tensor in found.tensors.values()) <= len(content)
    with suppress(ModelError):
        gguf_tokenizer(path)[0].encode("a b")
    spec, backend = read_spec(path), _backend()
    weights = ModelWeights(sources(spec), open_gguf(path, spec), Packing(backend, keep_blocks=True))
    for name, source in weights.sources.items():
        assert weights.floats(name).shape == source.shape
        if len(source.shape) == 2:
            backend.linear_weight(weights.products([name]))


@cache
def _backend() -> Backend:
    """A backend that keeps quantised blocks, if there is one."""
    try:
        return CpuBackend(threads=1, packed=True)
    except BackendError:
        return importlib.import_module("vllmlite.backends.torch").TorchBackend()  # type: ignore[no-any-return]


def _config(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    stored_shapes(read_spec(directory))


def _tokenizer(directory: Path, content: bytes) -> None:
    (directory / "tokenizer.json").write_bytes(content)
    tokenizer = Tokenizer(directory)
    ids = tokenizer.encode("Hello, w\u00f6rld 12\n")
    tokenizer.decode(ids)
    tokenizer.vocabulary(300)


def _tokenizer_config(directory: Path, content: bytes) -> None:
    shutil.copyfile(BUILT_IN / "tokenizer.json", directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_bytes(content)
    assert Tokenizer(directory).has_chat_template in (True, False)


def _tarball(directory: Path, content: bytes) -> None:
    (directory / "x.tar").write_bytes(content)
    (directory / "inner").mkdir()
    try:
        extract(directory / "x.tar", directory / "inner", 1 << 20)
    finally:
        assert {file.name for file in directory.iterdir()} == {"x.tar", "inner"}
        for file in (directory / "inner").rglob("*"):
            assert file.resolve().is_relative_to((directory / "inner").resolve())
            assert file.is_dir() or file.stat().st_size <= 3 << 20


def _safetensors_seeds() -> list[bytes]:
    header = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
              "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}, "__metadata__": {"x": "y"}}  # fmt: skip
    text = json.dumps(header).encode()
    return [len(text).to_bytes(8, "little") + text + bytes(24)]


def _gguf_seeds() -> list[bytes]:
    model: dict[str, Any] = {
        "general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": 32,
        "llama.block_count": 1, "llama.feed_forward_length": 32, "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": [1], "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
        "llama.rope.scaling.original_context_length": 32, "general.alignment": 32, "x.y": Typed(12, 0.5),
    }  # fmt: skip
    gpt2 = {"model": "gpt2", "pre": "qwen2", "tokens": ["a", "b", "ab", "<s>"], "merges": ["a b"],
            "token_type": [1, 1, 4, 3], "bos_token_id": 3, "add_bos_token": True}  # fmt: skip
    pieces = {"model": "llama", "tokens": ["<unk>", "\u2581", "a", "\u2581a", "<0x0A>"], "token_type": [2, 1, 1, 1, 6],
              "scores": [0.0, -1.0, -2.0, -3.0, 0.0], "eos_token_id": 0, "unknown_token_id": 0}  # fmt: skip
    weights: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        "token_embd.weight": ("Q8_0", (4, 32), bytes(4 * 34)), "output_norm.weight": ("F32", (32,), bytes(128)),
        "blk.0.attn_norm.weight": ("F32", (32,), bytes(128)), "blk.0.ffn_norm.weight": ("F32", (32,), bytes(128)),
        "blk.0.attn_q.weight": ("Q4_0", (32, 32), bytes(32 * 18)),
        "blk.0.attn_k.weight": ("F16", (16, 32), bytes(1024)),
        "blk.0.attn_v.weight": ("Q5_1", (16, 32), bytes(16 * 24)),
        "blk.0.attn_output.weight": ("Q4_1", (32, 32), bytes(640)),
        "blk.0.ffn_gate.weight": ("BF16", (32, 32), bytes(2048)), "blk.0.ffn_up.weight": ("Q5_0", (32, 32), bytes(704)),
        "blk.0.ffn_down.weight": ("F32", (32, 32), bytes(4096)),
    }  # fmt: skip
    return [
        encode({**model, **{f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}}, weights)
        for tokenizer in (gpt2, pieces)
    ] + [_family_seed(*family) for family in _FAMILIES]


_FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"expert_count": 2, "expert_used_count": 1}),
    ("qwen2moe", {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 32,
                  "expert_shared_feed_forward_length": 32}),
    ("phi3", {"rope.dimension_count": 16}),
    ("gemma3", {"attention.key_length": 32, "attention.sliding_window": 8}),
    ("falcon", {}),
    ("gpt2", {}),
    ("bloom", {}),
    ("stablelm", {"use_parallel_residual": True}),
]  # fmt: skip


def _family_seed(name: str, values: dict[str, Any]) -> bytes:
    """A model whose weights are all zero."""
    rms = name in ("llama", "qwen2moe", "phi3", "gemma3")
    metadata = {
        "context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 256,
        "attention.head_count": 2, "attention.head_count_kv": 1 if name == "falcon" else 2,
        f"attention.layer_norm_{'rms_' * rms}epsilon": 1e-5, **values,
    }  # fmt: skip
    said = {"general.architecture": name, **{f"{name}.{key}": value for key, value in metadata.items()}}
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        "token_embd.weight": ("Q8_0", (4, 64), bytes(8 * 34))
    }
    if "expert_count" in values:
        inner = values.get("expert_feed_forward_length", 256)
        tensors |= {
            f"blk.0.ffn_{part}_exps.weight": ("Q8_0", (2, *shape), bytes(2 * inner * 2 * 34))
            for part, shape in (("gate", (inner, 64)), ("up", (inner, 64)), ("down", (64, inner)))
        }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.gguf"
        path.write_bytes(encode(said, tensors))
        shapes = stored_shapes(read_spec(path))
    for tensor, shape in shapes.items():
        kind, size = ("Q8_0", 34) if len(shape) == 2 else ("F32", 128)
        tensors.setdefault(tensor, (kind, shape, bytes(math.prod(shape) // 32 * size)))
    return encode(said, tensors)


def _tar_seeds() -> list[bytes]:
    found = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
            for name, kind, link in (("d", tarfile.DIRTYPE, ""), ("d/f", tarfile.REGTYPE, ""),
                                     ("l", tarfile.SYMTYPE, "d/f"), ("n" * 120, tarfile.REGTYPE, "")):  # fmt: skip
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.size = kind, link, 700 if kind == tarfile.REGTYPE else 0
                archive.addfile(info, io.BytesIO(bytes(700)))
        found += [stream.getvalue()[:7000], gzip.compress(stream.getvalue(), mtime=0)]
    return found


def _config_seeds() -> list[bytes]:
    sections: list[dict[str, Any]] = [
        {}, {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"] * 8, "use_sliding_window": True,
             "sliding_window": 8}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"quantization_config": {"quant_method": "vllmlite", "format": "int8", "group_size": 32}},
    ]  # fmt: skip
    base = json.loads((BUILT_IN / "config.json").read_text())
    other: dict[str, Any] = {
        "n_layer": 2, "n_head": 4, "n_embd": 64, "hidden_act": "gelu", "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "num_local_experts": 4, "n_positions": 64, "word_embed_proj_dim": 256,
        "ffn_dim": 64, "rotary_pct": 0.25, "query_pre_attn_scalar": 64, "sliding_window": 16, "alibi": False,
        "shared_expert_intermediate_size": 32, "norm_topk_prob": True, "no_rope_layer_interval": 2, "multi_query": True,
    }  # fmt: skip
    families = [
        {**other, "architectures": [name], "model_type": family.model_type}
        for name, family in FAMILIES.items()
    ]
    return [json.dumps(base | section).encode() for section in [*sections, *families]]


def _tokenizer_seeds() -> list[bytes]:
    base = json.loads((BUILT_IN / "tokenizer.json").read_text())
    vocab = {token: i for i, token in enumerate(list(base["model"]["vocab"])[:260])}
    base["model"]["vocab"] = vocab
    base["model"]["merges"] = [m for m in base["model"]["merges"] if "".join(m) in vocab][:20]
    special = {"s": {"id": "s", "ids": [0], "tokens": ["s"]}}
    single = [{"SpecialToken": {"id": "s", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": special, "single": single}
    replace = {"type": "Replace", "pattern": {"Regex": "[0-9]+"}, "content": "0"}
    return [
        json.dumps(base).encode(),
        json.dumps(base | {"post_processor": template, "normalizer": replace}).encode(),
    ]


TARGETS = {
    "safetensors": Target(_safetensors_seeds, _safetensors),
    "gguf": Target(_gguf_seeds, _gguf),
    "config.json": Target(_config_seeds, _config, is_json=True),
    "tokenizer.json": Target(_tokenizer_seeds, _tokenizer, is_json=True),
    "tokenizer_config.json": Target(
        lambda: [(BUILT_IN / "tokenizer_config.json").read_bytes()], _tokenizer_config, is_json=True
    ),
    "tarball": Target(_tar_seeds, _tarball),
}


def check(target: Target, directory: Path, content: bytes) -> bool:
    """Read an input in ``directory``, which is emptied first, and return whether it was accepted. Raises any error that
    a reader may not raise."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        target.check(directory, content)
    except ModelError as error:
        assert len(str(error)) < 2000, "an error longer than anyone reads"
        return False
    return True


def lines_of(run: Callable[[], object]) -> set[tuple[str, int]]:
    """Call a function and return the lines of vllmlite that it ran."""
    seen: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        if "/vllmlite/" not in name:
            return None
        seen.add((name, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return seen


def mutated(content: bytes, others: list[bytes], rng: random.Random, is_json: bool) -> bytes:
    """``content``, damaged in a few places."""
    if is_json and rng.random() < 0.8:
        with suppress(ValueError, RecursionError):
            return json.dumps(_json_mutated(json.loads(content), rng)).encode("utf-8", "surrogatepass")
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                size = rng.choice([1, 2, 4, 8])
                data[at : at + size] = (rng.choice(NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, "little")
            case 2:
                del data[at : at + rng.choice([1, 4, 8, 100])]
            case 3:
                data[at:at] = data[at : at + rng.choice([1, 8, 100])]
            case 4:
                del data[at:]
            case 5:
                other = rng.choice(others)
                begin = rng.randrange(len(other) + 1)
                data[at : at + 64] = other[begin : begin + 64]
            case 6:
                digits = str(rng.choice(NUMBERS)).encode()
                data[at : at + len(digits)] = digits
            case _:
                if data:
                    data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _json_mutated(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict | list) and value and rng.random() < 0.95:
        key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = _json_mutated(value[key], rng)
        return value
    odd: list[Any] = [
        None,
        True,
        [],
        {},
        [[]],
        -1,
        0.5,
        1e308,
        float("nan"),
        float("inf"),
        -0.0,
        [value],
        {"x": value},
    ]
    return rng.choice([rng.choice(odd), rng.choice(NUMBERS), rng.choice(TEXTS)])
