"""The weights of a model that LoRA adapters can change."""

from __future__ import annotations

from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources
from vllmlite.weights.adapter import AdapterLimits
from vllmlite.weights.host import ITEM_SIZE
from vllmlite.weights.parts import HEAD


def places(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Return the shape ``[out, in]`` of each weight that adapters can change.

    The names are those of :func:`~vllmlite.models.tensors.sources` without ``.weight``, such as ``3.q`` or ``3.down``.
    The sources say which module of the checkpoint, and which rows of it, each weight comes from."""
    return {
        name.removesuffix(".weight"): (source.shape[0], source.shape[1])
        for name, source in sources(spec).items()
        if source.product and name != HEAD and ".experts." not in name
    }


def most_bytes(spec: DecoderSpec, limits: AdapterLimits, dtype: str) -> int:
    """Return the bytes of as many adapters as may be resident, of the largest rank and in all places."""
    elements = sum(out + columns for out, columns in places(spec).values()) * limits.max_rank
    return elements * ITEM_SIZE[dtype] * limits.max_adapters
