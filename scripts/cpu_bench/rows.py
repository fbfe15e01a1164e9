"""The table of bars: for each row our figure, the peers' figures, and the required ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpu_bench.shapes import FORMATS, SHAPES

LONG, PROMPT = 8192, 512
"""Context tokens of the attention row, and prompt tokens of the prefill rows."""


@dataclass(frozen=True)
class Figure:
    """A measurement: what ``system`` measures for ``work`` with ``options``."""

    system: str
    work: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Row:
    """``name``: what is measured / what it is compared with. The best of ``peers`` counts; instead of peers there may
    be a ``limit`` that ``ours`` must not exceed. ``bar``: the required ratio, above one if ours must be better."""

    name: str
    ours: Figure
    peers: tuple[Figure, ...] = ()
    bar: float = 1.0
    limit: float | None = None
    unit: str = "tok/s"


def table(mixed: tuple[int, int]) -> list[Row]:
    """Return all rows; ``mixed``: shortest and longest length of the simultaneous requests."""

    def under(name: str, ours: Figure, limit: float, unit: str) -> Row:
        return Row(name, ours, limit=limit, unit=unit)

    together = {"requests": 64, "shortest": mixed[0], "longest": mixed[1]}
    attention = _figure("bf16", "attention", context=LONG)
    return [
        Row("decode-1-bf16/llama.cpp", _decode("bf16", 1), (_decode("llama.cpp bf16", 1),), 0.97),
        Row("decode-1-int8/llama.cpp", _decode("int8", 1), (_decode("llama.cpp Q8_0", 1),), 0.97),
        Row("decode-1-int4/llama.cpp", _decode("int4", 1), (_decode("llama.cpp Q4_0", 1),), 0.97),
        Row("decode-1-Q4_K_M/llama.cpp", _decode("Q4_K_M", 1), (_decode("llama.cpp Q4_K_M", 1),), 0.97),
        Row("decode-1-bf16/bandwidth", _decode("bf16", 1), (_bandwidth("bf16"),), 0.90),
        Row("decode-1-int8/bandwidth", _decode("int8", 1), (_bandwidth("int8"),), 0.90),
        Row("decode-1-int4/bandwidth", _decode("int4", 1), (_bandwidth("int4"),), 0.90),
        Row("decode-8-bf16/vllm", _decode("bf16", 8), _vllm_decode(8), 1.25),
        Row("decode-8-int8/vllm", _decode("int8", 8), _vllm_decode(8), 2.0),
        Row("decode-8-int4/vllm", _decode("int4", 8), _vllm_decode(8), 2.0),
        Row("decode-8-int8/llama.cpp", _decode("int8", 8), (_decode("llama.cpp Q8_0", 8),), 2.0),
        Row("decode-8-int4/llama.cpp", _decode("int4", 8), (_decode("llama.cpp Q4_0", 8),), 2.0),
        Row("decode-16-bf16/vllm", _decode("bf16", 16), _vllm_decode(16), 1.5),
        Row("decode-16-int8/vllm", _decode("int8", 16), _vllm_decode(16), 2.0),
        Row("decode-16-int4/vllm", _decode("int4", 16), _vllm_decode(16), 2.0),
        Row("decode-16-int8/llama.cpp", _decode("int8", 16), (_decode("llama.cpp Q8_0", 16),), 2.0),
        Row("decode-16-int4/llama.cpp", _decode("int4", 16), (_decode("llama.cpp Q4_0", 16),), 2.0),
        Row("decode-1-awq/int4", _decode("awq", 1), (_decode("int4", 1),), 0.9),
        Row("decode-8-awq/llama.cpp", _decode("awq", 8), (_decode("llama.cpp Q4_0", 8),), 2.0),
        Row("decode-16-awq/llama.cpp", _decode("awq", 16), (_decode("llama.cpp Q4_0", 16),), 2.0),
        Row("prefill-awq/llama.cpp", _prefill("awq"), (_prefill("llama.cpp Q4_0"),), 1.5),
        Row("prefill-awq/bf16", _prefill("awq"), (_prefill("bf16"),), 1.0),
        Row("prefill-bf16/vllm", _prefill("bf16"), _vllm("prefill", length=PROMPT), 1.0),
        Row("prefill-bf16/llama.cpp", _prefill("bf16"), (_prefill("llama.cpp bf16"),), 4.0),
        Row("prefill-bf16/arithmetic", _prefill("bf16"), (_prefill("limits"),), 0.85),
        Row("prefill-int8/bf16", _prefill("int8"), (_prefill("bf16"),), 1.6),
        Row("prefill-Q4_K_M/llama.cpp", _prefill("Q4_K_M"), (_prefill("llama.cpp Q4_K_M"),), 1.0),
        Row("attention/bandwidth", attention, (_figure("limits", "attention", context=LONG),), 0.80, unit="/s"),
        Row("mixed-bf16/vllm", _figure("bf16", "mixed", **together), _vllm("mixed", **together), 1.3),
        under("start/built-in", _figure("programs", "first_token"), 0.6, "s"),
        under("start/bf16", _figure("programs", "first_token", weights="bf16"), 1.5, "s"),
        under("start/int8", _figure("programs", "first_token", weights="int8"), 1.5, "s"),
        under("start/int4", _figure("programs", "first_token", weights="int4"), 1.5, "s"),
        under("memory/bf16", _figure("programs", "memory", weights="bf16"), 150, "MB"),
        under("memory/int8", _figure("programs", "memory", weights="int8"), 150, "MB"),
        under("memory/int4", _figure("programs", "memory", weights="int4"), 150, "MB"),
        under("step/policy", _figure("step", "step_microseconds"), 150, "µs"),
        under("idle/chat", _figure("programs", "idle", command="chat"), 0.01, "s"),
        under("idle/serve", _figure("programs", "idle", command="serve"), 0.01, "s"),
        *_shapes(),
    ]  # fmt: skip


def _shapes() -> list[Row]:
    """Return rows for other shapes than Llama's, with one and eight sequences."""
    return [
        Row(f"{shape}-{batch}-{kind}/llama.cpp", _decode(f"{shape} {kind}", batch),
            (_decode(f"llama.cpp {shape} {kind}", batch),))
        for shape in SHAPES
        for batch in (1, 8)
        for kind in FORMATS
    ]  # fmt: skip


def _figure(system: str, work: str, **options: Any) -> Figure:
    return Figure(system, work, tuple(options.items()))


def _vllm(work: str, **options: Any) -> tuple[Figure, ...]:
    """Return figures for both modes of vLLM, of which the faster counts."""
    return _figure("vllm eager", work, **options), _figure("vllm compiled", work, **options)


def _decode(system: str, batch: int) -> Figure:
    return _figure(system, "decode", batch=batch, context=16)


def _vllm_decode(batch: int) -> tuple[Figure, ...]:
    return _vllm("decode", batch=batch, context=16)


def _prefill(system: str) -> Figure:
    return _figure(system, "prefill", length=PROMPT)


def _bandwidth(weights: str) -> Figure:
    return _figure("limits", "decode", weights=weights, batch=1)
