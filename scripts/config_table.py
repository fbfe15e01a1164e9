#!/usr/bin/env python3
"""Print vllmlite/models/config_keys.json: the configuration keys of every family with their defaults in the installed
transformers. Usage: PYTHONPATH=. scripts/config_table.py"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllmlite.models.families import FAMILIES
from vllmlite.models.multimodal import MULTIMODAL


def table() -> dict[str, Any]:
    """Return the file's content."""
    families = {family.model_type for family in FAMILIES.values()}
    model_types = sorted(families | {shell.model_type for shell in MULTIMODAL.values()})
    return {
        "transformers": transformers.__version__,
        "families": {model_type: _family(CONFIG_MAPPING[model_type]) for model_type in model_types},
    }


def _family(config_class: Any) -> dict[str, Any]:
    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    keys = {
        field.name: field.default for field in dataclasses.fields(config_class) if field.name not in common
    }
    theta = getattr(config_class, "default_theta", None)
    if isinstance(theta, float):
        keys["rope_theta"] = theta
    return {"keys": keys, "aliases": dict(config_class.attribute_map)}


if __name__ == "__main__":
    print(json.dumps(table(), indent=1))
