"""The scales of an fp8 key/value cache that a checkpoint stores: one number for a layer's keys, one for its values."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import numpy as np

from vllmlite.errors import ModelError
from vllmlite.weights.host import FLOAT_DTYPES, HostTensor, float_values

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\..*?(?:\b(k|v|kv)_scale|\b([kv])_proj\.output_scale)$")


def layer_scales(
    stored: Mapping[str, HostTensor], first: int, num_layers: int
) -> tuple[tuple[float, float], ...]:
    """Return the scales of each layer's keys and values, given the tensors ``stored`` for them by name; empty if there
    are none. Layers are counted from ``first``.

    The tensors are named ``k_scale`` and ``v_scale``, after the layer's attention or its projections, or ``kv_scale``
    for both. Raises ModelError if some are missing, or if one is not a positive number."""
    found: dict[tuple[int, str], float] = {}
    for name, tensor in stored.items():
        if match := _NAME.search(name):
            for part in match[2] or match[3]:
                found.setdefault((int(match[1]), part), _value(name, tensor))
    if not found:
        logger.warning("the checkpoint has no scales for an fp8 key/value cache: 1.0 is used")
        return ()
    layers = range(first, first + num_layers)
    for layer in layers:
        for part in "kv":
            if (layer, part) not in found:
                raise ModelError(
                    f"layer {layer}: {part}_scale is missing, and other scales of an fp8 key/value cache are stored"
                )
    return tuple((found[layer, "k"], found[layer, "v"]) for layer in layers)


def _value(name: str, tensor: HostTensor) -> float:
    values = float_values(tensor) if tensor.dtype in FLOAT_DTYPES else np.zeros(0)
    if values.size != 1 or not 0 < values.flat[0] < np.inf:
        raise ModelError(
            f"tensor {name!r}: expected one positive number, the scale of an fp8 key/value cache; "
            f"found {tensor.dtype} {list(tensor.shape)}: choose another --kv-cache-dtype"
        )
    return float(values.flat[0])
