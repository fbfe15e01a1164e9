"""Encoding of messages between hosts: JSON of dataclasses whose fields are checked against their annotations.

A message is ``[name, fields]``, where the name is one of those that the reader expects and ``fields`` are the values in
order. Nothing that is decoded runs code, and a value of another type than its annotation is an error."""

from __future__ import annotations

import json
import types
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from vllmlite.errors import BackendError

LEAST_INTEGER, MOST_INTEGER = -(2**63), 2**64 - 1
MessageT = TypeVar("MessageT")


class Codec(NamedTuple):
    """How values of one type are turned into JSON's types, and back."""

    plain: Callable[[Any], Any]
    value: Callable[[Any], Any]
    """Raises TypeError or ValueError for what is not of the type."""


class EncodingError(BackendError):
    """Bytes from another host are not a message that is expected there."""


class Encoding:
    """Messages of some dataclasses."""

    def __init__(self, *kinds: type, without: frozenset[str] = frozenset()) -> None:
        """Take the dataclasses, whose names must differ. Fields in ``without``, such as ``SamplingParams.stop``, are
        not sent, and have their defaults at the reader's."""
        self._codecs = {kind.__name__: _dataclass(kind, without) for kind in kinds}

    def encode(self, message: object) -> bytes:
        """Return ``message`` as bytes."""
        name = type(message).__name__
        return json.dumps([name, self._codecs[name].plain(message)], separators=(",", ":")).encode()

    def decode(self, content: bytes) -> Any:
        """Return the message. Raises EncodingError if it is none."""
        try:
            name, found = json.loads(content)
            return self._codecs[name].value(found)
        except (ValueError, TypeError, KeyError, RecursionError, BackendError) as error:
            raise EncodingError(f"a message from another host cannot be read: {error}") from None


def _same(value: Any) -> Any:
    return value


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"{_shown(value)} is no {kind.__name__}")
        return value

    return check


def _integer(value: Any) -> int:
    if type(value) is not int or not LEAST_INTEGER <= value <= MOST_INTEGER:
        raise TypeError(f"{_shown(value)} is no integer of 64 bits")
    return value


def _number(value: Any) -> float:
    if type(value) is int:
        return _integer(value)
    return float(_exactly(float)(value))


def _bytes(value: Any) -> bytes:
    return b64decode(_exactly(str)(value), validate=True)


_PLAIN: dict[Any, Codec] = {
    int: Codec(_same, _integer),
    float: Codec(_same, _number),
    str: Codec(_same, _exactly(str)),
    bool: Codec(_same, _exactly(bool)),
    bytes: Codec(lambda value: b64encode(value).decode(), _bytes),
}


def _codec(hint: Any, without: frozenset[str]) -> Codec:
    """Return the codec of values that are annotated with ``hint``."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (_codec(each, without) for each in arguments if each is not type(None))
        return Codec(_unless_none(inner.plain), _unless_none(inner.value))
    if origin is list:
        return _list(_codec(arguments[0], without), arguments[0])
    if origin is frozenset:
        entries = _list(_codec(arguments[0], without), arguments[0])
        return Codec(
            lambda value: entries.plain(sorted(value)), lambda value: frozenset(entries.value(value))
        )
    if origin is tuple:
        if arguments[-1] is ...:
            each = _list(_codec(arguments[0], without), arguments[0])
            return Codec(lambda value: each.plain(list(value)), lambda value: tuple(each.value(value)))
        return _tuple([_codec(each, without) for each in arguments])
    if origin is dict:
        pairs = _list(_tuple([_codec(each, without) for each in arguments]), arguments)
        return Codec(lambda value: pairs.plain(list(value.items())), lambda value: dict(pairs.value(value)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return Codec(lambda value: value.value, hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, without)
    raise TypeError(f"values annotated with {hint} cannot be sent to another host")


def _unless_none(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _list(each: Codec, hint: Any) -> Codec:
    def value(found: Any) -> Any:
        return list(map(each.value, _exactly(list)(found)))

    def integers(found: Any) -> Any:
        """Check a list of integers, of which there may be many, at once."""
        if found and (
            set(map(type, _exactly(list)(found))) != {int}
            or min(found) < LEAST_INTEGER
            or max(found) > MOST_INTEGER
        ):
            raise TypeError("a list has something else than integers of 64 bits")
        return _exactly(list)(found)

    if hint is int:
        return Codec(_same, integers)
    return Codec(_same if each.plain is _same else lambda value: list(map(each.plain, value)), value)


def _tuple(each: list[Codec]) -> Codec:
    def plain(value: Any) -> Any:
        return [codec.plain(entry) for codec, entry in zip(each, value, strict=True)]

    def value(found: Any) -> Any:
        return tuple(codec.value(entry) for codec, entry in zip(each, _exactly(list)(found), strict=True))

    return Codec(plain, value)


@cache
def _dataclass(kind: type, without: frozenset[str]) -> Codec:
    """Return the codec of a dataclass. Values are set as they were, without the checks of ``__post_init__``."""
    hints = get_type_hints(kind)
    omitted = [each for each in fields(kind) if f"{kind.__name__}.{each.name}" in without]
    sent = _Fields([each.name for each in fields(kind) if each not in omitted], hints, without)

    def plain(value: Any) -> Any:
        return [codec.plain(getattr(value, name)) for name, codec in sent.each()]

    def value(found: Any) -> Any:
        made: Any = object.__new__(kind)
        for (name, codec), entry in zip(sent.each(), _exactly(list)(found), strict=True):
            object.__setattr__(made, name, codec.value(entry))
        for each in omitted:
            object.__setattr__(made, each.name, each.default)
        return made

    return Codec(plain, value)


class _Fields:
    """The codecs of a dataclass's fields, made at their first use because a dataclass may contain itself."""

    def __init__(self, names: list[str], hints: dict[str, Any], without: frozenset[str]) -> None:
        self._names, self._hints, self._without = names, hints, without
        self._codecs: list[tuple[str, Codec]] | None = None

    def each(self) -> list[tuple[str, Codec]]:
        if self._codecs is None:
            self._codecs = [(name, _codec(self._hints[name], self._without)) for name in self._names]
        return self._codecs


def _shown(value: object) -> str:
    return repr(value)[:60]
