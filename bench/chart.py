"""A chart of a few lines as SVG, for the documents: nothing but text, the same bytes for the same numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 760, 360  # pixels
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 60  # around the plot
COLOURS: Final = ("#c0392b", "#e08e0b", "#1f77b4", "#2e8b57")  # told apart by those who see no red, too: see the dashes
DASHES: Final = ("", "7 4", "2 3", "10 3 2 3")
TICKS: Final = 5


def lines(title: str, curves: Mapping[str, Sequence[float]], x_max: float) -> str:
    """A chart of curves of evenly spaced numbers, from 0 to `x_max`."""
    top = _round_up(max(max(curve) for curve in curves.values()))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for tick in range(TICKS + 1):
        y = TOP + high - high * tick / TICKS
        x = LEFT + wide * tick / TICKS
        parts += [
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + wide}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{top * tick / TICKS:,.0f}</text>',
            f'<text x="{x:.1f}" y="{TOP + high + 18}" text-anchor="middle">{x_max * tick / TICKS:g}</text>',
        ]
    at = LEFT
    for (name, curve), colour, dash in zip(curves.items(), COLOURS, DASHES, strict=False):
        points = " ".join(
            f"{LEFT + wide * (number + 0.5) / len(curve):.1f},{TOP + high - high * value / top:.1f}"
            for number, value in enumerate(curve)
        )
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        parts += [
            f'<polyline points="{points}" {style}/>',
            f'<line x1="{at}" y1="{HEIGHT - 16}" x2="{at + 30}" y2="{HEIGHT - 16}" {style}/>',
            f'<text x="{at + 36}" y="{HEIGHT - 12}">{escape(name)}</text>',
        ]
        at += 60 + 7 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _round_up(number: float) -> float:
    step = 10.0 ** (len(str(int(number))) - 1) / 2
    return step * -(-number // step)
