"""The measured checkpoints: the given one, quantised ones, and ones whose tokenizer is as large as the vocabulary; and
the cost of a token in them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any


class Models:
    """``base`` is a bfloat16 checkpoint. Derived checkpoints are created in ``directory`` and kept there."""

    def __init__(self, base: Path, directory: Path) -> None:
        self.base = base.resolve()
        self._directory = directory
        self.config: dict[str, Any] = json.loads((base / "config.json").read_text())

    def checkpoint(self, weights: str) -> Path:
        """Return the model in ``weights`` (bf16, int8, int4), with its tokenizer filled up to the vocabulary size."""
        path = self._directory / f"{self.base.name}-{weights}"
        if (path / "config.json").exists():
            return path
        if weights == "bf16":
            path.mkdir(parents=True)
            for file in self.base.iterdir():
                if file.name not in ("tokenizer.json", "config.json"):
                    (path / file.name).symlink_to(file)
            tokenizer = json.loads((self.base / "tokenizer.json").read_text())
            _fill(tokenizer, self.config["vocab_size"])
            (path / "tokenizer.json").write_text(json.dumps(tokenizer))
            (path / "config.json").symlink_to(self.base / "config.json")
            return path
        command = [sys.executable, "-m", "vllmlite", "quantize", "--model", str(self.checkpoint("bf16"))]
        options = ["--quantization", weights, "--output", str(path)]
        made = subprocess.run([*command, *options], capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"vllmlite quantize: {made.stderr.strip()}")
        return path

    def awq(self) -> Path:
        """Return the configuration of the model as AWQ in groups of 128 columns, for weights that are made up."""
        path = self._directory / f"{self.base.name}-awq"
        path.mkdir(parents=True, exist_ok=True)
        awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
        (path / "config.json").write_text(json.dumps({**self.config, "quantization_config": awq}))
        return path

    def weight_bytes(self, weights: str) -> int:
        """Return the bytes of the checkpoint's tensors."""
        return sum(size for _, _, size in _tensors(self.checkpoint(weights)))

    def decode_bytes(self, weights: str) -> int:
        """Return the weight bytes that a decode step reads: all but an embedding that is not also the output layer."""
        tensors = _tensors(self.checkpoint(weights))
        untied = any(name.startswith("lm_head.") for name, _, _ in tensors)
        return sum(
            size for name, _, size in tensors if not (untied and name.startswith("model.embed_tokens."))
        )

    def prefill_flops(self) -> int:
        """Return multiply and add operations per prompt token in the layers' matrix products, without attention."""
        return sum(2 * math.prod(shape) for name, shape, _ in _tensors(self.base) if "_proj.weight" in name)

    def kv_bytes(self) -> int:
        """Return bytes of keys and values per token in bfloat16."""
        heads = self.config["num_attention_heads"]
        head_dim = self.config.get("head_dim") or self.config["hidden_size"] // heads
        return int(2 * 2 * self.config["num_hidden_layers"] * self.config["num_key_value_heads"] * head_dim)


def _fill(tokenizer: dict[str, Any], size: int) -> None:
    """Add merges of known pairs to a BPE tokenizer until it has ``size`` entries."""
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    known = [token for token in vocab if token not in special]
    pairs = ((left, right) for right in known for left in known[256:])
    while len(vocab) < size:
        left, right = next(pairs)
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])


@cache
def _tensors(directory: Path) -> list[tuple[str, list[int], int]]:
    """Return name, shape and bytes of each tensor of a safetensors checkpoint."""
    found = []
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found.append((name, entry["shape"], end - begin))
    return found
