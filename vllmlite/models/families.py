"""The registry: which architectures there are, and the way from a ``config.json`` to a spec or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vllmlite.models import (
    bloom,
    falcon,
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
)
from vllmlite.models.config_table import check_remaining, with_defaults
from vllmlite.models.gguf import gguf_keys
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.quantization import Quantization
from vllmlite.models.quantization_config import read_quantization
from vllmlite.models.shells import SHELLS, text_config, text_keys
from vllmlite.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one ``architectures`` entry."""

    title: str
    model_type: str
    spec: Callable[[HfConfig, str], DecoderSpec]


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("Llama 1 to 3", "llama", llama.spec),
    "MistralForCausalLM": Family("Mistral", "mistral", mistral.spec),
    "MixtralForCausalLM": Family("Mixtral", "mixtral", mistral.mixtral),
    "Qwen2ForCausalLM": Family("Qwen2, Qwen2.5", "qwen2", qwen2.spec),
    "Qwen2MoeForCausalLM": Family("Qwen2-MoE", "qwen2_moe", qwen2.moe),
    "Qwen3ForCausalLM": Family("Qwen3", "qwen3", qwen3.spec),
    "Qwen3MoeForCausalLM": Family("Qwen3-MoE", "qwen3_moe", qwen3.moe),
    "Phi3ForCausalLM": Family("Phi-3, Phi-4", "phi3", phi3.spec),
    "GemmaForCausalLM": Family("Gemma", "gemma", gemma.spec),
    "Gemma2ForCausalLM": Family("Gemma 2", "gemma2", gemma.gemma2),
    "Gemma3ForCausalLM": Family("Gemma 3, text", "gemma3_text", gemma.gemma3),
    "Olmo2ForCausalLM": Family("OLMo 2", "olmo2", olmo2.spec),
    "GraniteForCausalLM": Family("Granite 3", "granite", granite.spec),
    "SmolLM3ForCausalLM": Family("SmolLM3", "smollm3", smollm3.spec),
    "StableLmForCausalLM": Family("StableLM", "stablelm", stablelm.spec),
    "GPT2LMHeadModel": Family("GPT-2", "gpt2", gpt2.spec),
    "OPTForCausalLM": Family("OPT", "opt", opt.spec),
    "GPTNeoXForCausalLM": Family("GPT-NeoX, Pythia", "gpt_neox", gpt_neox.spec),
    "FalconForCausalLM": Family("Falcon", "falcon", falcon.spec),
    "BloomForCausalLM": Family("BLOOM", "bloom", bloom.spec),
}
"""What ``architectures`` of a ``config.json`` may name."""
RENAMED: dict[str, tuple[str, Callable[[HfConfig], HfConfig]]] = {
    "RWForCausalLM": ("FalconForCausalLM", falcon.refined_web),
}
"""Old names in ``architectures``: today's, and what makes today's configuration of theirs."""


def read_spec(path: Path) -> DecoderSpec:
    """The spec of the checkpoint in directory ``path``, from its ``config.json`` alone, or of the GGUF file ``path``.
    ModelError if it is not one that can run; needs no backend."""
    config = HfConfig.read(path)
    name = architecture(config)
    if name in SHELLS:
        return _text_spec(config, name, path)
    if name not in FAMILIES:
        raise config.error("architectures", f"{', '.join(FAMILIES)}; or --model-impl transformers")
    family = FAMILIES[name]
    for old, (_, renewed) in RENAMED.items():
        if config.get("architectures") == [old]:
            config = renewed(config)
    if path.is_file():
        return replace(family.spec(config, name), keys=gguf_keys(path))
    return _checked_spec(config, name, family, family.model_type, read_quantization(config, path))


def _text_spec(config: HfConfig, name: str, path: Path) -> DecoderSpec:
    """The spec of the language model in a model of text and images."""
    shell = SHELLS[name]
    text = text_config(config, shell)
    quantization = read_quantization(text, path)
    spec = _checked_spec(text, name, FAMILIES[shell.family], shell.model_type, quantization)
    return replace(spec, keys=text_keys(spec.keys))


def _checked_spec(
    config: HfConfig, name: str, family: Family, model_type: str, quantization: Quantization | None
) -> DecoderSpec:
    spec = replace(family.spec(with_defaults(config, model_type), name), quantization=quantization)
    check_remaining(config, model_type)
    return spec


def architecture(config: HfConfig) -> str:
    """What ``architectures`` names, or else the model type stands for. ModelError, which says what kind of model it
    is instead, for everything that is not a decoder of text."""
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str) and named[0] in SHELLS:
        return named[0]
    for section in ("vision_config", "audio_config", "speech_config"):
        if config.get(section) is not None:
            raise config.error(section, "none: models of images or sound are not supported, only of text")
    if config.get("is_encoder_decoder"):
        raise config.error("is_encoder_decoder", "false: models with an encoder are not supported")
    if not named:
        return config.choice("model_type", {family.model_type: name for name, family in FAMILIES.items()})
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise config.error("architectures", "a list of names")
    name = RENAMED[named[0]][0] if named[0] in RENAMED else named[0]
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        kinds = {
            "ForConditionalGeneration": "models of images or sound, or with an encoder,",
            "ForMaskedLM": "encoders",
            "Classification": "classifiers",
            "ForQuestionAnswering": "encoders",
            "Model": "models without an output layer",
        }
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "such models")
        raise config.error(
            "architectures", f"decoders of text, whose names end in ForCausalLM; {kind} are not supported"
        )
    return name
