"""Map the modules of an adapter, by the names that PEFT and llama.cpp use, to the model's weights that they change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vllmlite.errors import ModelError
from vllmlite.models.adapters import ROUTER, ability, places
from vllmlite.models.families import checkpoint_keys
from vllmlite.models.gguf import in_halves
from vllmlite.models.gguf_families import FAMILIES as GGUF_FAMILIES
from vllmlite.models.gguf_families import GgufFamily
from vllmlite.models.keys import Keys
from vllmlite.models.multimodal import family_of
from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources
from vllmlite.weights.adapter import EMBEDDING, EXPERTS, HEAD, LowRank
from vllmlite.weights.host import ITEM_SIZE, HostTensor
from vllmlite.weights.parts import Source


@dataclass(frozen=True, slots=True)
class Module:
    """A module ``[out, in]`` of the whole checkpoint, and the model's weights that are parts of it."""

    out: int
    inner: int
    """Size of the module's input."""
    parts: tuple[tuple[str, Source], ...]
    """Names of the weights as in ``models.adapters.places``, each with its rows and columns of the module."""
    heads: int | None = None
    """Number of heads whose rows llama.cpp's converter has reordered; None: rows are in the model's order."""

    @property
    def is_embedding(self) -> bool:
        """Whether the module is the input embedding, whose inputs are token ids."""
        return self.parts[0][0] == EMBEDDING

    @property
    def num_experts(self) -> int:
        """Number of experts whose weights it holds one after another; 0 if it holds no experts."""
        return len(self.parts) if ".experts." in self.parts[0][0] and self.parts[0][1].rows is not None else 0

    def expert(self, index: int, count: int) -> Module:
        """Return the part for expert ``index`` of a module that holds ``count`` experts one after another."""
        rows = self.out // count
        span = index * rows, (index + 1) * rows
        own = ((place, replace(source, rows=None)) for place, source in self.parts if source.rows == (span,))
        return Module(rows, self.inner, tuple(own))

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
        """List the modules of ``spec`` by the names ``keys``. ``family`` is llama.cpp's family, if the names are
        llama.cpp's."""
        spec = replace(spec, keys=keys, quantization=None)
        if spec.whole is not None:
            spec = replace(spec, whole=replace(spec.whole, keys=keys, quantization=None))
        self.keys = keys
        self.refused: set[str] = set()
        """Modules with a weight matrix that adapters cannot change."""
        changeable, whole, parts = places(spec), spec.whole or spec, dict[str, list[tuple[str, Source]]]()
        self.stacked = _stacked(spec)
        self.tied = spec.tied_head
        own = keys.expert.removesuffix("."), keys.router
        self._in_mlp = [
            pair for pair in zip(("mlp.experts", "mlp.gate"), own, strict=True) if pair[0] != pair[1]
        ]
        for name, source in sources(spec).items():
            place, key = name.removesuffix(".weight"), source.key.removesuffix(".weight")
            if len(source.stored) == 3:
                continue  # all experts of a layer in one tensor, which is no module: see StackedExperts
            if place in changeable:
                parts.setdefault(key, []).append((place, source))
            elif len(source.stored) == 2:
                self.refused.add(key)
        self.by_name: dict[str, Module] = {}
        for key, found in parts.items():
            place, source = found[0]
            swapped = source.transposed or place == EMBEDDING
            out, inner = source.stored[::-1] if swapped else source.stored
            heads = None
            if family is not None and family.reordered and (match := re.search(r"\.attn_([qk])$", key)):
                heads = whole.num_heads if match[1] == "q" else whole.num_kv_heads
            self.by_name[key] = Module(out, inner, tuple(found), heads)
        if HEAD in changeable and keys.head not in self.by_name:  # tied to the embedding
            out, inner = changeable[HEAD]
            self.by_name[keys.head] = Module(
                out, inner, ((HEAD, Source(keys.head, (out, inner), (out, inner))),)
            )

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        """Return, for each of a file's ``names``, the name that this class has for the module. Names of a wrapper
        around the language model are changed as those of checkpoints are, and the prefix of the base model is added if
        no name has it."""
        found = {name: self._renamed(name) for name in names}
        outer = self.keys.prefix[: self.keys.prefix.find(".") + 1]
        if outer and not any(name.startswith(outer) for name in found.values()):
            found = {
                name: renamed if renamed == self.keys.head else outer + renamed
                for name, renamed in found.items()
            }
        return {name: self._of_layer(renamed) for name, renamed in found.items()}

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

    def kind(self, name: str) -> str | None:
        """Return ``experts`` or ``routers`` for a module of a mixture of experts; None for other modules."""
        place = self.by_name[name].parts[0][0]
        if ability(place) != EXPERTS:
            return None
        return ROUTER if place.endswith(ROUTER) else EXPERTS

    def usual(self, name: str) -> str:
        """Return the name that transformers 5 has for a module of a mixture of experts, which is always inside
        ``mlp``."""
        for usual, own in self._in_mlp:
            name = re.sub(rf"(\.\d+\.){re.escape(own)}(?=\.|$)", rf"\g<1>{usual}", name)
        return name

    def _of_layer(self, name: str) -> str:
        """Return the family's own name for a name that :meth:`usual` returned."""
        for usual, own in self._in_mlp:
            name = re.sub(rf"(\.\d+\.){re.escape(usual)}(?=\.|$)", rf"\g<1>{own}", name)
        return name

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.keys.renames:
            if re.search(pattern, f"{name}."):
                return re.sub(pattern, replacement, f"{name}.").removesuffix(".")
        return name


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """The module that holds the weights of all experts of a layer as two parameters in transformers 5."""

    layer: int
    count: int
    hidden: int
    inner: int
    interleaved: bool
    """Whether rows of gate and up projections take turns; otherwise all those of the gate come first."""

    @property
    def gate_up(self) -> dict[str, slice]:
        """The rows of the gate and of the up projection in the parameter that holds both."""
        if self.interleaved:
            return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
        return {"gate": slice(self.inner), "up": slice(self.inner, None)}

    def parameter(self, rows_of_a: int, columns_of_a: int, rows_of_b: int) -> str | None:
        """Return the name of the parameter that factors of these shapes change; None: they fit none."""
        if rows_of_a % self.count == 0:
            if (columns_of_a, rows_of_b) == (self.hidden, 2 * self.inner):
                return GATE_UP
            if (columns_of_a, rows_of_b) == (self.inner, self.hidden):
                return DOWN
        return None


GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""The parameters of :class:`StackedExperts`: ``[experts, 2 * inner, hidden]`` and ``[experts, hidden, inner]``, or with
rows and columns exchanged."""


def _stacked(spec: DecoderSpec) -> dict[str, StackedExperts]:
    """Return the modules that hold all experts of a layer, by name."""
    prefix = f"{spec.keys.prefix}{spec.keys.layer}"
    return {
        f"{prefix}{index}.{spec.keys.expert.removesuffix('.')}": StackedExperts(
            index,
            layer.moe.num_experts,
            spec.hidden_size,
            layer.moe.intermediate_size,
            spec.keys.interleaved_experts is not None,
        )
        for index, layer in enumerate(spec.layers)
        if layer.moe is not None
    }


def peft_modules(path: Path, spec: DecoderSpec) -> Modules:
    """Return the modules of the model ``spec`` at ``path`` by the names in Hugging Face's format."""
    return Modules(spec, checkpoint_keys(path, spec))


def gguf_modules(where: str, architecture: str, spec: DecoderSpec) -> Modules:
    """Return the modules of the model ``spec`` by the names in GGUF files of ``architecture``. Raises ModelError, which
    begins with ``where``, if the model is of another one."""
    name = family_of(spec.architecture)
    for own, family in GGUF_FAMILIES.items():
        if family.architecture == name:
            stored = "llama" if own in ("mistral", "mixtral") else own
            if architecture != stored:
                break
            return Modules(spec, family.keys, family)
    raise ModelError(
        f"{where}: general.architecture={architecture[:80]!r}; the base model is {spec.architecture}"
    )


def rows_of(tensor: HostTensor, rows: slice) -> HostTensor:
    """Return some rows of a matrix."""
    return _tensor(tensor, _elements(tensor)[rows])


def columns_of(tensor: HostTensor, columns: slice) -> HostTensor:
    """Return some columns of a matrix."""
    return _tensor(tensor, _elements(tensor)[:, columns])


def item(tensor: HostTensor, index: int) -> HostTensor:
    """Return one of several matrices."""
    return _tensor(tensor, _elements(tensor)[index])


def transposed(tensor: HostTensor) -> HostTensor:
    """Return a matrix with rows and columns exchanged."""
    return _tensor(tensor, _elements(tensor).T)


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
