"""Medusa heads (Cai et al. 2024): each guesses one of the tokens after the next, from the final hidden state.

A head is one or more residual blocks ``x + silu(W x + b)`` and an output layer. Head i at position p guesses token
p + 2 + i.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vllmlite.backends.base import Backend, LinearWeight
from vllmlite.backends.batch import Tensor
from vllmlite.errors import ModelError
from vllmlite.models.hf_config import HfConfig
from vllmlite.weights.checkpoint import listed, read_tensors
from vllmlite.weights.host import FLOAT_DTYPES, HostTensor
from vllmlite.weights.pt import read_pt
from vllmlite.weights.safetensors import read_safetensors

_FILES = {"medusa_lm_head.safetensors": read_safetensors, "medusa_lm_head.pt": read_pt}
"""Files that hold only heads, in the form of the authors' code, with their readers."""
_BLOCK = re.compile(
    r"^(?:medusa_heads?\.)?(?:blocks\.)?(\d+)\.(?:layers\.)?(\d+)\.(?:linear\.)?(weight|bias)$"
)
_OUTPUT = re.compile(r"^(?:medusa_heads?\.)?lm_heads\.(\d+)\.weight$")


class MedusaHeads:
    """The heads of a checkpoint on the backend of the target model."""

    def __init__(self, path: Path, backend: Backend, hidden_size: int, vocab_size: int) -> None:
        """Load heads in the authors' form or in vLLM's, for a model of these sizes. Raises ModelError."""
        self.backend, self.hidden_size = backend, hidden_size
        config = HfConfig.read(path)
        config.require("hidden_size", hidden_size, "the model's")
        config.require(
            "truncated_vocab_size", vocab_size, "heads over a part of the vocabulary are not supported"
        )
        stored = next((read(path / name) for name, read in _FILES.items() if (path / name).exists()), None)
        tensors = read_tensors(path) if stored is None else stored
        blocks: dict[tuple[int, int], dict[str, HostTensor]] = {}
        outputs: dict[int, HostTensor] = {}
        unknown = []
        for name, tensor in tensors.items():
            if (match := _OUTPUT.search(name)) is not None:
                outputs[int(match[1])] = _checked(path, name, tensor, (vocab_size, hidden_size))
            elif (match := _BLOCK.search(name)) is not None and match[3] == "bias":
                blocks.setdefault((int(match[1]), int(match[2])), {})["bias"] = _checked(
                    path, name, tensor, (hidden_size,)
                )
            elif match is not None and tensor.shape == (vocab_size, hidden_size):
                outputs[int(match[1])] = _checked(path, name, tensor, tensor.shape)
            elif match is not None:
                blocks.setdefault((int(match[1]), int(match[2])), {})["weight"] = _checked(
                    path, name, tensor, (hidden_size, hidden_size)
                )
            else:
                unknown.append(name)
        if unknown:
            raise ModelError(f"{path}: unexpected tensors: {listed(unknown)}")
        depth = max((layer for _, layer in blocks), default=-1) + 1
        wanted = [(head, layer) for head in range(len(outputs)) for layer in range(depth)]
        if not outputs or sorted(outputs) != list(range(len(outputs))) or sorted(blocks) != wanted:
            raise ModelError(
                f"{path}: expected Medusa heads, each with the same number of blocks and an output layer"
            )
        for place, parts in blocks.items():
            if "weight" not in parts:
                raise ModelError(f"{path}: block {place[1]} of head {place[0]} has no weight")
        self._heads: list[tuple[Sequence[LinearWeight], LinearWeight]] = []
        for head in range(len(outputs)):
            linear = [
                backend.linear_weight(
                    [blocks[head, layer]["weight"]],
                    [b for b in [blocks[head, layer].get("bias")] if b is not None],
                )
                for layer in range(depth)
            ]
            self._heads.append((linear, backend.linear_weight([outputs[head]])))

    def __len__(self) -> int:
        return len(self._heads)

    def logits(self, head: int, hidden: Tensor) -> Tensor:
        """Return the float32 logits ``[N, V]`` of one head for final hidden states ``[N, hidden]``."""
        blocks, output = self._heads[head]
        for block in blocks:
            hidden = self.backend.add(
                hidden, self.backend.activation(self.backend.linear(hidden, block), "silu")
            )
        return self.backend.logits(hidden, output)


def _checked(path: Path, name: str, tensor: HostTensor, shape: tuple[int, ...]) -> HostTensor:
    if tensor.shape != shape or tensor.dtype not in FLOAT_DTYPES:
        raise ModelError(
            f"{path}: tensor {name!r}: expected {list(shape)} of {', '.join(FLOAT_DTYPES)}; "
            f"found {list(tensor.shape)} of {tensor.dtype}"
        )
    return tensor
