"""The formats of written quantised checkpoints, and the ``quantization_config`` of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllmlite.errors import ParameterError
from vllmlite.models.quantization_config import own_config
from vllmlite.weights.schemes.tiles import GROUP

METHODS = ("rtn", "gptq", "awq")
"""``rtn``: round to nearest; ``gptq`` (Frantar et al. 2023); ``awq``: AWQ's scales (Lin et al. 2023), then GPTQ's
rounding."""
FLOAT8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Format:
    """The options of a format; the first value of several is the default."""

    bits: tuple[int, ...]
    group_size: int
    any_group: bool = False
    """Whether other group sizes are possible, and -1 for a whole row."""
    symmetric: tuple[bool, ...] = (True,)
    methods: tuple[str, ...] = ("rtn",)
    act_order: bool = False
    """Whether GPTQ may round columns in the order of their importance."""
    head: bool = False
    """Whether the output layer can be quantised."""


FORMATS = {
    "int8": Format((8,), GROUP),
    "int4": Format((4,), GROUP),
    "gptq": Format((4, 8), 128, True, (True, False), METHODS, True, True),
    "awq": Format((4,), 128, True, (False,), METHODS, True),
    "compressed-tensors": Format((4, 8), 128, True, (True, False), METHODS, True, True),
    "fp8": Format((8,), FLOAT8_BLOCK),
    "gguf-q8_0": Format((8,), GROUP),
    "gguf-q4_0": Format((4,), GROUP, methods=METHODS),
}
"""Formats of :func:`vllmlite.quantize.quantize_checkpoint`."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The format and the options of quantisation. Raises ParameterError for options that the format does not have."""

    format: str
    method: str = "rtn"
    bits: int | None = None
    group_size: int | None = None
    """Number of columns that share a scale; -1: a whole row, None: the format's default."""
    symmetric: bool | None = None
    """Whether zero is the middle code of every group; None: the format's default."""
    act_order: bool = False
    head: bool = False

    def __post_init__(self) -> None:
        form = FORMATS.get(self.format)
        if form is None:
            raise ParameterError("format", self.format, f"accepted: {', '.join(FORMATS)}")
        accepted = {
            "method": form.methods,
            "bits": form.bits,
            "symmetric": form.symmetric,
            "act_order": (False, True) if form.act_order and self.method == "gptq" else (False,),
            "head": (False, True) if form.head else (False,),
        }
        for field, values in accepted.items():
            given = getattr(self, field)
            if given is None:
                object.__setattr__(self, field, values[0])
            elif given not in values:
                raise ParameterError(field, given, f"accepted with {self._what(field)}: {_listed(values)}")
        if self.group_size is None:
            object.__setattr__(self, "group_size", form.group_size)
        elif not form.any_group and self.group_size != form.group_size:
            raise ParameterError(
                "group_size", self.group_size, f"accepted with {self.format}: {form.group_size}"
            )
        elif self.group_size != -1 and not 8 <= self.group_size <= 65536:
            raise ParameterError("group_size", self.group_size, "accepted: -1 for a whole row, or 8 to 65536")

    def _what(self, field: str) -> str:
        return f"{self.format} and method {self.method}" if field == "act_order" else self.format

    @property
    def own(self) -> bool:
        """Whether the format is vllmlite's own."""
        return self.format in ("int8", "int4")

    @property
    def gguf(self) -> bool:
        """Whether the checkpoint is a GGUF file."""
        return self.format.startswith("gguf-")

    @property
    def kind(self) -> str:
        """A phrase for error messages that says what kind of path the checkpoint is."""
        return "file that ends in .gguf" if self.gguf else "directory"

    def config(self, floats: Sequence[str] = ()) -> dict[str, Any]:
        """Return the ``quantization_config``. ``floats``: linear modules that stay in floats, besides the output
        layer."""
        return _CONFIGS[self.format](self, list(floats))


def _gptq(settings: Settings, floats: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": False,
        "static_groups": settings.act_order,
        "sym": settings.symmetric,
        "lm_head": settings.head,
        "true_sequential": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["vllmlite"]},
    }
    if floats:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in floats}
    return config


def _awq(settings: Settings, floats: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": floats or None,
    }


def _compressed(settings: Settings, floats: list[str]) -> dict[str, Any]:
    by_group = settings.group_size != -1
    weights: dict[str, Any] = {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": settings.symmetric,
        "strategy": "group" if by_group else "channel",
        "group_size": settings.group_size if by_group else None,
        "actorder": "static" if settings.act_order else None,
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ([] if settings.head else ["lm_head"]) + floats,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _fp8(settings: Settings, floats: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FLOAT8_BLOCK, FLOAT8_BLOCK],
        "modules_to_not_convert": ["lm_head", *floats],
    }


_CONFIGS: dict[str, Callable[[Settings, list[str]], dict[str, Any]]] = {
    "int8": lambda settings, _: own_config(settings.format),
    "int4": lambda settings, _: own_config(settings.format),
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
}


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
