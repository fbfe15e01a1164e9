"""Which of a model's weights each module of an adapter changes, by the names that PEFT and llama.cpp use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vllmlite.errors import ModelError
from vllmlite.models.adapters import places
from vllmlite.models.families import checkpoint_keys
from vllmlite.models.gguf import in_halves
from vllmlite.models.gguf_families import FAMILIES as GGUF_FAMILIES
from vllmlite.models.gguf_families import GgufFamily
from vllmlite.models.keys import Keys
from vllmlite.models.multimodal import MULTIMODAL
from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources
from vllmlite.weights.adapter import LowRank
from vllmlite.weights.host import ITEM_SIZE, HostTensor
from vllmlite.weights.parts import Source


@dataclass(frozen=True, slots=True)
class Module:
    """A module ``[out, in]`` of the whole checkpoint, and the model's weights that are parts of it."""

    out: int
    inner: int
    """Elements of its input."""
    parts: tuple[tuple[str, Source], ...]
    """Names of the weights as in ``models.adapters.places``, each with its rows and columns of the module."""
    heads: int | None = None
    """Number of heads whose rows llama.cpp's converter has reordered; None: rows are in the model's order."""

    def changes(self, a: HostTensor, b: HostTensor, scale: float) -> dict[str, LowRank]:
        """Return the changes of the weights by an adapter's ``a [rank, in]`` and ``b [out, rank]``."""
        if self.heads is not None:
            ordered = in_halves(b, self.heads)
            assert isinstance(ordered, HostTensor)
            b = ordered
        return {place: LowRank(_columns(a, source), _rows(b, source), scale) for place, source in self.parts}


class Modules:
    """The modules of a model that adapters may name, by the names of one kind of file."""

    def __init__(self, spec: DecoderSpec, keys: Keys, family: GgufFamily | None = None) -> None:
        """``keys`` are the names; ``family``, llama.cpp's family if they are its names."""
        spec = replace(spec, keys=keys, quantization=None)
        if spec.whole is not None:
            spec = replace(spec, whole=replace(spec.whole, keys=keys, quantization=None))
        self.keys = keys
        self.refused: set[str] = set()
        """Modules with a weight matrix that adapters cannot change."""
        changeable, whole, parts = places(spec), spec.whole or spec, dict[str, list[tuple[str, Source]]]()
        for name, source in sources(spec).items():
            place, key = name.removesuffix(".weight"), source.key.removesuffix(".weight")
            if place in changeable:
                parts.setdefault(key, []).append((place, source))
            elif len(source.stored) == 2:
                self.refused.add(key)
        self.by_name: dict[str, Module] = {}
        for key, found in parts.items():
            source = found[0][1]
            out, inner = source.stored[::-1] if source.transposed else source.stored
            heads = None
            if family is not None and family.reordered and (match := re.search(r"\.attn_([qk])$", key)):
                heads = whole.num_heads if match[1] == "q" else whole.num_kv_heads
            self.by_name[key] = Module(out, inner, tuple(found), heads)

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        """Return each of ``names``, which a file has, with the module's name here.

        Names of a wrapper around the language model are changed as a checkpoint's are, and the prefix of the base model
        is added if no name has it."""
        found = {name: self._renamed(name) for name in names}
        outer = self.keys.prefix[: self.keys.prefix.find(".") + 1]
        if outer and not any(name.startswith(outer) for name in found.values()):
            found = {
                name: renamed if renamed == self.keys.head else outer + renamed
                for name, renamed in found.items()
            }
        return found

    def is_foreign(self, name: str) -> bool:
        """Return whether a file's module belongs to another model beside the language model, such as a vision tower."""
        return bool(self.keys.unread) and re.search(self.keys.unread, f"{name}.") is not None

    def linear(self) -> set[str]:
        """Return the modules that PEFT's ``all-linear`` means, all but the output layer."""
        return (self.by_name.keys() | self.refused) - {self.keys.head, self.keys.prefix + self.keys.embedding}

    def find(self, where: str, name: str) -> Module:
        """Return the module ``name``. Raises ModelError, which begins with ``where``, if adapters cannot change it."""
        if name in self.by_name:
            return self.by_name[name]
        if name in self.refused:
            raise ModelError(f"{where}: changes module {name!r}, whose weights adapters cannot change here")
        raise ModelError(f"{where}: changes module {name[:200]!r}, which the base model does not have")

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.keys.renames:
            if re.search(pattern, f"{name}."):
                return re.sub(pattern, replacement, f"{name}.").removesuffix(".")
        return name


def peft_modules(path: Path, spec: DecoderSpec) -> Modules:
    """Return the modules of the model ``spec`` at ``path`` by the names in Hugging Face's format."""
    return Modules(spec, checkpoint_keys(path, spec))


def gguf_modules(where: str, architecture: str, spec: DecoderSpec) -> Modules:
    """Return the modules of the model ``spec`` by the names in GGUF files of ``architecture``. Raises ModelError, which
    begins with ``where``, if the model is of another one."""
    name = MULTIMODAL[spec.architecture].family if spec.architecture in MULTIMODAL else spec.architecture
    for own, family in GGUF_FAMILIES.items():
        if family.architecture == name:
            stored = "llama" if own in ("mistral", "mixtral") else own
            if architecture != stored:
                break
            return Modules(spec, family.keys, family)
    raise ModelError(
        f"{where}: general.architecture={architecture[:80]!r}; the base model is {spec.architecture}"
    )


def _rows(tensor: HostTensor, source: Source) -> HostTensor:
    """Return the rows of a matrix that make up a weight."""
    if source.rows is None:
        return tensor
    elements = _elements(tensor)
    return _tensor(tensor, np.concatenate([elements[first:last] for first, last in source.rows]))


def _columns(tensor: HostTensor, source: Source) -> HostTensor:
    return tensor if source.columns is None else _tensor(tensor, _elements(tensor)[:, slice(*source.columns)])


def _elements(tensor: HostTensor) -> np.ndarray:
    return tensor.data.view(f"u{ITEM_SIZE[tensor.dtype]}").reshape(tensor.shape)


def _tensor(like: HostTensor, elements: np.ndarray) -> HostTensor:
    data: Sequence[int] = elements.shape
    return HostTensor(like.dtype, tuple(data), np.ascontiguousarray(elements).reshape(-1).view(np.uint8))
