"""Distributions of latencies as an SVG drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 320, 240, 48
STYLE = """\
text { font: 12px sans-serif; fill: #555 } .title { font-size: 14px; font-weight: bold }
.grid { stroke: #8884 } .curve { fill: none; stroke: #c62a5b; stroke-width: 2 }
.mark { stroke: #8888; stroke-dasharray: 3 }
"""


def distributions(title: str, panels: Mapping[str, Sequence[float]]) -> str:
    """A drawing with a panel for each of ``panels``: what share of the values, in seconds, is at most x."""
    drawn = [_panel(index, name, sorted(values)) for index, (name, values) in enumerate(panels.items())]
    width, height = len(panels) * WIDTH, HEIGHT + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<style>{STYLE}</style>\n"
        f'<text class="title" x="{MARGIN}" y="18">{escape(title)}</text>\n' + "".join(drawn) + "</svg>\n"
    )


def _panel(index: int, name: str, values: Sequence[float]) -> str:
    left, top = index * WIDTH + MARGIN, MARGIN
    width, height = WIDTH - MARGIN - 16, HEIGHT - 2 * MARGIN + 16
    parts = [f'<text x="{left}" y="{top - 8}">{escape(name)}, ms</text>\n']
    for share in (0.0, 0.5, 1.0):
        y = top + height * (1 - share)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{width}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>\n')
    if not values:
        return "".join(parts)
    highest = _round_up(values[-1])
    for tick in range(5):
        x = left + width * tick / 4
        label = f"{1000 * highest * tick / 4:.4g}"
        parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{label}</text>\n')
    points = []
    for step in range(201):
        value = values[max(math.ceil(step / 200 * len(values)) - 1, 0)]
        points.append(f"{left + width * value / highest:.1f} {top + height * (1 - step / 200):.1f}")
    parts.append(f'<path class="curve" d="M{" L".join(points)}"/>\n')
    for share in (0.5, 0.99):
        value = values[math.ceil(share * len(values)) - 1]
        x = left + width * value / highest
        parts.append(f'<path class="mark" d="M{x:.1f} {top}v{height}"/>')
        parts.append(f'<text x="{x + 3:.1f}" y="{top + 12}">p{100 * share:.0f} {1000 * value:.4g}</text>\n')
    return "".join(parts)


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9))
