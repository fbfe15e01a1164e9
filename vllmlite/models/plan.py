"""How a checkpoint would run, from its ``config.json`` alone: on the decoder here, or on transformers' own code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllmlite.errors import ModelError, ParameterError
from vllmlite.models.families import FAMILIES, architecture, read_spec
from vllmlite.models.hf_config import HfConfig, checkpoint_dtype
from vllmlite.models.shells import SHELLS
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
"""Most experts of a layer that the cuda backend has room to count (``kMostExperts`` in ``csrc/cuda/moe.cu``)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of a model before a backend is chosen."""

    implementation: str
    """``native`` or ``transformers``."""
    architecture: str
    dtype: str
    max_position_embeddings: int
    hidden_size: int
    quantization: str | None = None
    able: tuple[str, ...] = ()
    """Names of the backends that have what its kind lacks elsewhere; empty: all have."""
    spec: DecoderSpec | None = None
    """What the native decoder makes of it."""

    def __str__(self) -> str:
        """For the line that is printed at start."""
        native = self.implementation == "native"
        return f"{self.architecture} through {'the native decoder' if native else 'transformers'}"

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends that it is confined to; empty: to none in particular."""
        return self.able if self.implementation == "native" else ("torch",)


def declining(plan: Plan) -> dict[str, str]:
    """The backends that cannot run it wherever they are, and why."""
    reasons: dict[str, str] = {}
    if plan.backends:
        only = f"{plan.architecture} runs on {', '.join(plan.backends)} alone"
        reasons |= {name: only for name in ("cpu", "cuda") if name not in plan.backends}
    return reasons


def _on_cuda(spec: DecoderSpec) -> bool:
    """Whether the cuda backend has all that it takes."""
    experts = max(0 if layer.moe is None else layer.moe.num_experts for layer in spec.layers)
    return spec.qk_norm != "layer" and experts <= CUDA_EXPERTS


def plan_model(path: Path, model_impl: str = "auto") -> Plan:
    """The plan for the checkpoint in directory ``path``; ``auto`` takes transformers' code where there is no family
    for it. ModelError or ParameterError say why there is none; torch is not imported."""
    if model_impl not in IMPLEMENTATIONS:
        raise ParameterError("model_impl", model_impl, ", ".join(IMPLEMENTATIONS))
    config = HfConfig.read(path)
    name = architecture(config)
    if model_impl == "native" or (model_impl == "auto" and name in FAMILIES | SHELLS):
        spec = read_spec(path)
        return Plan(
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
            f"{path}: {name} has no native family, and transformers' code runs from directories alone"
        )
    if name in SHELLS:
        raise ParameterError("model_impl", model_impl, f"{name} runs natively alone")
    if config.get("quantization_config") is not None:
        raise config.error("quantization_config", "none where transformers' code runs")
    for key in _LENGTHS:
        if config.get(key) is not None:
            own = next((name for name in _WIDTHS if config.get(name) is not None), _WIDTHS[0])
            hidden = config.integer(own)
            return Plan("transformers", name, checkpoint_dtype(config), config.integer(key), hidden)
    raise config.error("max_position_embeddings", "the longest sequence of the model")
