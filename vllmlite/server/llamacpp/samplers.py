"""llama.cpp's ``samplers``: a list of the samplers that a request uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllmlite.errors import ParameterError

OFF: Mapping[str, Mapping[str, Any]] = {
    "penalties": {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "temperature": {"temperature": 1.0},
    "top_k": {"top_k": 0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
}
"""Supported samplers in order of application, with parameters that disable them."""

ABSENT = frozenset("dry top_n_sigma typ_p typical_p xtc infill adaptive_p dist".split())
"""llama.cpp's other samplers: naming them has no effect; their parameters are refused."""


def turned_off(samplers: Sequence[str] | None) -> dict[str, Any]:
    """Return parameters that disable the samplers not in ``samplers``; None disables none.

    Raises :class:`ParameterError` for an unknown name."""
    if samplers is None:
        return {}
    for name in samplers:
        if name not in OFF and name not in ABSENT:
            raise ParameterError("samplers", name, f"must be among {', '.join([*OFF, *sorted(ABSENT)])}")
    return {field: value for name, off in OFF.items() if name not in samplers for field, value in off.items()}


def used(samplers: Sequence[str] | None) -> list[str]:
    """Return the names of the supported samplers in use."""
    return [name for name in OFF if samplers is None or name in samplers]
