"""``adapter_config.json``: PEFT's options of an adapter, each of which is honoured or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vllmlite.errors import ModelError
from vllmlite.lora.patterns import matching

MAX_RANK = 1 << 16
"""Maximum rank that a configuration may name; adapters are limited further by ``max_lora_rank``."""
ALL_LINEAR = "all-linear"

_NOTHING: tuple[Any, ...] = (None, False, {}, [], "")
_WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path fan_in_fan_out inference_mode lora_dropout megatron_core peft_type "
    "peft_version qalora_group_size revision runtime_config target_modules task_type loftq_config eva_config "
    "lora_ga_config velora_config monteclora_config".split()
)
"""Fields that do not change how an adapter is applied, or that this module reads. ``fan_in_fan_out`` says how the base
model stores its weights, which is known from the model itself."""
_READ = frozenset(
    "r lora_alpha use_rslora rank_pattern alpha_pattern exclude_modules layers_to_transform layers_pattern "
    "init_lora_weights bias use_dora target_parameters modules_to_save ensure_weight_tying".split()
)
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "trainable_token_indices": "trained tokens are not supported: merge the adapter into its base model",
    "lora_bias": "biases of adapters are not supported",
    "layer_replication": "replicated layers are not supported",
    "use_qalora": "QALoRA pools the inputs of an adapter, which is not supported",
    "use_bdlora": "block-diagonal adapters are not supported",
    "arrow_config": "Arrow's routing between adapters is not supported",
    "kasa_config": "KaSA is not supported",
    "corda_config": "CorDA changes the base model: convert the adapter with PEFT's path_initial_model_for_weight_"
    "conversion",
    "megatron_config": "adapters of Megatron's parallel layers are not supported",
}
"""Fields that must be absent or empty, with the reason."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "loftq", "orthogonal", "lora_ga")
"""Values of ``init_lora_weights`` that leave the base model as it is."""
_RESIDUAL_STARTS = ("pissa", "olora", "corda")
"""Beginnings of values of ``init_lora_weights`` that subtract the initial adapter from the base model."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The options of a LoRA adapter that determine where it is applied, and with which scale."""

    where: str
    """Path of the file, for messages."""
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    """A regular expression, ``all-linear``, or the ends of names."""
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    use_dora: bool = False
    """Whether each changed weight is rescaled so that its rows have trained norms (Liu et al. 2024)."""
    target_parameters: tuple[str, ...] = ()
    """Ends of the names of parameters to which the adapter is also applied."""
    ensure_weight_tying: bool = False
    """Whether the output layer is changed together with the embedding to which it is tied."""
    modules_to_save: tuple[str, ...] = ()
    """Ends of names of modules that the adapter replaces as a whole."""

    def ranks(self, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
        """Return the rank and the scale of the product for each of ``modules``."""
        names = list(modules)
        ranks = self._by_pattern("rank_pattern", self.rank_pattern, names)
        alphas = self._by_pattern("alpha_pattern", self.alpha_pattern, names)
        found = {}
        for name in names:
            rank, alpha = ranks.get(name, self.r), alphas.get(name, self.lora_alpha)
            found[name] = rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return found

    def targeted(self, modules: Iterable[str], linear: Iterable[str]) -> set[str]:
        """Return the modules to which the adapter is applied. ``linear`` are the modules that ``all-linear`` stands
        for."""
        targets = self.target_modules
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            found = set(linear)
        else:
            found = self._named("target_modules", targets, modules)
        if self.layers_to_transform is not None:
            found = {name for name in found if self._layer(name) in self.layers_to_transform}
        return found - self._named("exclude_modules", self.exclude_modules, found)

    def targeted_parameters(self, parameters: Iterable[str]) -> set[str]:
        """Return those of ``parameters`` that ``target_parameters`` names."""
        wanted = frozenset(self.target_parameters)
        return {name for name in parameters if not wanted.isdisjoint(_ends(name))}

    def saved(self, modules: Iterable[str]) -> set[str]:
        """Return those of ``modules`` that ``modules_to_save`` names."""
        return {name for name in modules if name.endswith(self.modules_to_save)}

    def _named(self, field: str, names: str | tuple[str, ...], modules: Iterable[str]) -> set[str]:
        """Return the modules that match an expression, or whose names end in one of ``names``."""
        if isinstance(names, str):
            (found,) = matching(f"{self.where}: {field}", [names], modules)
            return found
        wanted = frozenset(names)
        return {module for module in modules if not wanted.isdisjoint(_ends(module))}

    def _layer(self, name: str) -> int | None:
        """Return the number of a module's layer, which follows the name of a list of layers; None without one."""
        parts = name.split(".")
        for before, number in pairwise(parts[:-1]):
            if number.isdecimal() and before in (self.layers_pattern or (before,)):
                return int(number)
        return None

    def _by_pattern(self, field: str, patterns: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        """Return, for each name whose end one of ``patterns`` matches, the value of the first such pattern."""
        found: dict[str, Any] = {}
        matched = matching(f"{self.where}: {field}", list(patterns), names, ends=True)
        for value, matches in zip(patterns.values(), matched, strict=True):
            for name in matches:
                found.setdefault(name, value)
        return found


def read_config(where: str, text: bytes) -> PeftConfig:
    """Return the options in ``text``, the contents of ``adapter_config.json``. Raises ModelError, which begins with
    ``where``, for a field that is not supported."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{where}: holds {type(content).__name__}; accepted: a JSON object")
    fields = _Fields(where, content)
    fields.check()
    return PeftConfig(
        where=where,
        r=fields.rank("r", content.get("r", 8)),
        lora_alpha=fields.number("lora_alpha", content.get("lora_alpha", 8)),
        use_rslora=fields.boolean("use_rslora"),
        rank_pattern=fields.pattern("rank_pattern", fields.rank),
        alpha_pattern=fields.pattern("alpha_pattern", fields.number),
        target_modules=fields.texts("target_modules"),
        exclude_modules=fields.texts("exclude_modules"),
        layers_to_transform=fields.layers(),
        layers_pattern=fields.names("layers_pattern"),
        use_dora=fields.boolean("use_dora"),
        target_parameters=fields.names("target_parameters"),
        ensure_weight_tying=fields.boolean("ensure_weight_tying"),
        modules_to_save=fields.names("modules_to_save"),
    )


class _Fields:
    """The fields of a configuration."""

    def __init__(self, where: str, content: Mapping[str, Any]) -> None:
        self.where, self.content = where, content

    def error(self, name: str, value: object, accepted: str) -> ModelError:
        shown = repr(value)
        return ModelError(
            f"{self.where}: {name}={shown[:77] + '...' if len(shown) > 80 else shown}: {accepted}"
        )

    def check(self) -> None:
        """Raise ModelError for fields that are not supported."""
        content = self.content
        if content.get("peft_type") not in (None, "LORA"):
            raise self.error(
                "peft_type", content["peft_type"], "must be LORA: no other adapters are supported"
            )
        if content.get("task_type") not in (None, "CAUSAL_LM"):
            raise self.error("task_type", content["task_type"], "must be CAUSAL_LM or null")
        if content.get("bias") not in (None, "none"):
            raise self.error("bias", content["bias"], "must be none: trained biases are not supported")
        start = content.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_RESIDUAL_STARTS):
            raise self.error(
                "init_lora_weights",
                start,
                "the adapter belongs to a base model that training has changed: convert it with PEFT's "
                "path_initial_model_for_weight_conversion",
            )
        if start not in _PLAIN_STARTS:
            raise self.error("init_lora_weights", start, "is unknown")
        for name, value in content.items():
            if name in _WITHOUT_EFFECT | _READ or value in _NOTHING:
                continue
            raise self.error(
                name, value, _REFUSED.get(name, "is an unknown field, which may change the results")
            )

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self.error(name, value, f"must be an integer from 1 to {MAX_RANK}")
        return value

    def number(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= 1e30:
            raise self.error(name, value, "must be a finite number")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.content.get(name) or False
        if type(value) is not bool:
            raise self.error(name, value, "must be true or false")
        return value

    def pattern(self, name: str, check: Any) -> dict[str, Any]:
        value = self.content.get(name) or {}
        if not isinstance(value, dict):
            raise self.error(name, value, "must be an object of module names and numbers")
        return {key: check(f"{name}[{key[:80]!r}]", each) for key, each in value.items()}

    def texts(self, name: str) -> str | tuple[str, ...]:
        value = self.content.get(name)
        return value if isinstance(value, str) and value else self.names(name)

    def names(self, name: str) -> tuple[str, ...]:
        value = self.content.get(name) or []
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(each, str) and each for each in listed):
            raise self.error(name, value, "must be a list of names")
        return tuple(listed)

    def layers(self) -> tuple[int, ...] | None:
        value = self.content.get("layers_to_transform")
        if value is None or value == []:
            return None
        listed = value if isinstance(value, list) else [value]
        if not all(type(each) is int and each >= 0 for each in listed):
            raise self.error("layers_to_transform", value, "must be a layer's number, or a list of them")
        if not isinstance(self.content.get("target_modules"), list):
            raise self.error("layers_to_transform", value, "needs target_modules to be a list of names")
        return tuple(listed)


def _ends(name: str) -> list[str]:
    """Return ``name``, and the part of it after each of its dots."""
    parts = name.split(".")
    return [".".join(parts[index:]) for index in range(len(parts))]
