"""Regular expressions for JSON Schema's string formats; each matches a subset of what the format's standard allows."""

from __future__ import annotations

import math

_LABEL = r"[a-z0-9]([a-z0-9\-]{0,30}[a-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,2}}"
_ATOM = r"[A-Za-z0-9_+\-]{1,20}"
_DAY = (
    r"(000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d\d\d)-"
    r"((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
)
_LEAP_DAY = r"(\d\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29"
_DATE = rf"({_DAY}|{_LEAP_DAY})"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+\-]([01]\d|2[0-3]):[0-5]\d)"
_PATH = r"(/[A-Za-z0-9._~/\-]*)?(\?[A-Za-z0-9._~=&\-]*)?(#[A-Za-z0-9._~\-]*)?"
_URI = rf"[a-z][a-z0-9+.\-]{{1,15}}://{_HOST}(:[1-9]\d{{0,3}})?{_PATH}"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_GROUP = r"[0-9a-f]{1,4}"
_CLOCK = r"T(\d{1,3}H(\d{1,3}M(\d{1,3}S)?)?|\d{1,3}M(\d{1,3}S)?|\d{1,3}S)"
_CALENDAR = r"(\d{1,4}Y(\d{1,3}M(\d{1,3}D)?)?|\d{1,4}M(\d{1,3}D)?|\d{1,4}D)"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}T{_TIME}",
    "duration": rf"P({_CALENDAR}({_CLOCK})?|{_CLOCK}|\d{{1,4}}W)",
    "email": rf"{_ATOM}(\.{_ATOM}){{0,2}}@{_LABEL}(\.{_LABEL}){{1,2}}",
    "hostname": _HOST,
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": rf"({_GROUP}:){{7}}{_GROUP}|::({_GROUP}:){{0,5}}{_GROUP}|({_GROUP}:){{1,6}}:{_GROUP}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": _URI,
    "uri-reference": rf"{_URI}|{_PATH}",
    "json-pointer": r"(/[A-Za-z0-9_./\-]*)?",
}
"""Expressions by format. Unbounded repetition occurs only as ``*`` after a character class."""
UNSUPPORTED_FORMATS = frozenset(
    "idn-email idn-hostname iri iri-reference uri-template relative-json-pointer regex".split()
)
"""Standard JSON Schema formats without an expression here. Unknown formats are annotations and check nothing."""


def format_expression(name: str, max_length: float) -> str:
    """Return the regular expression of a format, with bounded repetitions if there is a ``max_length``.

    A URI is bounded only from 250 characters on. xgrammar handles ``*`` faster than a count, and a count up to 100
    faster than a larger one."""
    if max_length == math.inf:
        return FORMATS[name]
    most = min(100, int(max_length) // 6)  # three of them are half of it
    return FORMATS[name].replace("]*", f"]{{0,{most}}}")
