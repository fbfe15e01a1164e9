"""Base classes and types of all requests and answers: strictness, unknown fields, lists, errors, usage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    ModelWrapValidatorHandler,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import NotRequired, Self, TypeAliasType, TypedDict  # noqa: UP035 -- pydantic's wish before 3.12

from vllmlite.config.options import did_you_mean
from vllmlite.config.refused import Absent
from vllmlite.errors import ParameterError
from vllmlite.server.protocol.fields import BOOKKEEPING, synonym

MAX_MESSAGES = 10_000
"""Maximum messages or items of a conversation. OpenAI's chat once accepted 2,048; Anthropic documents 100,000."""
MAX_TOOLS = 1024
"""Maximum tools of a request. OpenAI documents 128."""


class Unknown(NamedTuple):
    """A request field that has no effect, because the object it belongs to has no field of that name."""

    place: str
    """Path of the field, such as stream_options.name."""
    value: Any
    reason: str = "no such parameter"
    names: Collection[str] = ()
    """Names of the fields that the object does have."""


class Request(BaseModel):
    """A request body, or an object in one, with strict types; :mod:`.fields` has the rules for other names."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())
    text_changing: ClassVar[Mapping[str, Absent]] = {}
    """Names of fields that are refused, unless their value has no effect."""
    closed: ClassVar[bool] = False
    """Whether all unknown names are refused, because any might change the text."""

    _unknown: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _known_names(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        names = cls._names()
        if data.keys() <= names and not any(value is None or type(value) is float for value in data.values()):
            return handler(data)  # fast path for the usual case
        known: dict[str, Any] = {}
        unknown: dict[str, Any] = {}
        for name, value in data.items():
            if name in names:
                target = name
            elif name in cls.text_changing and cls.text_changing[name].accepts(value):
                continue
            elif (other := synonym(name, names)) is not None:
                target = other
            elif name in cls.text_changing:
                raise ParameterError(name, value, cls.text_changing[name].reason)
            elif name in BOOKKEEPING:
                continue
            elif cls.closed:
                raise ParameterError(shown_name(name), value, "no such parameter" + did_you_mean(name, names))
            else:
                unknown[name] = value
                continue
            if value is not None:  # null counts as absent
                # JSON has a single number type: 5.0 counts as an integer.
                value = int(value) if type(value) is float and value.is_integer() else value
                if target in known and known[target] != value:
                    raise ParameterError(
                        name, value, f"is a synonym of {target}, which has a different value"
                    )
                known[target] = value
        if cls.model_config.get("extra") == "allow":
            return handler({**known, **unknown})
        found = handler(known)
        found._unknown = unknown
        return found

    @classmethod
    @cache
    def _names(cls) -> frozenset[str]:
        """Return the JSON names of the fields."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    def unknown_fields(self, place: str = "") -> Iterator[Unknown]:
        """Yield the fields without effect, of this object at ``place`` and of objects inside it."""
        for name, value in self._unknown.items():
            yield Unknown(place + shown_name(name), value, names=self._names())
        for name in type(self).model_fields:
            value = getattr(self, name)
            for entry in value if isinstance(value, list) else [value]:
                if not isinstance(entry, Request):
                    break
                yield from entry.unknown_fields(f"{place}{name}.")


class OtherTool(Request):
    """A tool of a type that the model cannot call here; it is ignored and logged as a field without effect."""

    type: str

    def unknown_fields(self, place: str = "") -> Iterator[Unknown]:
        """Yield the tool itself."""
        yield Unknown(
            f"{place}type={shown_name(self.type)}", self.type, "tools of this type cannot be called here"
        )


FUNCTION_TAG, OTHER_TAG = "a function", "another tool"


def tool_tag(*functions: str | None) -> Callable[[Any], str]:
    """Return a discriminator between function tools, whose types are ``functions``, and other tools."""

    def tag(tool: Any) -> str:
        kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
        return OTHER_TAG if isinstance(kind, str) and kind not in functions else FUNCTION_TAG

    return tag


def shown_name(name: object) -> str:
    """Return a name chosen by a client, shortened and escaped for messages."""
    return str(name)[:80].encode("utf-8", "backslashreplace").decode()


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}

Prompts = Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
"""A text, token ids, or a list of either. The service checks it: pydantic would try every form on every element."""


_BIAS_SCHEMA = {"type": "object", "additionalProperties": {"type": "number"}}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Ints = TypeAliasType("Ints", Annotated[list[int], FailFast()])
Strings = TypeAliasType("Strings", Annotated[list[str], FailFast()])
Bias = TypeAliasType("Bias", Annotated[dict[str, Any], WithJsonSchema(_BIAS_SCHEMA)])
Stops = TypeAliasType(
    "Stops",
    Annotated[list[str], FailFast(), BeforeValidator(_as_list, json_schema_input_type=str | list[str])],
)
"""List of stop strings whose validation stops at the first error, so that a hostile request with many errors costs
little."""


class Usage(TypedDict):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokensDetails
    completion_tokens_details: NotRequired[CompletionDetails]


class TokensDetails(TypedDict):
    """Prompt tokens found in the prefix cache."""

    cached_tokens: int


class CompletionDetails(TypedDict):
    """Tokens of the reasoning."""

    reasoning_tokens: int


class ErrorInfo(TypedDict):
    """Message and details of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """An error answer."""

    error: ErrorInfo
