"""The classes of the benchmark: sections, their contestants, and goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

Figures = Mapping[str, float]  # metric -> figure of one contestant in one round
Round = Mapping[str, Figures]  # contestant -> its figures in one round


class UnavailableError(Exception):
    """A contestant cannot be measured on this machine; the message says what is missing."""


class RoundPaths(NamedTuple):
    """Directories for one round of one contestant."""

    own: Path  # empty; deleted afterwards
    shared: Path  # what the section's `prepare` wrote; read-only
    quick: bool  # do less of everything, only to see that it works


class Contestant(NamedTuple):
    """A contestant of a section. `run` does one round, in a process of its own."""

    name: str  # in tables and charts; unique within the section
    run: Callable[[RoundPaths], Figures]
    packages: tuple[str, ...] = ()  # distributions whose versions are recorded
    ours: bool = False  # drawn in another colour
    environment: tuple[tuple[str, str], ...] = ()  # added to that of its process


class Column(NamedTuple):
    """A column in the table of a section: one metric, with its median and range over the rounds."""

    metric: str
    heading: str
    digits: int


class Goal(NamedTuple):
    """A bound for a ratio, which is taken within each round; the median of the rounds counts."""

    text: str
    ratio: Callable[[Round], float]
    bound: float
    at_least: bool = False  # otherwise the bound is a maximum
    unit: str = "x"  # "x" for a ratio, or the unit of a figure: "us", "MiB"


class Section(NamedTuple):
    """Contestants that are compared. Each round measures all of them, in random order."""

    key: str  # its name on the command line and in the JSON
    title: str
    about: str  # a paragraph for the page: what is measured, how, and what is the same for all
    rounds: int
    contestants: tuple[Contestant, ...]
    columns: tuple[Column, ...]
    goals: tuple[Goal, ...] = ()
    prepare: Callable[[Path, bool], None] | None = None  # called once with an empty directory, and with `quick`
    chart: str = ""  # metric for the bar chart; "": no chart
    budget_s: float = 240.0  # after ROUNDS_MIN rounds, a round begins only if it fits into the budget
    timeout_s: float = 90.0  # for one round of one contestant, and for `prepare`


ROUNDS_MIN = 3


def ratio(numerator: str, denominator: str, metric: str) -> Callable[[Round], float]:
    """The figure of one contestant divided by that of another."""
    return lambda figures: figures[numerator][metric] / figures[denominator][metric]


def figure(contestant: str, metric: str) -> Callable[[Round], float]:
    """The figure of one contestant, for a goal with a unit."""
    return lambda figures: figures[contestant][metric]
