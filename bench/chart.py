"""Charts as SVG for the documentation: plain text, and the same bytes for the same numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 760, 360  # pixels
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 60  # around the plot
COLOURS: Final = ("#c0392b", "#e08e0b", "#1f77b4", "#2e8b57")  # the dashes distinguish the curves for colour-blind readers
DASHES: Final = ("", "7 4", "2 3", "10 3 2 3")
TICKS: Final = 5

BAR, GAP = 16, 10  # pixels
LETTER: Final = 7.0  # pixels; the average width of a letter is less
BAR_RIGHT: Final = 90  # space for the number beside the longest bar
BAR_OURS, BAR_THEIRS = "#1f77b4", "#9aa5b1"
LOGARITHMIC_FROM: Final = 20  # ratio of the largest to the smallest value, above which small bars would look alike


class Bar(NamedTuple):
    """A median, and the range of the rounds."""

    name: str
    value: float
    least: float
    most: float
    text: str  # the number as text
    ours: bool


def lines(title: str, curves: Mapping[str, Sequence[float]], x_max: float) -> str:
    """A chart of curves of evenly spaced numbers, from 0 to `x_max`."""
    top = _round_up(max(max(curve) for curve in curves.values()))
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    elements = _svg_head(HEIGHT, title, LEFT)
    for tick in range(TICKS + 1):
        y = TOP + plot_height - plot_height * tick / TICKS
        x = LEFT + plot_width * tick / TICKS
        elements += [
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + plot_width}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{top * tick / TICKS:,.0f}</text>',
            f'<text x="{x:.1f}" y="{TOP + plot_height + 18}" text-anchor="middle">{x_max * tick / TICKS:g}</text>',
        ]
    legend_x = LEFT
    for (name, curve), colour, dash in zip(curves.items(), COLOURS, DASHES, strict=False):
        points = " ".join(
            f"{LEFT + plot_width * (number + 0.5) / len(curve):.1f},{TOP + plot_height - plot_height * value / top:.1f}"
            for number, value in enumerate(curve)
        )
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        elements += [
            f'<polyline points="{points}" {style}/>',
            f'<line x1="{legend_x}" y1="{HEIGHT - 16}" x2="{legend_x + 30}" y2="{HEIGHT - 16}" {style}/>',
            f'<text x="{legend_x + 36}" y="{HEIGHT - 12}">{escape(name)}</text>',
        ]
        legend_x += 60 + 7 * len(name)
    return "\n".join([*elements, "</svg>"]) + "\n"


def bars(title: str, values: Sequence[Bar]) -> str:
    """Horizontal bars, each with a line from the minimum to the maximum. All values must be positive."""
    left = 20 + math.ceil(LETTER * max(len(bar.name) for bar in values))
    plot_width, plot_height = WIDTH - left - BAR_RIGHT, len(values) * (BAR + GAP)
    axis = _Axis(values, left, plot_width)
    height = TOP + plot_height + 34
    elements = _svg_head(height, f"{title}, logarithmic" if axis.is_logarithmic else title, 12)
    for tick in axis.ticks():
        x = axis.position(tick)
        elements += [
            f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{TOP + plot_height}" stroke="#ddd"/>',
            f'<text x="{x:.1f}" y="{TOP + plot_height + 16}" text-anchor="middle" fill="#555">{tick:,.12g}</text>',
        ]
    for number, bar in enumerate(values):
        y = TOP + number * (BAR + GAP)
        middle = y + BAR / 2
        least, most = axis.position(bar.least), axis.position(bar.most)
        end = axis.position(bar.value)
        colour = BAR_OURS if bar.ours else BAR_THEIRS
        elements += [
            f'<text x="{left - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(bar.name)}</text>',
            f'<rect x="{left}" y="{y}" width="{end - left:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<path d="{_whisker(least, most, middle)}" stroke="#222" fill="none"/>',
            f'<text x="{max(end, most) + 6:.1f}" y="{middle + 4:.1f}">{escape(bar.text)}</text>',
        ]
    return "\n".join([*elements, "</svg>"]) + "\n"


class _Axis:
    """The horizontal axis: where a value is drawn."""

    def __init__(self, values: Sequence[Bar], left: float, wide: float) -> None:
        self._left, self._wide = left, wide
        least, self._top = min(bar.value for bar in values), max(bar.most for bar in values)
        self.is_logarithmic = max(bar.value for bar in values) > LOGARITHMIC_FROM * least
        lowest = min(bar.least for bar in values)
        self._from = 10.0 ** math.floor(math.log10(lowest) - 0.1) if self.is_logarithmic else 0.0

    def position(self, value: float) -> float:
        """The position of a value in pixels."""
        if self.is_logarithmic:
            return self._left + self._wide * math.log(value / self._from) / math.log(self._top / self._from)
        return self._left + self._wide * value / self._top

    def ticks(self) -> list[float]:
        """Powers of ten, or a few even steps."""
        if self.is_logarithmic:
            first, last = round(math.log10(self._from)), math.floor(math.log10(self._top))
            return [10.0**power for power in range(first, last + 1)]
        rough = self._top / TICKS
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
        return [step * number for number in range(int(self._top / step) + 1)]


def _whisker(least: float, most: float, y: float) -> str:
    return f"M{least:.1f} {y:.1f}H{most:.1f}M{least:.1f} {y - 4:.1f}v8M{most:.1f} {y - 4:.1f}v8"


def _svg_head(height: int, title: str, left: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">{escape(title)}</text>',
    ]


def _round_up(number: float) -> float:
    step = 10.0 ** (len(str(int(number))) - 1) / 2
    return step * -(-number // step)
