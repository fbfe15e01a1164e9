"""LoRA adapters that are served as models with names of their own; they can be loaded while the server runs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from http import HTTPStatus
from itertools import count
from pathlib import Path
from typing import Any

from vllmlite.async_llm import AsyncLLM
from vllmlite.config.options import did_you_mean
from vllmlite.errors import ModelError, ParameterError
from vllmlite.lora.request import LoRARequest, check_name
from vllmlite.server.errors import ApiError
from vllmlite.server.metrics import Metrics

MODULE_KEYS = ("name", "path", "base_model_name")
"""Keys of an entry of ``lora_modules``."""


class ServedAdapters:
    """The adapters of a server by name."""

    def __init__(
        self, engine: AsyncLLM, metrics: Metrics, model_names: Collection[str], root: str | None
    ) -> None:
        """Start without adapters. Their names must differ from ``model_names``. Clients may load adapters from the
        directory ``root``; None: they may load none."""
        self._engine = engine
        self._metrics = metrics
        self._model_names = frozenset(model_names)
        self._root = root
        self._numbers = count(1)
        self._served: dict[str, LoRARequest] = {}
        self._loading: set[str] = set()

    def all(self) -> Mapping[str, LoRARequest]:
        """Return the adapters by name, in the order in which they were loaded."""
        return self._served

    async def load_modules(self, modules: Collection[str]) -> None:
        """Load the adapters of the option ``lora_modules``. Raises VllmliteError if one cannot be used."""
        for module in modules:
            entry = read_module(module)
            await self._load(entry["name"], entry["path"], entry.get("base_model_name"), None)

    async def load(self, name: str, path: str, replace: bool) -> None:
        """Load an adapter for a client; ``path`` may be relative to the root. ``replace``: an adapter with the same
        name is replaced, and its unfinished requests go on. Raises ApiError if the adapter cannot be used."""
        assert self._root is not None
        if name in self._served and not replace:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                str(ParameterError("lora_name", name, "is loaded already: unload it, or set load_inplace")),
                param="lora_name",
            )
        try:
            await self._load(name, str(Path(self._root) / path), None, self._root)
        except ModelError as error:
            raise ApiError(HTTPStatus.BAD_REQUEST, str(error), param="lora_path") from error

    async def unload(self, name: str, number: int | None) -> None:
        """Stop serving an adapter; its unfinished requests go on. Raises ApiError if there is no such adapter."""
        found = self._served.get(name)
        if found is None:
            hint = did_you_mean(name, self._served)
            message = str(ParameterError("lora_name", name, f"is not loaded{hint}"))
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="lora_name", code="model_not_found")
        if number not in (None, found.lora_int_id):
            raise ParameterError("lora_int_id", number, f"is not the number of {name!r}")
        del self._served[name]
        self._metrics.forget_adapter(name)
        await self._engine.remove_lora(found.lora_int_id)

    async def _load(self, name: str, path: str, base: str | None, root: str | None) -> None:
        check_name("lora_name", name)
        if name in self._model_names:
            raise ParameterError("lora_name", name, "is a name of the model: choose another")
        if name in self._loading:
            raise ParameterError("lora_name", name, "is being loaded")
        request = LoRARequest(name, next(self._numbers), path, base_model_name=base, lora_root=root)
        self._loading.add(name)
        try:
            await self._engine.add_lora(request)
        except BaseException:
            await self._engine.remove_lora(request.lora_int_id)
            raise
        finally:
            self._loading.discard(name)
        old = self._served.get(name)
        self._served[name] = request
        if old is not None:
            await self._engine.remove_lora(old.lora_int_id)


def read_module(text: str) -> dict[str, str]:
    """Return an entry of ``lora_modules``: ``name=path``, or a JSON object with these keys. Raises ParameterError."""
    if not text.lstrip().startswith("{"):
        name, separator, path = text.partition("=")
        if not (separator and name and path):
            raise ParameterError("lora_modules", text, "must be NAME=PATH, or a JSON object")
        return {"name": name, "path": path}
    try:
        entry: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise ParameterError("lora_modules", text, "is not JSON") from None
    entry = {key: value for key, value in entry.items() if value is not None}
    known = entry.keys() <= {*MODULE_KEYS} and {"name", "path"} <= entry.keys()
    if not known or not all(isinstance(value, str) and value for value in entry.values()):
        raise ParameterError(
            "lora_modules", text, "must have name and path, and may have base_model_name, each a text"
        )
    return dict(entry)
