"""LoRA adapters in host memory: a thread reads and checks them, and they are kept while there is room.
``engine/adapters.py`` puts them on the device.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

from vllmlite.engine.request import AdapterKey
from vllmlite.errors import ModelError
from vllmlite.lora.reader import AdapterReader
from vllmlite.lora.request import LoRARequest
from vllmlite.weights.adapter import Adapter


class AdapterStore:
    """The adapters of one model in host memory. Thread-safe; files are read one at a time."""

    def __init__(self, reader: AdapterReader, max_adapters: int, max_bytes: int) -> None:
        """Keep up to ``max_adapters`` adapters with up to ``max_bytes`` in total; the least recently used ones are
        dropped."""
        self._reader = reader
        self._max_adapters, self._max_bytes = max_adapters, max_bytes
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "vllmlite-adapters")
        self._keys: dict[LoRARequest, AdapterKey] = {}
        self._kept: OrderedDict[str, Adapter] = OrderedDict()
        """Digest → adapter, the least recently used one first."""
        self._reading: dict[LoRARequest, tuple[object, Future[Adapter]]] = {}
        """Adapters that are being read, each with an object that identifies this reading."""

    def knows(self, source: LoRARequest) -> bool:
        """Return whether the adapter's key is known, so that :meth:`identify` returns without reading a file."""
        return source in self._keys

    def identify(self, source: LoRARequest) -> AdapterKey:
        """Return the key of the adapter that ``source`` describes; read and check it first if it is not known. Raises
        VllmliteError if it cannot be used."""
        with self._lock:
            key = self._keys.get(source)
            if key is not None:
                return key
            reading = self._read(source)
        adapter = reading.result()
        return AdapterKey(source.lora_name, source, adapter.digest)

    def take(self, key: AdapterKey, timeout: float) -> Adapter | None:
        """Return the adapter; None if it has to be read and that takes longer than ``timeout`` seconds. Raises
        VllmliteError if it can no longer be read, or has other contents."""
        source = key.source
        assert isinstance(source, LoRARequest)
        with self._lock:
            kept = self._kept.get(key.digest)
            if kept is not None:
                self._kept.move_to_end(key.digest)
                return kept
            reading = self._read(source)
        try:
            adapter = reading.result(timeout)
        except FutureTimeout:
            return None
        if adapter.digest != key.digest:
            raise ModelError(
                f"adapter {source.lora_name}: {source.lora_path}: has been changed since it was loaded: load it again"
            )
        return adapter

    def forget(self, source: LoRARequest) -> bool:
        """Drop an adapter from memory. Returns whether it was known."""
        with self._lock:
            self._reading.pop(source, None)
            key = self._keys.pop(source, None)
            if key is not None and all(other.digest != key.digest for other in self._keys.values()):
                self._kept.pop(key.digest, None)
            return key is not None

    def num_bytes(self) -> int:
        """Return the bytes of the adapters in host memory."""
        with self._lock:
            return sum(adapter.num_bytes for adapter in self._kept.values())

    def _read(self, source: LoRARequest) -> Future[Adapter]:
        """Start to read the adapter, unless it is being read already. The caller holds the lock."""
        if source not in self._reading:
            mark = object()
            self._reading[source] = mark, self._pool.submit(self._read_file, source, mark)
        return self._reading[source][1]

    def _read_file(self, source: LoRARequest, mark: object) -> Adapter:
        root = None if source.lora_root is None else Path(source.lora_root)
        try:
            adapter = self._reader.read(Path(source.lora_path), root)
        except BaseException:
            with self._lock:
                self._ended(source, mark)
            raise
        with self._lock:
            if self._ended(source, mark):
                # Later requests get the new key if the files have changed; earlier ones still have the old one.
                self._keys[source] = AdapterKey(source.lora_name, source, adapter.digest)
            self._keep(adapter)
        return adapter

    def _ended(self, source: LoRARequest, mark: object) -> bool:
        """Remove a finished reading. Returns False if the adapter was forgotten while it was read."""
        is_wanted = self._reading.get(source, (None,))[0] is mark
        if is_wanted:
            del self._reading[source]
        return is_wanted

    def _keep(self, adapter: Adapter) -> None:
        self._kept[adapter.digest] = adapter
        self._kept.move_to_end(adapter.digest)
        total = sum(each.num_bytes for each in self._kept.values())
        while len(self._kept) > 1 and (len(self._kept) > self._max_adapters or total > self._max_bytes):
            _, dropped = self._kept.popitem(last=False)
            total -= dropped.num_bytes
