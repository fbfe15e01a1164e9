"""How a checkpoint would run, from its ``config.json`` alone: on the decoder here, or on transformers' own code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllmlite.backends.base import Op
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.cuda import CudaBackend
from vllmlite.errors import BackendError, ModelError, ParameterError
from vllmlite.models.families import FAMILIES, architecture, read_spec
from vllmlite.models.hf_config import HfConfig, checkpoint_dtype

IMPLEMENTATIONS = ("auto", "native", "transformers")
_LENGTHS = ("max_position_embeddings", "n_positions", "seq_length", "n_ctx", "max_sequence_length")


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
    ops: frozenset[Op] = frozenset()
    """What it needs beyond what every backend has."""

    def __str__(self) -> str:
        """For the line that is printed at start."""
        return f"{self.architecture} through {'transformers' if self.backends else 'the native decoder'}"

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends that it is confined to; empty: of none in particular."""
        return ("torch",) if self.implementation == "transformers" else ()


def declining(plan: Plan) -> dict[str, str]:
    """The backends that cannot run it wherever they are, and why."""
    reasons = {}
    for backend in (CpuBackend, CudaBackend):
        try:
            backend.check_ops(plan.ops, plan.architecture)
        except BackendError as error:
            reasons[backend.name] = str(error)
        if plan.backends and backend.name not in plan.backends:
            reasons[backend.name] = f"{plan.architecture} runs on {', '.join(plan.backends)} alone"
    return reasons


def plan_model(path: Path, model_impl: str = "auto") -> Plan:
    """The plan for the checkpoint in directory ``path``; ``auto`` takes transformers' code where there is no family
    for it. ModelError or ParameterError say why there is none; torch is not imported."""
    if model_impl not in IMPLEMENTATIONS:
        raise ParameterError("model_impl", model_impl, ", ".join(IMPLEMENTATIONS))
    config = HfConfig.read(path)
    name = architecture(config)
    if model_impl == "native" or (model_impl == "auto" and name in FAMILIES):
        spec = read_spec(path)
        return Plan(
            "native",
            name,
            spec.dtype,
            spec.max_position_embeddings,
            spec.output_size,
            spec.quantization,
            spec.required_ops(),
        )
    if path.is_file():
        raise ModelError(
            f"{path}: {name} has no native family, and transformers' code runs from directories alone"
        )
    if config.get("auto_map") is not None:
        raise ModelError(f"{path}: {name} needs code of its own (auto_map), which is never run")
    if config.get("quantization_config") is not None:
        raise config.error("quantization_config", "none where transformers' code runs")
    for key in _LENGTHS:
        if config.get(key) is not None:
            own = {} if config.get("hidden_size") is not None else {"hidden_size": "n_embd"}
            hidden = config.spelling(**own).integer("hidden_size")
            return Plan("transformers", name, checkpoint_dtype(config), config.integer(key), hidden)
    raise config.error("max_position_embeddings", "the longest sequence of the model")
