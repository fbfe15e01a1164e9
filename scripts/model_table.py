#!/usr/bin/env python3
"""Print README's table of model families: PYTHONPATH=. scripts/model_table.py"""

from __future__ import annotations

from vllmlite.models.families import FAMILIES
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.plan import Plan, declining

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
}  # fmt: skip
"""What a configuration must say, and Granite's all do; for everything else a family has a default."""


def table() -> list[str]:
    """The lines of the table. A family runs on a backend if it does so with its defaults."""
    lines = ["| family | `architectures` | cpu | cuda | torch |", "|---|---|---|---|---|"]
    for name, family in FAMILIES.items():
        spec = family.spec(HfConfig(SIZES, "defaults"), name)
        plan = Plan("native", name, spec.dtype, 64, spec.hidden_size, ops=spec.required_ops())
        runs = ["no" if backend in declining(plan) else "yes" for backend in ("cpu", "cuda", "torch")]
        lines.append(f"| {family.title} | `{name}` | {' | '.join(runs)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
