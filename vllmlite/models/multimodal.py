"""Vision-language models whose language model is one of the families here; only text is supported.

The vision tower is neither loaded nor counted. For text, Qwen2-VL's multi-section rotary positions are ordinary ones,
because all sections have the same position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.keys import Keys


@dataclass(frozen=True, slots=True)
class Shell:
    """A vision-language model around a language model."""

    title: str
    family: str
    """The language model's architecture."""
    model_type: str
    """The language model's model type in ``text_config`` and in the table of defaults."""
    tied: bool
    """transformers' default of ``tie_word_embeddings``."""
    flat: bool = False
    """Whether old configurations have the language model's values at the top level, beside ``vision_config``."""


MULTIMODAL: dict[str, Shell] = {
    "Gemma3ForConditionalGeneration": Shell("Gemma 3 with images", "Gemma3ForCausalLM", "gemma3_text", True),
    "Mistral3ForConditionalGeneration": Shell("Mistral Small 3", "MistralForCausalLM", "mistral", True),
    "Qwen2VLForConditionalGeneration": Shell(
        "Qwen2-VL", "Qwen2ForCausalLM", "qwen2_vl_text", False, flat=True
    ),
    "Qwen2_5_VLForConditionalGeneration": Shell(
        "Qwen2.5-VL", "Qwen2ForCausalLM", "qwen2_5_vl_text", False, flat=True
    ),
}
"""Vision-language models by the name in ``architectures``."""

_RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "model."),
)
_VISION = r"^(model\.)?(vision_tower|multi_modal_projector|visual)\."


def family_of(architecture: str) -> str:
    """Return the architecture of the language model that computes the text of ``architecture``, often itself."""
    return MULTIMODAL[architecture].family if architecture in MULTIMODAL else architecture


def text_config(config: HfConfig, shell: Shell) -> HfConfig:
    """Return the language model's configuration from that of the whole model."""
    text = config.section("text_config")
    if text is not None:
        text.choice("model_type", {shell.model_type: shell.model_type}, shell.model_type)
    elif shell.flat:
        text = config
    else:
        text = HfConfig({}, f"{config.where}: text_config")
    dtype = config.get("dtype") or config.get("torch_dtype")
    if text.get("torch_dtype") is None and dtype is not None:
        text = text.default(dtype=dtype)
    if config.get("quantization_config") is not None:
        text = text.default(quantization_config=config.get("quantization_config"))
    tied = [
        config.boolean("tie_word_embeddings", shell.tied), text.boolean("tie_word_embeddings", False)
    ]  # fmt: skip
    return _without_sections(text.fixed(tie_word_embeddings=any(tied)))


def text_keys(keys: Keys) -> Keys:
    """Return the names of the language model's tensors beside a vision tower, in old and new checkpoints."""
    return replace(keys, renames=_RENAMES, unread=_VISION)


def _without_sections(text: HfConfig) -> HfConfig:
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.get(key)
        if isinstance(rope, dict) and "mrope_section" in rope:
            plain = {name: value for name, value in rope.items() if name not in ("mrope_section", "type")}
            kind = rope.get("rope_type", rope.get("type", "default"))
            text = text.fixed(**{key: {**plain, "rope_type": "default" if kind == "mrope" else kind}})
    return text
