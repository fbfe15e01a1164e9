"""Reading LoRA adapters: PEFT's directories and llama.cpp's GGUF files, checked against the model before it gets them.

https://huggingface.co/docs/peft/developer_guides/checkpoint has PEFT's names. A GGUF adapter has the metadata
``general.type = adapter``, ``adapter.type = lora`` and ``adapter.lora.alpha``, and tensors ``NAME.weight.lora_a`` and
``NAME.weight.lora_b``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError, ParameterError
from vllmlite.lora.files import AdapterFiles, read_files
from vllmlite.lora.modules import Module, Modules, gguf_modules, peft_modules
from vllmlite.lora.peft_config import PeftConfig, read_config
from vllmlite.models.spec import DecoderSpec
from vllmlite.weights.adapter import Adapter, LowRank
from vllmlite.weights.checkpoint import listed
from vllmlite.weights.gguf import parse_gguf
from vllmlite.weights.host import (
    FLOAT_DTYPES,
    HostTensor,
    HostWeight,
    PackedWeight,
    dequantized,
    float_tensor,
    float_values,
)
from vllmlite.weights.pt import read_pt
from vllmlite.weights.safetensors import parse_safetensors

MAX_HEADER = 32 << 20
"""Maximum bytes of a safetensors header of an adapter; one with changes of 128 experts in 48 layers has 6 MB."""

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
_GGUF_TENSOR = re.compile(r"(?P<module>.+)\.weight\.lora_(?P<factor>[ab])")
_REFUSED = (
    ("lora_magnitude_vector", "use_dora: DoRA rescales whole weights, which is not supported"),
    (".modules_to_save.", "modules_to_save: whole trained modules are not supported"),
    (".bias", "lora_bias: biases are not supported"),
    (
        ".base_layer.weight",
        "target_modules: adapters of embeddings and of the output layer are not supported",
    ),
    ("lora_embedding_", "target_modules: adapters of embeddings are not supported"),
    (".token_adapter.", "trainable_token_indices: trained tokens are not supported"),
)
"""Parts of names of tensors that are not read, with the reason."""


@dataclass(slots=True)
class _Factors:
    """The two factors of a module's change, as they come from a file."""

    name: str
    """The module's name in the file."""
    factors: dict[str, HostTensor] = field(default_factory=dict)
    """``A`` and ``B``."""


class AdapterReader:
    """Reads the adapters of one model."""

    def __init__(
        self, model_path: Path, spec: DecoderSpec, dtype: str, max_rank: int, max_bytes: int
    ) -> None:
        """Read adapters of the model ``spec`` at ``model_path``, and convert them to ``dtype``, one of
        :data:`FLOAT_DTYPES`. ``max_bytes`` limits the size of a file of weights."""
        self.spec, self.dtype = spec, dtype
        self.max_rank, self.max_bytes = max_rank, max_bytes
        self._modules = peft_modules(model_path, spec)

    def read(self, path: Path, root: Path | None = None) -> Adapter:
        """Return the adapter at ``path``, from no file outside ``root``. Raises ModelError if it cannot be read or does
        not fit the model, and ParameterError if an option of the engine or the path is to be changed."""
        files = read_files(path, self.max_bytes, root)
        found = self._read_gguf(files) if files.config is None else self._read_peft(files, files.config)
        if not found:
            raise ModelError(f"{files.path}: changes no weights")
        return Adapter(f"{files.digest.hex()} {self.dtype}", found)

    def _read_peft(self, files: AdapterFiles, text: bytes) -> dict[str, LowRank]:
        where = str(files.path)
        config = read_config(str(files.path.parent / "adapter_config.json"), text)
        if files.path.suffix == ".safetensors":
            tensors = parse_safetensors(files.path, files.weights, MAX_HEADER)
        else:
            tensors = read_pt(files.path, files.weights.tobytes())
        modules = self._modules
        by_name: dict[str, _Factors] = {}
        for name, tensor in tensors.items():
            module, factor = _peft_name(where, name)
            if not modules.is_foreign(module):
                by_name.setdefault(module, _Factors(module)).factors[factor] = tensor
        canonical = modules.canonical(by_name)
        own = {canonical[name]: factors for name, factors in by_name.items()}
        if len(own) < len(by_name):
            raise ModelError(f"{where}: has two names of one module")
        found = {name: modules.find(where, name) for name in own}
        _check_targets(where, config, modules, own)
        changes: dict[str, LowRank] = {}
        ranks = config.ranks(factors.name for factors in own.values())
        for name, factors in own.items():
            rank, scale = ranks[factors.name]
            changes |= self._changes(where, factors, found[name], scale, rank)
        return changes

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
        by_name: dict[str, _Factors] = {}
        for name, tensor in gguf.tensors.items():
            match = _GGUF_TENSOR.fullmatch(name)
            if match is None:
                raise ModelError(f"{where}: tensor {name[:200]!r} is not part of a LoRA adapter")
            module = match["module"]
            factors = by_name.setdefault(module, _Factors(module)).factors
            factors[match["factor"].upper()] = _floats(tensor)
        changes: dict[str, LowRank] = {}
        for name, found in by_name.items():
            module = modules.find(where, name)
            rank = found.factors["B"].shape[-1] if "B" in found.factors else 0
            changes |= self._changes(where, found, module, alpha / rank if alpha and rank else 1.0, rank)
        return changes

    def _changes(
        self, where: str, factors: _Factors, module: Module, scale: float, rank: int
    ) -> dict[str, LowRank]:
        """Return the changes of a module's weights by factors of ``rank``, after checking them."""
        for factor, shape in (("A", (rank, module.inner)), ("B", (module.out, rank))):
            tensor = factors.factors.get(factor)
            if tensor is None:
                raise ModelError(f"{where}: module {factors.name[:200]!r}: has no lora_{factor}")
            if tensor.shape != shape:
                raise ModelError(
                    f"{where}: lora_{factor} of module {factors.name[:200]!r}: of shape {list(tensor.shape)}; expected "
                    f"{list(shape)}, for rank {rank} and a weight of {module.out} x {module.inner} of the base model"
                )
        if rank > self.max_rank:
            raise ParameterError(
                "max_lora_rank", self.max_rank, f"must be at least the adapter's rank, {rank}: {where}"
            )
        converted = [
            self._converted(
                f"{where}: lora_{factor} of module {factors.name[:200]!r}", factors.factors[factor]
            )
            for factor in "AB"
        ]
        return module.changes(converted[0], converted[1], scale)

    def _converted(self, what: str, tensor: HostTensor) -> HostTensor:
        """Return ``tensor`` in :attr:`dtype`. Raises ModelError, which begins with ``what``, for another dtype than
        floats, and for values that are not finite or are too large."""
        if tensor.dtype == "float64":
            values = tensor.data.view("<f8").reshape(tensor.shape).astype(np.float32)
        elif tensor.dtype in FLOAT_DTYPES:
            values = float_values(tensor)
        else:
            raise ModelError(f"{what}: is of {tensor.dtype}; accepted: {', '.join(FLOAT_DTYPES)}, float64")
        _check_finite(what, values)
        if tensor.dtype == self.dtype:
            return tensor
        with np.errstate(over="ignore"):
            converted = float_tensor(values, self.dtype)
        if self.dtype == "float16":
            _check_finite(f"{what} in float16", float_values(converted))
        return converted


def _check_targets(where: str, config: PeftConfig, modules: Modules, own: Mapping[str, _Factors]) -> None:
    """Raise ModelError unless the configuration applies the adapter to exactly the modules in ``own``.

    PEFT ignores what the file has beyond that, and leaves out what it lacks."""
    linear = modules.linear()
    names = {name: factors.name for name, factors in own.items()}
    all_linear = {names[name] for name in own if name in linear}
    accepted = config.targeted(names.values(), all_linear)
    beyond = [name for name in names.values() if name not in accepted]
    if beyond:
        raise ModelError(
            f"{where}: has tensors of modules to which target_modules of {config.where} does not apply the adapter: "
            f"{listed(beyond)}"
        )
    expected = config.targeted(modules.by_name, linear)
    absent = [name for name in modules.by_name if name in expected and name not in own]
    if absent:
        raise ModelError(
            f"{where}: lacks tensors of modules to which target_modules of {config.where} applies the adapter: "
            f"{listed(absent)}"
        )


def _peft_name(where: str, name: str) -> tuple[str, str]:
    """Return the module and the factor, ``A`` or ``B``, of a tensor. Raises ModelError if it has neither."""
    for part, reason in _REFUSED:
        if part in name:
            raise ModelError(f"{where}: tensor {name[:200]!r}: {reason}")
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise ModelError(f"{where}: tensor {name[:200]!r} is not part of a LoRA adapter")
    return match["module"].removeprefix(_PREFIX), match["factor"]


def _floats(tensor: HostWeight) -> HostTensor:
    return dequantized(tensor, "float32") if isinstance(tensor, PackedWeight) else tensor


def _check_finite(what: str, values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise ModelError(f"{what}: has values that are not finite numbers")
