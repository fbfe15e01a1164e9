"""Mistral (Jiang et al. 2023): Llama without biases and, where ``sliding_window`` is set, a window in every layer."""

from __future__ import annotations

from vllmlite.models.hf_config import HfConfig, decoder_spec
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """``sliding_window`` may be null: full attention."""
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    return decoder_spec(config, architecture, windows=(window,) * config.integer("num_hidden_layers"))
