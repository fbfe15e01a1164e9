"""Random Medusa heads in the authors' form and in vLLM's, and what they draft."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from eagle_heads import Floats, Shape

from vllmlite.weights.host import float_tensor
from vllmlite.weights.safetensors import write_safetensors

HEADS, BLOCKS = 4, 2


@dataclass
class Heads:
    """Heads that were written to a directory."""

    blocks: list[list[tuple[Floats, Floats]]]
    outputs: list[Floats]
    states: tuple[int, ...] = (-1,)

    def drafts(
        self,
        token_ids: Sequence[int],
        states: Sequence[Floats],
        table: Floats,
        count: int,
        output: Callable[[Floats], Floats],
    ) -> list[int]:
        """Return the drafts after ``token_ids``; ``states`` are those of all but the last token."""
        found = []
        for blocks, out in zip(self.blocks[:count], self.outputs, strict=False):
            x = states[0][-1]
            for weight, bias in blocks:
                y = weight @ x + bias
                x = x + y / (1 + np.exp(-y))
            found.append(int((out @ x).argmax()))
        return found


def write_medusa(path: Path, shape: Shape, form: str) -> Heads:
    """Write random heads to ``path`` in the form ``authors`` or ``vllm``."""
    rng, size = np.random.default_rng(0), shape.hidden

    def random(*shape: int) -> Floats:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    heads = Heads(
        [[(random(size, size), random(size)) for _ in range(BLOCKS)] for _ in range(HEADS)],
        [random(shape.vocab, size) for _ in range(HEADS)],
    )
    tensors: dict[str, Floats] = {}
    for head, (blocks, output) in enumerate(zip(heads.blocks, heads.outputs, strict=True)):
        for number, (weight, bias) in enumerate(blocks):
            name = f"{head}.{number}.linear" if form == "authors" else f"blocks.{head}.layers.{number}"
            tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
        tensors[f"{head}.{BLOCKS}.weight" if form == "authors" else f"lm_heads.{head}.weight"] = output
    stored = {name: float_tensor(values, "float32") for name, values in tensors.items()}
    config: dict[str, object] = {"medusa_num_heads": HEADS, "medusa_num_layers": BLOCKS}
    if form == "vllm":
        config = {"model_type": "medusa", "num_heads": HEADS, "hidden_size": size, "vocab_size": shape.vocab}
    path.mkdir(parents=True)
    file = "medusa_lm_head.safetensors" if form == "authors" else "model.safetensors"
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    write_safetensors(path / file, stored.values(), layout)
    (path / "config.json").write_text(json.dumps(config))
    return heads
