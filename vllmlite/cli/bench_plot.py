"""Latency distributions as an SVG drawing that follows the reader's light or dark colour scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

PANEL, HEIGHT, GAP = 300, 200, 64
"""Width and height of a panel's plot area and the margin beside it, in pixels."""
TOP = 56
STYLE = """\
svg { background: #fff; --text: #333; --grid: #ddd; --curve: #b0124a }
@media (prefers-color-scheme: dark) { svg { background: #17181b; --text: #ddd; --grid: #3a3d44; --curve: #ff7ea6 } }
text { font: 12px sans-serif; fill: var(--text) } .title { font-size: 14px; font-weight: bold }
.grid { stroke: var(--grid) } .curve { fill: none; stroke: var(--curve); stroke-width: 2 }
.mark { fill: var(--curve) } .right { text-anchor: end } .middle { text-anchor: middle }
"""


def distributions(title: str, panels: Mapping[str, Sequence[float]]) -> str:
    """Return an SVG with one panel per name: the cumulative distribution of its values, in seconds."""
    drawn = [_panel(index, name, sorted(values)) for index, (name, values) in enumerate(panels.items())]
    width, height = len(panels) * (PANEL + GAP) + GAP, TOP + HEIGHT + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<style>{STYLE}</style>\n"
        f'<text class="title" x="{GAP}" y="24">{escape(_printable(title))}</text>\n'
        f'<text class="middle" transform="translate(14 {TOP + HEIGHT // 2}) rotate(-90)">share of all</text>\n'
        + "".join(drawn)
        + "</svg>\n"
    )


def _panel(index: int, name: str, values: Sequence[float]) -> str:
    left, bottom = index * (PANEL + GAP) + GAP, TOP + HEIGHT
    step = _nice_step(values[-1] if values else 0.0)
    highest = step * max(math.ceil(values[-1] / step - 1e-9) if values else 1, 1)
    unit, scale = ("s", 1) if highest >= 10 else ("ms", 1000)

    def place(value: float, share: float) -> tuple[float, float]:
        return left + PANEL * value / highest, bottom - HEIGHT * share

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = place(0, share)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{PANEL}"/>')
        parts.append(f'<text class="right" x="{left - 6}" y="{y + 4:.1f}">{share:.0%}</text>\n')
    for tick in range(round(highest / step) + 1):
        x = place(tick * step, 0)[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}v{HEIGHT}"/>')
        parts.append(f'<text class="middle" x="{x:.1f}" y="{bottom + 18}">{scale * tick * step:.6g}</text>\n')
    middle = left + PANEL // 2
    parts.append(f'<text class="middle" x="{middle}" y="{bottom + 38}">{escape(name)}, {unit}</text>\n')
    if not values:
        return "".join(parts)
    points = [f"{left} {bottom}"]
    for share in (step / 200 for step in range(201)):
        x, y = place(_at(values, share), share)
        points.append(f"{x:.1f} {y:.1f}")
    parts.append(f'<path class="curve" d="M{" L".join(points)}"/>\n')
    for share in (0.5, 0.9, 0.99):
        value = _at(values, share)
        x, y = place(value, share)
        parts.append(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        label = f"p{100 * share:.0f} {_figures(scale * value)}"  # below and to the right of the curve
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 18:.1f}">{label}</text>\n')
    return "".join(parts)


def _at(values: Sequence[float], share: float) -> float:
    """Return the quantile ``share`` (0 to 1) of the sorted ``values``."""
    return values[max(math.ceil(share * len(values)) - 1, 0)]


def _nice_step(highest: float) -> float:
    """Return the smallest 1, 2, 2.5 or 5 times a power of ten of which five reach ``highest``."""
    if highest <= 0:
        return 0.001
    power = 10.0 ** math.floor(math.log10(highest / 5))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if 5 * m * power >= highest * (1 - 1e-9))


def _printable(text: str) -> str:
    """Return ``text`` with control characters and lone surrogates, which XML cannot contain, replaced by U+FFFD."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _figures(value: float) -> str:
    """Return ``value`` with at least three significant figures and without an exponent."""
    return f"{value:.{max(2 - math.floor(math.log10(value)), 0) if value > 0 else 0}f}"
