"""LoRA adapters (Hu et al. 2021) in host memory: the form in which they are read from files and put into models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import HostTensor

EMBEDDING, HEAD = "embedding", "head"
"""Names of the input embedding, as a weight ``[hidden, V]`` that multiplies rows with a one at the token's id, and of
the output layer ``[V, hidden]``, among the weights that adapters change."""
GAIN = "gain"
"""Name of :attr:`LowRank.gain` among :data:`ABILITIES`."""
EXPERTS = "experts"
"""Name of the weights of mixtures of experts, with their routers, among :data:`ABILITIES`."""
ABILITIES = frozenset((EMBEDDING, HEAD, GAIN, EXPERTS))
"""Kinds of changes, besides those of a decoder's linear layers, that adapters may make. Not all backends support all of
them."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change ``scale * b @ a`` of one weight ``[out, in]``.

    ``a`` is ``[rank, in]`` and ``b`` is ``[out, rank]``, whatever the orientation of the checkpoint's own tensor; each
    has one of :data:`~vllmlite.weights.host.FLOAT_DTYPES` and is converted to the backend's dtype when it is loaded.
    Each weight of a fused projection has a LowRank of its own, with the same ``a`` and different rows of ``b``."""

    a: HostTensor
    b: HostTensor
    scale: float
    """Factor of the product, such as ``lora_alpha / r``; applied in float32."""
    gain: NDArray[np.float32] | None = None
    """``[2, out]``: before the low-rank product is added, the results of the base weight are multiplied by the first
    row, and the second row is added to them. None: they are not changed."""

    @property
    def rank(self) -> int:
        """The rank of the change."""
        return self.a.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of both factors."""
        return self.a.data.size + self.b.data.size + (0 if self.gain is None else self.gain.nbytes)

    @property
    def is_whole(self) -> bool:
        """Whether the change replaces the weight completely."""
        return self.gain is not None and not self.gain.any()


@dataclass(frozen=True, slots=True)
class Adapter:
    """The changes that an adapter makes to a model.

    ``weights`` holds them by names from ``models.adapters.places``, such as ``3.q`` for the query projection of layer
    3. Weights that are not in it stay as they are."""

    digest: str
    """Identifies contents and dtype: equal digests mean equal results. It becomes part of the block hashes."""
    weights: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """Largest rank of the adapter's changes, except those that replace whole weights."""
        return max((change.rank for change in self.weights.values() if not change.is_whole), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of its changes."""
        return sum(change.num_bytes for change in self.weights.values())


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """Limits of adapters on the device: their number, and the largest rank of their changes. Changes that replace whole
    weights have no limit.

    Resident adapters have the indices 1 to ``max_adapters``; index 0 stands for no adapter."""

    max_adapters: int
    max_rank: int
