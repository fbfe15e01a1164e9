"""Read LoRA adapters, PEFT's directories and llama.cpp's GGUF files, and check that they fit the model.

https://huggingface.co/docs/peft/developer_guides/checkpoint has PEFT's names. A GGUF adapter has the metadata
``general.type = adapter``, ``adapter.type = lora`` and ``adapter.lora.alpha``, and tensors ``NAME.weight.lora_a`` and
``NAME.weight.lora_b``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError, ParameterError
from vllmlite.lora.base_weights import ELEMENTS, BaseWeights, Stored
from vllmlite.lora.files import AdapterFiles, read_files
from vllmlite.lora.modules import (
    GATE_UP,
    Module,
    StackedExperts,
    columns_of,
    gguf_modules,
    peft_modules,
    rows_of,
    transposed,
)
from vllmlite.lora.pace import Pace
from vllmlite.lora.peft_config import PeftConfig, read_config
from vllmlite.lora.peft_tensors import ModuleTensors, by_module
from vllmlite.lora.targets import Targets, of_each_expert
from vllmlite.models import open_stored
from vllmlite.models.adapters import ability
from vllmlite.models.spec import DecoderSpec
from vllmlite.weights.adapter import ABILITIES, EMBEDDING, EXPERTS, GAIN, HEAD, Adapter, LowRank
from vllmlite.weights.gguf import parse_gguf
from vllmlite.weights.host import (
    FLOAT_DTYPES,
    ITEM_SIZE,
    HostTensor,
    as_floats,
    float_tensor,
    float_values,
)
from vllmlite.weights.pt import read_pt
from vllmlite.weights.safetensors import parse_safetensors

MAX_HEADER = 32 << 20
"""Maximum bytes of a safetensors header of an adapter; one with changes of 128 experts in 48 layers has 6 MB."""

_NEEDING = {
    EMBEDDING: "target_modules or modules_to_save: changes the input embedding",
    HEAD: "target_modules or modules_to_save: changes the output layer",
    GAIN: "use_dora: rescales whole weights",
    EXPERTS: "target_modules or target_parameters: changes experts of a mixture or their router",
}
"""Ability that not all backends have → the field by which an adapter uses it, for messages."""

_GGUF_TENSOR = re.compile(r"(?P<module>.+)\.weight\.lora_(?P<factor>[ab])")


class AdapterReader:
    """Reads the adapters of one model."""

    def __init__(
        self,
        model_path: Path,
        spec: DecoderSpec,
        dtype: str,
        max_rank: int,
        max_bytes: int,
        open_weights: Callable[[], Stored] | None = None,
        abilities: Set[str] = ABILITIES,
    ) -> None:
        """Read adapters of the model ``spec`` at ``model_path``, and convert them to ``dtype``, one of
        :data:`FLOAT_DTYPES`. ``max_bytes`` limits the size of a file of weights. ``open_weights`` opens the weights of
        the model, which some adapters need; ``abilities`` are those of the backend."""
        self.spec, self.dtype = spec, dtype
        self.max_rank, self.max_bytes = max_rank, max_bytes
        self.abilities = abilities
        self._modules = peft_modules(model_path, spec)
        self._pace = Pace()
        self._base = BaseWeights(open_weights or partial(open_stored, model_path, spec), self._pace)

    def read(self, path: Path, root: Path | None = None) -> Adapter:
        """Return the adapter at ``path``, from no file outside ``root``. Raises ModelError if it cannot be read or does
        not fit the model, and ParameterError if an option of the engine or the path is to be changed."""
        self._pace.begin()
        files = read_files(path, self.max_bytes, root, self._pace)
        found = self._read_gguf(files) if files.config is None else self._read_peft(files, files.config)
        if not found:
            raise ModelError(f"{files.path}: changes no weights")
        self._check_abilities(str(files.path), found)
        return Adapter(f"{files.digest.hex()} {self.dtype}", found)

    def _check_abilities(self, where: str, changes: Mapping[str, LowRank]) -> None:
        """Raise ModelError if the backend cannot apply one of the changes."""
        for place, change in changes.items():
            for needed in (ability(place), GAIN if change.gain is not None else None):
                if needed is not None and needed not in self.abilities:
                    raise ModelError(
                        f"{where}: {_NEEDING[needed]}, which this backend does not support: use --backend cpu, "
                        "or merge the adapter into its base model"
                    )

    def _read_peft(self, files: AdapterFiles, text: bytes) -> dict[str, LowRank]:
        where = str(files.path)
        config = read_config(str(files.path.parent / "adapter_config.json"), text)
        if files.path.suffix == ".safetensors":
            tensors = parse_safetensors(files.path, files.weights, MAX_HEADER)
        else:
            tensors = read_pt(files.path, files.weights.tobytes())
        modules = self._modules
        read = by_module(where, tensors.items())
        by_name = {name: own for name, own in read.items() if not modules.is_foreign(name)}
        canonical = modules.canonical(by_name)
        targets = Targets(where, config, modules, {canonical[name]: own for name, own in by_name.items()})
        if len(targets.own) < len(by_name):
            raise ModelError(f"{where}: has two names of one module")
        targets.check()
        changes: dict[str, LowRank] = {}
        for name, own in targets.own.items():
            self._check_extras(where, config, name, own)
            if own.whole is not None:
                changes |= self._whole(where, own, modules.find(where, name))
                continue
            if name not in targets.ranks:
                continue
            rank, scale = targets.ranks[name]
            parameter = targets.stacked.get(name)
            if parameter is None:
                found = self._changes(where, own, modules.find(where, name), scale, rank)
                changes |= self._rescaled(where, own, modules.find(where, name), found)
            else:
                changes |= self._of_experts(where, own, *parameter, rank, scale)
        return changes

    def _check_extras(self, where: str, config: PeftConfig, name: str, own: ModuleTensors) -> None:
        """Raise ModelError if a module has other tensors than the configuration implies, or a copy of the base model's
        weight that differs from it."""
        what = f"{where}: module {own.name[:200]!r}"
        if own.whole is not None and (own.factors or own.magnitude is not None):
            raise ModelError(f"{what}: is both replaced (modules_to_save) and changed (target_modules)")
        if own.factors and (own.magnitude is not None) != config.use_dora:
            has = "has no lora_magnitude_vector" if config.use_dora else "has a lora_magnitude_vector"
            raise ModelError(f"{what}: {has}, and {config.where} has use_dora={config.use_dora}")
        if own.base is None:
            return
        place = next((place for place, _ in self._modules.find(where, name).parts), "")
        if place not in (EMBEDDING, HEAD):
            raise ModelError(
                f"{what}: has a base_layer.weight, which only embeddings and output layers may have"
            )
        self._check_vocabulary(where, own, own.base)
        if own.base.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{what}: its base_layer.weight is of {own.base.dtype}; accepted: {', '.join(FLOAT_DTYPES)}"
            )
        if not self._base.may_equal(place, own.base):
            raise ModelError(
                f"{what}: its base_layer.weight differs from the base model's weight: the adapter was trained on "
                "another base model, or on a changed one; merge it into that"
            )

    def _check_vocabulary(self, where: str, own: ModuleTensors, table: HostTensor) -> None:
        """Raise ModelError if ``table`` is not an embedding or an output layer of the base model's shape."""
        expected = self.spec.vocab_size, self.spec.output_size
        if table.shape != expected:
            added = (
                " (a vocabulary with added tokens is not supported)" if table.shape[:1] > expected[:1] else ""
            )
            raise ModelError(
                f"{where}: {own.field}: the weight of module {own.name[:200]!r} is {list(table.shape)}; expected "
                f"{list(expected)}, as in the base model{added}"
            )

    def _whole(self, where: str, own: ModuleTensors, module: Module) -> dict[str, LowRank]:
        """Return the change that replaces the weight of the embedding or the output layer."""
        assert own.whole is not None
        ((place, _),) = module.parts
        self._check_vocabulary(where, own, own.whole)
        table = self._converted(f"{where}: weight of module {own.name[:200]!r}", own.whole)
        hidden = self.spec.output_size
        same = float_tensor(np.eye(hidden, dtype=np.float32), self.dtype)
        nothing = np.zeros((2, module.out), np.float32)
        if place == EMBEDDING:
            return {place: LowRank(transposed(table), same, 1.0, nothing)}
        return {place: LowRank(same, table, 1.0, nothing)}

    def _rescaled(
        self, where: str, own: ModuleTensors, module: Module, changes: dict[str, LowRank]
    ) -> dict[str, LowRank]:
        """Return the changes with the gains that follow from the module's magnitudes, if it has any (DoRA)."""
        if own.magnitude is None:
            return changes
        what = f"{where}: lora_magnitude_vector of module {own.name[:200]!r}"
        if own.magnitude.data.size and own.magnitude.shape not in (
            (module.out,),
            (module.out, 1),
            (1, module.out),
        ):
            raise ModelError(f"{what}: of shape {list(own.magnitude.shape)}; expected {[module.out]}")
        magnitudes = float_values(self._converted(what, own.magnitude, "float32")).reshape(-1)
        found = {}
        for place, source in module.parts:
            change = changes[place]
            rows = (
                magnitudes
                if source.rows is None
                else magnitudes[np.r_[*(slice(*span) for span in source.rows)]]
            )
            gain = self._base.gain(place, change, rows)
            if not np.isfinite(gain).all():
                raise ModelError(f"{what}: rescales rows of the weight whose norm is zero")
            b = float_values(change.b) * gain[0][:, None]
            found[place] = replace(change, b=float_tensor(b, self.dtype), gain=gain)
        return found

    def _of_experts(
        self, where: str, own: ModuleTensors, experts: StackedExperts, parameter: str, rank: int, scale: float
    ) -> dict[str, LowRank]:
        """Return the changes of a parameter that holds one weight of all experts of a layer."""
        gate_up = parameter == GATE_UP
        out, inner = (2 * experts.inner, experts.hidden) if gate_up else (experts.hidden, experts.inner)
        whole = Module(out, inner, ())
        a, b = self._factors(where, own, whole, rank, experts.count)
        parts = experts.gate_up if gate_up else {"down": slice(None)}
        found = {}
        for expert in range(experts.count):
            own_a = rows_of(a, slice(expert * rank, (expert + 1) * rank))
            own_b = columns_of(b, slice(expert, None, experts.count))
            for part, rows in parts.items():
                place = f"{experts.layer}.experts.{expert}.{part}"
                found[place] = LowRank(own_a, rows_of(own_b, rows), scale)
        return found

    def _read_gguf(self, files: AdapterFiles) -> dict[str, LowRank]:
        where, gguf = str(files.path), parse_gguf(files.path, files.weights)
        for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
            value = gguf.get(key, str, "")
            if value != expected:
                raise ModelError(f"{where}: metadata {key}={value[:80]!r}; accepted: {expected!r}")
        if gguf.metadata.get("adapter.alora.invocation_tokens") is not None:
            raise ModelError(
                f"{where}: metadata adapter.alora.invocation_tokens: activated LoRA is not supported"
            )
        alpha = float(gguf.get("adapter.lora.alpha", (int, float), 0.0))
        modules = gguf_modules(where, gguf.get("general.architecture", str, ""), self.spec)
        by_name: dict[str, ModuleTensors] = {}
        for name, tensor in gguf.tensors.items():
            match = _GGUF_TENSOR.fullmatch(name)
            if match is None:
                raise ModelError(f"{where}: tensor {name[:200]!r} is not part of a LoRA adapter")
            module = match["module"]
            factors = by_name.setdefault(module, ModuleTensors(module)).factors
            factors[match["factor"].upper()] = as_floats(tensor)
        changes: dict[str, LowRank] = {}
        for name, found in by_name.items():
            rank = found.factors["B"].shape[-1] if "B" in found.factors else 0
            scale = alpha / rank if alpha and rank else 1.0
            for own, module in of_each_expert(where, found, modules.find(where, name)):
                changes |= self._changes(where, own, module, scale, rank)
        return changes

    def _changes(
        self, where: str, own: ModuleTensors, module: Module, scale: float, rank: int
    ) -> dict[str, LowRank]:
        """Return the changes of a module's weights by factors of ``rank``, after checking them."""
        return module.changes(*self._factors(where, own, module, rank), scale)

    def _factors(
        self, where: str, own: ModuleTensors, module: Module, rank: int, stacked: int = 1
    ) -> tuple[HostTensor, HostTensor]:
        """Return the factors of a module, ``stacked`` of each, in :attr:`dtype`, after checking them."""
        found = []
        for factor, shape in (("A", (rank * stacked, module.inner)), ("B", (module.out, rank * stacked))):
            tensor = own.factors.get(factor)
            if tensor is None:
                raise ModelError(f"{where}: module {own.name[:200]!r}: has no lora_{factor}")
            if tensor.shape != shape:
                raise ModelError(
                    f"{where}: lora_{factor} of module {own.name[:200]!r}: of shape {list(tensor.shape)}; expected "
                    f"{list(shape)}, for rank {rank} and a weight of {module.out} x {module.inner} of the base model"
                )
            found.append(tensor)
        if rank > self.max_rank:
            raise ParameterError(
                "max_lora_rank", self.max_rank, f"must be at least the adapter's rank, {rank}: {where}"
            )
        a, b = (
            self._converted(f"{where}: lora_{factor} of module {own.name[:200]!r}", tensor)
            for factor, tensor in zip("AB", found, strict=True)
        )
        return a, b

    def _converted(self, what: str, tensor: HostTensor, dtype: str | None = None) -> HostTensor:
        """Return ``tensor`` in ``dtype``, by default :attr:`dtype`, converted piece by piece.

        Raises ModelError, which begins with ``what``, for another dtype than floats, and for values that are not finite
        or are too large."""
        if tensor.dtype not in (*FLOAT_DTYPES, "float64"):
            raise ModelError(f"{what}: is of {tensor.dtype}; accepted: {', '.join(FLOAT_DTYPES)}, float64")
        dtype = dtype or self.dtype
        same, size = tensor.dtype == dtype, ITEM_SIZE[tensor.dtype]
        count, own_size = tensor.data.size // size, ITEM_SIZE[dtype]
        data = tensor.data if same else np.empty(count * own_size, np.uint8)
        for at in range(0, count, ELEMENTS):
            values = _values(tensor.dtype, tensor.data[at * size : (at + ELEMENTS) * size])
            _check_finite(what, values)
            if not same:
                with np.errstate(over="ignore"):
                    converted = float_tensor(values, dtype)
                if dtype == "float16":
                    _check_finite(f"{what} in float16", float_values(converted))
                data[at * own_size : (at + ELEMENTS) * own_size] = converted.data
            self._pace()
        return HostTensor(dtype, tensor.shape, data)


def _values(dtype: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return floats as float32."""
    if dtype == "float64":
        with np.errstate(over="ignore"):
            return data.view("<f8").astype(np.float32)
    return float_values(HostTensor(dtype, (data.size // ITEM_SIZE[dtype],), data))


def _check_finite(what: str, values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise ModelError(f"{what}: has values that are not finite numbers")
