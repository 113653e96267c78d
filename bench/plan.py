"""What is measured: sections of contestants that take turns in one run, and the goals that their ratios are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

Figures = Mapping[str, float]  # metric -> what one round of one contestant gave
Round = Mapping[str, Figures]  # contestant -> its figures in one round


class Place(NamedTuple):
    """Where one round of one contestant works."""

    own: Path  # empty, removed afterwards
    shared: Path  # what the section's `prepare` made, to be read only
    quick: bool  # with less of everything: to see that it runs


class Contestant(NamedTuple):
    """One of those that are compared. `run` does one round, in a process of its own."""

    name: str  # in tables and charts; unique within the section
    run: Callable[[Place], Figures]
    packages: tuple[str, ...] = ()  # distributions whose versions are to be recorded


class Column(NamedTuple):
    """One metric in the table of a section: the median of the rounds, and how far they spread."""

    metric: str
    heading: str
    digits: int


class Goal(NamedTuple):
    """A ratio within one round, and its bound; what counts is the median of the rounds'."""

    text: str
    ratio: Callable[[Round], float]
    bound: float
    at_least: bool = False  # otherwise at most


class Section(NamedTuple):
    """Contestants that are measured side by side: in each round all of them, in a random order."""

    key: str  # names it on the command line and in the JSON
    title: str
    about: str  # a paragraph for the page: what is measured, how, what is equal on all sides
    rounds: int
    contestants: tuple[Contestant, ...]
    columns: tuple[Column, ...]
    goals: tuple[Goal, ...] = ()
    prepare: Callable[[Path, bool], None] | None = None  # once, into an empty directory; True: with less of everything
    chart: str = ""  # the metric that is drawn as bars; "" draws none


def ratio(one: str, other: str, metric: str) -> Callable[[Round], float]:
    """A contestant's figure divided by another's."""
    return lambda found: found[one][metric] / found[other][metric]
