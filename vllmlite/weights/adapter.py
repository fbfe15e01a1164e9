"""LoRA adapters (Hu et al. 2021) in host memory: what the reader of adapter files makes and a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllmlite.weights.host import HostTensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change ``scale * b @ a`` of one weight ``[out, in]``.

    ``a`` is ``[rank, in]`` and ``b`` is ``[out, rank]``, whatever the orientation of the checkpoint's own tensor; each
    has one of :data:`~vllmlite.weights.host.FLOAT_DTYPES` and is converted to the backend's dtype when it is loaded.
    The weights of a fused projection have a LowRank each: with the same ``a``, and their own rows of ``b``.
    """

    a: HostTensor
    b: HostTensor
    scale: float
    """Factor of the product, such as ``lora_alpha / r``; applied in float32."""

    @property
    def rank(self) -> int:
        """The rank of the change."""
        return self.a.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of both factors."""
        return self.a.data.size + self.b.data.size


@dataclass(frozen=True, slots=True)
class Adapter:
    """The changes that an adapter makes to a model.

    ``weights`` has them by the names of ``models.adapters.places``, such as ``3.q`` for the query projection of layer
    3. A weight that is not in it stays as it is.
    """

    digest: str
    """Identifies contents and dtype: equal digests mean equal results. It becomes part of the block hashes."""
    weights: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """The largest rank of its changes."""
        return max((change.rank for change in self.weights.values()), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of its changes."""
        return sum(change.num_bytes for change in self.weights.values())


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """How many adapters may be resident on the device at a time, and the largest rank of each of their changes.

    Resident adapters have the indices 1 to ``max_adapters``; index 0 stands for no adapter."""

    max_adapters: int
    max_rank: int
