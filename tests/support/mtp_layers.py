"""Random MTP layers added to checkpoints, and what they draft: the decoder layer is transformers', without a cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from numpy.typing import NDArray

from vllmlite.weights.host import float_tensor
from vllmlite.weights.safetensors import read_safetensors, write_safetensors

Floats = NDArray[np.float32]
NAMES = {
    "qwen": ("mtp.", "mtp.layers.0.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
    "mimo": (
        "model.mtp_layers.0.", "model.mtp_layers.0.", "token_layernorm", "hidden_layernorm", "input_proj",
        "final_layernorm",
    ),
}  # fmt: skip
"""Names of each layout's modules: the prefixes of all and of the decoder layer's, and those around that layer."""


@dataclass
class MtpLayer:
    """An MTP layer that was added to a checkpoint."""

    layer: Any
    """transformers' model of one layer, whose final norm is the MTP layer's."""
    norms: list[Floats]
    """Weights of the norms of the embedding and of the hidden state."""
    projection: Floats
    hidden_first: bool
    eps: float
    states: tuple[int, ...] = (-1,)

    def drafts(
        self,
        token_ids: Sequence[int],
        states: Sequence[Floats],
        table: Floats,
        count: int,
        output: Callable[[Floats], Floats],
    ) -> list[int]:
        """Return the ``count`` drafts after ``token_ids``. ``states`` are the final hidden states of all but the last
        token, ``table`` the model's embeddings, and ``output`` its output layer."""
        torch = pytest.importorskip("torch")
        (hidden,), ids, found = states, list(token_ids[1:]), []
        for _ in range(count):
            parts = [
                x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * weight
                for x, weight in zip((table[ids], hidden), self.norms, strict=True)
            ]
            joined = np.concatenate(parts[::-1] if self.hidden_first else parts, axis=1)
            with torch.inference_mode():
                embedded = torch.from_numpy((joined @ self.projection.T).astype(np.float32))
                own = self.layer(inputs_embeds=embedded[None]).last_hidden_state[0].numpy()
            found.append(int(output(own[-1]).argmax()))
            ids.append(found[-1])
            hidden = np.concatenate([hidden, own[-1:]])
        return found


def write_with_mtp(path: Path, layout: str, family: str, **changes: Any) -> tuple[Any, MtpLayer]:
    """Write a random checkpoint of ``family`` with an MTP layer to ``path``; return transformers' model without it, and
    the layer."""
    model = write_checkpoint(path, family, **changes)
    inner = write_checkpoint(path / "layer", family, seed=1, **changes | {"num_hidden_layers": 1}).model
    size, rng = model.config.hidden_size, np.random.default_rng(2)
    norms = [rng.normal(1, 0.2, size).astype(np.float32) for _ in range(2)]
    projection = rng.normal(0, 0.1, (size, 2 * size)).astype(np.float32)
    prefix, layer, embedding_norm, hidden_norm, fc, norm = NAMES[layout]
    stored = read_safetensors(path / "model.safetensors")
    stored = {name: float_tensor(tensor.data.view("<f4").reshape(tensor.shape), "float32")
              for name, tensor in stored.items()}  # fmt: skip
    own = {
        embedding_norm: norms[0],
        hidden_norm: norms[1],
        fc: projection,
        norm: inner.norm.weight.detach().numpy(),
    }
    stored |= {f"{prefix}{name}.weight": float_tensor(values, "float32") for name, values in own.items()}
    for name, tensor in read_safetensors(path / "layer" / "model.safetensors").items():
        if name.startswith("model.layers.0."):
            stored[name.replace("model.layers.0.", layer)] = tensor
    (path / "model.safetensors").unlink()
    write_safetensors(
        path / "model.safetensors",
        stored.values(),
        {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()},
    )
    config = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    if layout == "mimo":
        config |= {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True}
    (path / "config.json").write_text(json.dumps(config))
    return model, MtpLayer(inner, norms, projection, layout == "mimo", model.config.rms_norm_eps)
