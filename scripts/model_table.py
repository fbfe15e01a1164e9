#!/usr/bin/env python3
"""Print README's table of model families: PYTHONPATH=. scripts/model_table.py"""

from __future__ import annotations

from pathlib import Path

from vllmlite.models.families import FAMILIES
from vllmlite.models.gguf_families import FAMILIES as GGUF_FAMILIES
from vllmlite.models.multimodal import MULTIMODAL
from vllmlite.models.plan import Plan, declining


def table() -> list[str]:
    """Return the lines of the table; the last row is for models that run through transformers' code."""
    in_gguf = {family.architecture for family in GGUF_FAMILIES.values()}
    lines = ["| family | `architectures` | formats | backends |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        formats = "safetensors, PyTorch" + ", GGUF" * (name in in_gguf)
        lines.append(f"| {family.title} | `{name}` | {formats} | {_backends('native', name)} |")
    for name, shell in MULTIMODAL.items():
        backends = _backends("native", name)
        lines.append(f"| {shell.title}, text alone | `{name}` | safetensors, PyTorch | {backends} |")
    lines.append(f"| any other causal model | | safetensors | {_backends('transformers', 'another')} |")
    return lines


def _backends(implementation: str, architecture: str) -> str:
    able = ("cpu", "torch") if architecture in FAMILIES and not FAMILIES[architecture].cuda else ()
    declined = declining(Plan(Path(), implementation, architecture, "float32", 1, 1, able=able))
    return ", ".join(name for name in ("cpu", "cuda", "torch") if name not in declined)


if __name__ == "__main__":
    print("\n".join(table()))
