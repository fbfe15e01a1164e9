"""Choose how to run a checkpoint, from its ``config.json``: on the native decoder or with transformers' code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllmlite.config.engine_config import AT_LOAD
from vllmlite.errors import ModelError, ParameterError
from vllmlite.models.families import FAMILIES, architecture, read_spec
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import checkpoint_dtype
from vllmlite.models.multimodal import MULTIMODAL, family_of
from vllmlite.models.spec import DecoderSpec

IMPLEMENTATIONS = ("auto", "native", "transformers")
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "seq_length",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
)
_WIDTHS = ("hidden_size", "n_embd", "d_model")


CUDA_EXPERTS = 4096
"""Maximum experts per layer on the cuda backend (``kMostExperts`` in ``csrc/cuda/moe.cu``)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The properties of a model that are known before a backend is chosen."""

    path: Path
    """The checkpoint's directory or file."""
    implementation: str
    """``native`` or ``transformers``."""
    architecture: str
    dtype: str
    max_position_embeddings: int
    hidden_size: int
    quantization: str | None = None
    able: tuple[str, ...] = ()
    """Names of the backends that have the ops that the model needs; empty: all backends."""
    spec: DecoderSpec | None = None
    """The native decoder's spec."""

    def __str__(self) -> str:
        """Return the architecture, and which code runs it, for the line that is logged at start."""
        native = self.implementation == "native"
        return f"{self.architecture} through {'the native decoder' if native else 'transformers'}"

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the only backends that can run the model; empty: any backend can."""
        return self.able if self.implementation == "native" else ("torch",)


def declining(plan: Plan) -> dict[str, str]:
    """Return the backends that cannot run the model, each with the reason."""
    reasons: dict[str, str] = {}
    if plan.backends:
        only = f"{plan.architecture} runs on {', '.join(plan.backends)} only"
        reasons |= {name: only for name in ("cpu", "cuda") if name not in plan.backends}
    return reasons


def _on_cuda(spec: DecoderSpec) -> bool:
    """Return whether the cuda backend supports all that the model needs."""
    experts = max(0 if layer.moe is None else layer.moe.num_experts for layer in spec.layers)
    return FAMILIES[family_of(spec.architecture)].cuda and spec.qk_norm != "layer" and experts <= CUDA_EXPERTS


def plan_model(path: Path, model_impl: str = "auto") -> Plan:
    """Return the plan for the checkpoint at ``path``; ``auto`` uses transformers' code if there is no native family.

    Does not import torch. Raises ModelError or ParameterError if the model cannot run."""
    if model_impl not in IMPLEMENTATIONS:
        raise ParameterError("model_impl", model_impl, ", ".join(IMPLEMENTATIONS))
    config = HfConfig.read(path)
    name = architecture(config)
    if model_impl == "native" or (model_impl == "auto" and name in FAMILIES | MULTIMODAL):
        spec = read_spec(path)
        return Plan(
            path,
            "native",
            name,
            spec.dtype,
            spec.max_position_embeddings,
            spec.output_size,
            None if spec.quantization is None else spec.quantization.method,
            () if _on_cuda(spec) else ("cpu", "torch"),
            spec,
        )
    if path.is_file():
        raise ModelError(
            f"{path}: {name} has no native family, and transformers' code runs from checkpoint directories only"
        )
    if name in MULTIMODAL:
        raise ParameterError("model_impl", model_impl, f"{name} runs natively only")
    if config.get("quantization_config") is not None:
        raise config.error("quantization_config", "none: transformers' code runs without quantisation here")
    for key in _LENGTHS:
        if config.get(key) is not None:
            own = next((name for name in _WIDTHS if config.get(name) is not None), _WIDTHS[0])
            hidden = config.integer(own)
            longest = config.integer(key)
            return Plan(path, "transformers", name, checkpoint_dtype(config), longest, hidden)
    raise config.error("max_position_embeddings", "the context length of the model")


def check_quantization(plan: Plan, wanted: str | None, field: str) -> None:
    """Raise ParameterError unless the option ``field``, a quantisation at load, agrees with how weights are stored."""
    if wanted in (None, plan.quantization):
        return
    if plan.quantization is not None:
        raise ParameterError(field, wanted, f"the checkpoint is in {plan.quantization} already")
    if wanted not in AT_LOAD:
        raise ParameterError(
            field,
            wanted,
            f"the checkpoint's weights are floats; {' or '.join(AT_LOAD)} quantises them at load",
        )
