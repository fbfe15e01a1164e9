"""The model interface: the methods of a model that the runner calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from vllmlite.backends.base import KVCache
from vllmlite.backends.batch import AdapterRows, ForwardBatch, Tensor
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.weights.adapter import Adapter, AdapterLimits


class Model(Protocol):
    """A model that the runner can run."""

    kv_spec: KVSpec
    vocab_size: int

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Return the hidden states ``[T, hidden]`` of the uploaded ``batch`` after the last norm, and write its keys
        and values to ``kv``."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits ``[N, V]`` of hidden states ``[N, hidden]``."""
        ...


class KeepingModel(Model, Protocol):
    """A model that also returns hidden states of its layers."""

    def forward_keeping(
        self, batch: ForwardBatch, kv: KVCache, kept: Sequence[int], rows: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the result of :meth:`forward`, and copies of the hidden states ``kept`` of the tokens ``rows``, int32
        ``[N]``: the inputs of the layers with these numbers; -1 stands for the result of :meth:`forward`."""
        ...


@runtime_checkable
class AdaptableModel(Model, Protocol):
    """A model that can run with LoRA adapters."""

    def logits(self, hidden: Tensor, adapters: AdapterRows = None) -> Tensor:
        """Return float32 logits ``[N, V]`` of hidden states ``[N, hidden]``, whose rows have ``adapters``."""
        ...

    def enable_adapters(self, limits: AdapterLimits) -> None:
        """Allocate memory for adapters within ``limits``; called at most once, before the first step."""
        ...

    def set_adapter(self, index: int, adapter: Adapter | None) -> None:
        """Put ``adapter`` at ``index``, from 1 on, in place of the one there; None only removes that. Raises
        ParameterError if it does not fit the model."""
        ...

    def set_adapter_parts(self, index: int, adapter: Adapter | None) -> Iterator[int]:
        """Put ``adapter`` at ``index`` as :meth:`set_adapter` does, one weight after the other; yields the bytes of
        each."""
        ...
