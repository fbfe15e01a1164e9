"""The registry of model architectures; reads a ``config.json`` into a spec, or refuses it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vllmlite.models import (
    bloom,
    falcon,
    gemma,
    gpt2,
    gpt_neox,
    gpt_oss,
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
from vllmlite.models.keys import MTP_COUNTS, Keys
from vllmlite.models.multimodal import MULTIMODAL, text_config, text_keys
from vllmlite.models.quantization import Quantization
from vllmlite.models.quantization_config import read_quantization
from vllmlite.models.spec import DecoderSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Family:
    """A model family, known by one name in ``architectures``."""

    title: str
    model_type: str
    spec: Callable[[HfConfig, str], DecoderSpec]
    cuda: bool = True
    """Whether the cuda backend has all ops that it needs."""
    bfloat16: bool = True
    """Whether its float checkpoints are published in bfloat16. If so, some activations may exceed float16's range, and
    float16 in the configuration of a checkpoint that a tool has quantised is the tool's choice, not the model's."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("Llama 1 to 3", "llama", llama.spec, bfloat16=False),
    "MistralForCausalLM": Family("Mistral", "mistral", mistral.spec),
    "MixtralForCausalLM": Family("Mixtral", "mixtral", mistral.mixtral),
    "Qwen2ForCausalLM": Family("Qwen2, Qwen2.5, MiMo", "qwen2", qwen2.spec),
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
    "StableLmForCausalLM": Family("StableLM", "stablelm", stablelm.spec, bfloat16=False),
    "GptOssForCausalLM": Family("gpt-oss", "gpt_oss", gpt_oss.spec, cuda=False),
    "GPT2LMHeadModel": Family("GPT-2", "gpt2", gpt2.spec, bfloat16=False),
    "OPTForCausalLM": Family("OPT", "opt", opt.spec, bfloat16=False),
    "GPTNeoXForCausalLM": Family("GPT-NeoX, Pythia", "gpt_neox", gpt_neox.spec, bfloat16=False),
    "FalconForCausalLM": Family("Falcon", "falcon", falcon.spec),
    "BloomForCausalLM": Family("BLOOM", "bloom", bloom.spec, bfloat16=False),
}
"""Families by the name in ``architectures`` of ``config.json``."""
RENAMED: dict[str, tuple[str, Callable[[HfConfig], HfConfig]]] = {
    "RWForCausalLM": ("FalconForCausalLM", falcon.refined_web),
    "MiMoForCausalLM": ("Qwen2ForCausalLM", qwen2.mimo),
}
"""Other names in ``architectures``: the name of the family, and a function that converts the configuration."""


def read_spec(path: Path) -> DecoderSpec:
    """Return the spec of the checkpoint directory ``path``, from its ``config.json`` only, or of the GGUF file
    ``path``.

    Needs no backend. Raises ModelError if the model cannot run."""
    config = HfConfig.read(path)
    name = architecture(config)
    if name in MULTIMODAL:
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


def checkpoint_keys(path: Path, spec: DecoderSpec) -> Keys:
    """Return the names that tensors of the model ``spec`` at ``path`` have in Hugging Face's format."""
    if not path.is_file():
        return spec.keys
    config = HfConfig.read(path)
    name = architecture(config)
    return FAMILIES[name].spec(config, name).keys


def _text_spec(config: HfConfig, name: str, path: Path) -> DecoderSpec:
    """Return the spec of the language model inside a vision-language model."""
    shell = MULTIMODAL[name]
    text = text_config(config, shell)
    quantization = read_quantization(text, path)
    spec = _checked_spec(text, name, FAMILIES[shell.family], shell.model_type, quantization)
    return replace(spec, keys=text_keys(spec.keys))


def _checked_spec(
    config: HfConfig, name: str, family: Family, model_type: str, quantization: Quantization | None
) -> DecoderSpec:
    spec = replace(family.spec(with_defaults(config, model_type), name), quantization=quantization)
    config.without_effect(*MTP_COUNTS)
    check_remaining(config, model_type)
    quantised_elsewhere = quantization is not None and not quantization.own
    if quantised_elsewhere and spec.dtype == "float16" and family.bfloat16:
        logger.info("%s: computing in bfloat16, like float checkpoints of %s", config.where, family.title)
        spec = replace(spec, dtype="bfloat16")
    return spec


def architecture(config: HfConfig) -> str:
    """Return the name in ``architectures``, or the one of the ``model_type`` if there is none.

    Raises ModelError, naming the kind of model, for anything but a text decoder."""
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str) and named[0] in MULTIMODAL:
        return named[0]
    for section in ("vision_config", "audio_config", "speech_config"):
        if config.get(section) is not None:
            raise config.error(section, "none: vision and audio models are not supported, only text models")
    if config.get("is_encoder_decoder"):
        raise config.error("is_encoder_decoder", "false: models with an encoder are not supported")
    if not named:
        return config.choice("model_type", {family.model_type: name for name, family in FAMILIES.items()})
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise config.error("architectures", "a list of names")
    name = RENAMED[named[0]][0] if named[0] in RENAMED else named[0]
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        kinds = {
            "ForConditionalGeneration": "vision, audio and encoder-decoder models",
            "ForMaskedLM": "encoders",
            "Classification": "classifiers",
            "ForQuestionAnswering": "encoders",
            "Model": "models without an output layer",
        }
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "such models")
        raise config.error(
            "architectures", f"text decoders, whose names end in ForCausalLM; {kind} are not supported"
        )
    return name
