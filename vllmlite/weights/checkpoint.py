"""Read the weights of a model directory, and check that they are exactly those that the model needs."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vllmlite.errors import ModelError, ParameterError
from vllmlite.weights.host import (
    FLOAT_DTYPES,
    HostTensor,
    HostWeight,
    PackedWeight,
    Part,
    Scheme,
    float_tensor,
    float_values,
)
from vllmlite.weights.json_object import read_object
from vllmlite.weights.not_checkpoints import quantization_of, what_directory_is
from vllmlite.weights.pt import read_pt
from vllmlite.weights.safetensors import read_safetensors
from vllmlite.weights.schemes.float8 import Float8Scheme
from vllmlite.weights.schemes.grouped import QWEIGHT, SCALES, GroupedScheme, IntegerScheme
from vllmlite.weights.schemes.w8a8 import W8A8Scheme

LOAD_FORMATS = ("auto", "safetensors", "pt", "gguf", "dummy")

_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Tensors that may be stored but are not needed."""
_CACHE_SCALE = re.compile(r"\.([kvq]|kv)_(scale|zero_point)$|\.([kvq]_proj\.|prob_)output_scale$")
"""Tensors that may be stored for 8-bit key/value caches and attention."""
_DUMMY_PERIOD = (1 << 20) + 7


@dataclass(frozen=True, slots=True)
class _Format:
    """A file format of weights, stored as a single file or as several with an index."""

    name: str
    single: str
    index: str
    suffix: str
    read: Callable[[Path], dict[str, HostTensor]]


_FORMATS = (
    _Format(
        "safetensors", "model.safetensors", "model.safetensors.index.json", ".safetensors", read_safetensors
    ),
    _Format("pt", "pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", read_pt),
    _Format("pt", "model.pt", "model.pt.index.json", ".pt", read_pt),
)
"""Formats in the order in which ``auto`` tries them."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model, by their names in the checkpoint."""

    tensor: Callable[[str], HostWeight]
    """Function that returns a tensor as it is stored, by name."""
    shapes: Mapping[str, tuple[int, ...]]
    schemes: Mapping[str, Scheme]
    """The scheme of each quantised weight."""
    cache_scales: Mapping[str, HostTensor] = field(default_factory=dict)
    """Tensors for 8-bit key/value caches."""
    generated: bool = False
    """Whether the tensors are not stored in any file, but generated each time they are read."""


def open_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    load_format: str = "auto",
    seed: int = 0,
    schemes: Mapping[str, Scheme] | None = None,
    *,
    prefix: str = "",
    renames: Sequence[tuple[str, str]] = (),
    unread: str = "",
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight"),
) -> Weights:
    """Open the weights named in ``shapes``, after checking that directory ``path`` holds exactly these.

    Each must have the given shape and a float dtype, or the parts of its scheme in ``schemes``. Raises ModelError with
    the file, the tensor, what was expected and what was found.

    ``prefix``: prefix of the base model's names, whose first word a checkpoint may omit. ``renames``: regular
    expressions of stored names with their replacements. ``unread``: regular expression of tensors that may be present
    but are not needed. ``tied``: names of an output layer that may be present though ``shapes`` lacks it, and of the
    embedding it is tied to; if their values differ, it becomes one of the weights.
    ``load_format`` ``dummy`` reads no file: norms are one, all other weights are random numbers drawn from ``seed``,
    packed where ``schemes`` has a scheme of integers or of 8-bit floats, else floats."""
    if load_format not in LOAD_FORMATS:
        raise ParameterError("load_format", load_format, ", ".join(LOAD_FORMATS))
    if load_format == "dummy":
        packed: dict[str, GroupedScheme | Float8Scheme | W8A8Scheme] = {}
        for name, scheme in (schemes or {}).items():
            if isinstance(scheme, Float8Scheme | W8A8Scheme):
                packed[name] = scheme
            elif isinstance(scheme, IntegerScheme) and scheme.grouped is not None:
                packed[name] = scheme.grouped
        return Weights(
            lambda name: _dummy(name, shapes[name], seed, packed.get(name)), shapes, packed, generated=True
        )
    if path.is_file():
        raise ParameterError("load_format", load_format, f"{path} is a GGUF file: auto, gguf or dummy")
    if load_format == "gguf":
        raise ParameterError(
            "load_format", load_format, f"{path} is a directory: auto, safetensors, pt or dummy"
        )
    tensors = _renamed(_read(path, load_format), prefix, renames, tied[0])
    # Some checkpoints store weights as floats that their configuration calls quantised; these are used as they are.
    schemes = {
        name: scheme
        for name, scheme in (schemes or {}).items()
        if name not in tensors or tensors[name].dtype not in FLOAT_DTYPES
    }
    head, table = tied
    if head in tensors and head not in shapes:
        if not _same(tensors[head], tensors.setdefault(table, tensors[head])):
            shapes = {**shapes, head: shapes[table]}
        else:
            del tensors[head]
    expected = _expected(path, shapes, schemes)
    scales = {name: tensors[name] for name in tensors if name not in expected and _CACHE_SCALE.search(name)}
    missing = [name for name, part in expected.items() if name not in tensors and not part.optional]
    unused = [name for name in tensors if name not in expected.keys() | scales and not _COMPUTED.search(name)]
    if unread:
        unused = [name for name in unused if not re.search(unread, name)]
    unused = [name for name in unused if not _is_zero_bias(name, tensors[name], schemes)]
    stored = quantization_of(unused)
    if stored is not None:
        raise ModelError(f"{path}: its weights are stored as {stored}, but its configuration does not say so")
    if missing:
        raise ModelError(f"{path}: tensors missing from the checkpoint: {listed(missing)}")
    if unused:
        raise ModelError(f"{path}: unexpected tensors: {listed(unused)}")
    for name, part in expected.items():
        if name in tensors and not part.accepts(tensors[name]):
            found = tensors[name]
            raise ModelError(
                f"{path}: tensor {name!r}: expected {list(part.shape)} of {', '.join(part.dtypes)}; "
                f"found {list(found.shape)} of {found.dtype}"
            )

    def tensor(name: str) -> HostWeight:
        if name not in schemes:
            return tensors[name]
        scheme, shape = schemes[name], shapes[name]
        names = {suffix: part_name(name, suffix) for suffix in scheme.parts(shape)}
        stored = {suffix: tensors[part] for suffix, part in names.items() if part in tensors}
        return PackedWeight(scheme, shape, stored)

    return Weights(tensor, shapes, schemes, scales)


def part_name(name: str, suffix: str) -> str:
    """Return the name under which a checkpoint stores one part of the quantised weight ``name``."""
    return f"{name.removesuffix('weight')}{suffix}"


def _expected(
    path: Path, shapes: Mapping[str, tuple[int, ...]], schemes: Mapping[str, Scheme]
) -> dict[str, Part]:
    """Return the expected shape and dtype of every stored tensor, by name."""
    expected: dict[str, Part] = {}
    for name, shape in shapes.items():
        if name not in schemes:
            expected[name] = Part(shape, FLOAT_DTYPES[0], FLOAT_DTYPES[1:])
            continue
        try:
            parts = schemes[name].parts(shape)
        except ModelError as error:
            raise ModelError(f"{path}: tensor {name!r}: {error}") from error
        for suffix, part in parts.items():
            expected[part_name(name, suffix)] = part
    return expected


def _is_zero_bias(name: str, tensor: HostTensor, schemes: Mapping[str, Scheme]) -> bool:
    """Return whether ``name`` is a bias of zeros beside a quantised weight; AutoGPTQ stores them for models without."""
    weight = f"{name.removesuffix('bias')}weight"
    if not name.endswith(".bias") or weight not in schemes or tensor.dtype not in FLOAT_DTYPES:
        return False
    return not float_values(tensor).any()


def _read(path: Path, load_format: str) -> dict[str, HostTensor]:
    """Return all tensors of the directory, from its single file or else from its shards."""
    for form in _FORMATS:
        if load_format not in ("auto", form.name):
            continue
        if (path / form.single).exists():
            return form.read(path / form.single)
        if (path / form.index).exists():
            return _read_shards(path, form)
        if shards := _numbered_shards(path, form):
            return _joined(shards, form)
    names = [
        name for form in _FORMATS if load_format in ("auto", form.name) for name in (form.single, form.index)
    ]
    raise ModelError(f"{path}: {what_directory_is(path) or 'holds none of ' + ', '.join(names)}")


def read_tensors(path: Path) -> dict[str, HostTensor]:
    """Return all tensors in the safetensors or PyTorch files of the directory ``path``, whatever they are. Raises
    ModelError."""
    return _read(path, "auto")


def stored_names(path: Path) -> Set[str] | None:
    """Return the names of the tensors in the safetensors files of the directory ``path``.

    None if they cannot be read: :func:`open_weights` says why, or reads another format."""
    try:
        return _read(path, "safetensors").keys()
    except ModelError:
        return None


def _numbered_shards(path: Path, form: _Format) -> list[Path]:
    """Return the shards of a directory without an index, in order. Raises ModelError if some are missing."""
    stem = form.single.removesuffix(form.suffix)
    found: dict[int, list[Path]] = {}
    for file in sorted(path.glob(f"{stem}-*-of-*{form.suffix}")):
        if match := re.fullmatch(
            rf"{re.escape(stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(form.suffix)}", file.name
        ):
            found.setdefault(int(match[2]), []).append(file)
    if not found:
        return []
    if len(found) > 1:
        raise ModelError(f"{path}: holds shards of several models, but no {form.index}")
    ((count, files),) = found.items()
    expected = [f"{stem}-{number:05}-of-{count:05}{form.suffix}" for number in range(1, count + 1)]
    missing = [name for name in expected if not (path / name).exists()]
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} of {count} shards missing, as is {form.index}: {listed(missing)}"
        )
    return files


def _joined(files: list[Path], form: _Format) -> dict[str, HostTensor]:
    """Return all tensors of shards without an index. Raises ModelError if a name occurs twice."""
    tensors: dict[str, HostTensor] = {}
    for file in files:
        shard = form.read(file)
        for name in shard:
            if name in tensors:
                raise ModelError(
                    f"{file}: tensor {name!r}: is in another shard, too, and there is no {form.index}"
                )
        tensors |= shard
    return tensors


def _read_shards(path: Path, form: _Format) -> dict[str, HostTensor]:
    weight_map = _weight_map(path / form.index, form.suffix)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (path / file).exists()]
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} of {len(files)} files missing that {form.index} names: {listed(missing)}"
        )
    tensors: dict[str, HostTensor] = {}
    elsewhere: list[tuple[str, str, HostTensor]] = []
    for file in files:
        for name, tensor in form.read(path / file).items():
            if weight_map.get(name) == file:
                tensors[name] = tensor
            else:
                elsewhere.append((file, name, tensor))
    for file, name, tensor in elsewhere:
        if name not in tensors:
            raise ModelError(
                f"{path / file}: tensor {name!r}: expected in {weight_map.get(name)} by {form.index}; found here"
            )
        if not _same(tensor, tensors[name]):
            raise ModelError(f"{path / file}: tensor {name!r}: differs from the one in {weight_map[name]}")
    for name, file in weight_map.items():
        if name not in tensors:
            raise ModelError(f"{path / file}: tensor {name!r}: expected by {form.index}; found none")
    return tensors


def _weight_map(index: Path, suffix: str) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: expected an object with weight_map, an object of file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+" + re.escape(suffix), file):
            raise ModelError(
                f"{index}: tensor {name!r}: expected a *{suffix} file beside the index; found {file!r}"
            )
    return weight_map


def _renamed(
    tensors: dict[str, HostTensor], prefix: str, renames: Sequence[tuple[str, str]], head: str
) -> dict[str, HostTensor]:
    """Return the tensors under the model's names.

    If no name begins with the first word of ``prefix``, it is prepended to all names but the output layer's."""

    def rename(name: str) -> str:
        for pattern, replacement in renames:
            if re.search(pattern, name):
                return re.sub(pattern, replacement, name)
        return name

    tensors = {rename(name): tensor for name, tensor in tensors.items()}
    outer = prefix[: prefix.find(".") + 1]
    if not outer or any(name.startswith(outer) for name in tensors):
        return tensors
    return {name if name == head else outer + name: tensor for name, tensor in tensors.items()}


def _same(one: HostTensor, other: HostTensor) -> bool:
    """Return whether two tensors are equal bit by bit."""
    return one.shape == other.shape and one.dtype == other.dtype and np.array_equal(one.data, other.data)


def _dummy(
    name: str, shape: tuple[int, ...], seed: int, scheme: GroupedScheme | Float8Scheme | W8A8Scheme | None
) -> HostWeight:
    """Return ones for a norm, else random numbers of deviation 0.02, repeated with a period that divides no row: normal
    ones as floats, or uniform codes packed in ``scheme``."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if scheme is None:
        if re.search(r"norm|\bln_", name):
            values = np.ones(shape, "<f4")
        else:
            size = math.prod(shape)
            block = generator.standard_normal(min(size, _DUMMY_PERIOD), np.float32) * np.float32(0.02)
            values = np.resize(block, size).astype("<f4", copy=False)
        return HostTensor("float32", shape, values.reshape(-1).view(np.uint8))
    if isinstance(scheme, Float8Scheme | W8A8Scheme):
        return _dummy_bytes(shape, scheme, generator)
    scale = float_tensor(np.full(1, 0.02 * 12**0.5 / 2**scheme.bits, np.float32), "float16")
    parts = {}
    for suffix, part in scheme.parts(shape).items():
        if suffix == QWEIGHT:
            block = generator.integers(0, 256, min(part.num_bytes, _DUMMY_PERIOD), np.uint8)
            data = np.resize(block, part.num_bytes)
        elif suffix == SCALES:
            data = np.resize(scale.data, part.num_bytes)
        else:
            data = np.full(part.num_bytes, 1 << (scheme.bits - 1), np.uint8)
        if not part.optional:
            parts[suffix] = HostTensor(part.dtype, part.shape, data)
    return PackedWeight(scheme, shape, parts)


def _dummy_bytes(
    shape: tuple[int, ...], scheme: Float8Scheme | W8A8Scheme, generator: np.random.Generator
) -> PackedWeight:
    """Return random codes of a byte each, all of finite values, with one scale that gives them a deviation of 0.02."""
    codes = np.arange(256, dtype=np.uint8)
    if isinstance(scheme, Float8Scheme):
        codes = codes[codes & 0x7F < 0x7C]  # the finite ones of either 8-bit float
    parts = {}
    for suffix, part in scheme.parts(shape).items():
        if part.optional:
            continue
        if suffix == "weight":
            drawn = codes[generator.integers(0, len(codes), min(part.num_bytes, _DUMMY_PERIOD))]
            is_int = part.dtype == "int8"
            values = (
                drawn.view(np.int8) if is_int else float_values(HostTensor(part.dtype, drawn.shape, drawn))
            )
            data = np.resize(drawn, part.num_bytes)
        elif suffix.endswith("zero_point"):
            data = np.zeros(part.num_bytes, np.uint8)
        else:
            scale = np.full(1, 0.01 if suffix == "input_scale" else 0.02 / values.std(), np.float32)
            data = np.resize(float_tensor(scale, part.dtype).data, part.num_bytes)
        parts[suffix] = HostTensor(part.dtype, part.shape, data)
    return PackedWeight(scheme, shape, parts)


def listed(names: list[str]) -> str:
    """Return the names as text for a message, at most five of them."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
