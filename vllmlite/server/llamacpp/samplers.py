"""llama.cpp's ``samplers``: the list of those that a request has used, where it names them."""

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
"""Ours, in the order in which they are applied, with the parameters that turn them off."""

ABSENT = frozenset("dry top_n_sigma typ_p typical_p xtc infill adaptive_p dist".split())
"""llama.cpp's others: named, they do nothing. What has parameters is refused by these."""


def turned_off(samplers: Sequence[str] | None) -> dict[str, Any]:
    """Parameters that turn off what is not among ``samplers``; None turns nothing off.

    Raises :class:`ParameterError` on a name that is no sampler's."""
    if samplers is None:
        return {}
    for name in samplers:
        if name not in OFF and name not in ABSENT:
            raise ParameterError("samplers", name, f"must be among {', '.join([*OFF, *sorted(ABSENT)])}")
    return {field: value for name, off in OFF.items() if name not in samplers for field, value in off.items()}


def used(samplers: Sequence[str] | None) -> list[str]:
    """Those of ours that are."""
    return [name for name in OFF if samplers is None or name in samplers]
