"""What is measured: sections of contestants that take turns in one run, and the goals that their ratios are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

Figures = Mapping[str, float]  # metric -> what one round of one contestant gave
Round = Mapping[str, Figures]  # contestant -> its figures in one round


class NotHere(Exception):  # noqa: N818 - no error: something that is needed is not to be had on this machine
    """Raised by a contestant that cannot be measured here; the message says what is missing."""


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
    ours: bool = False  # drawn in another colour
    environment: tuple[tuple[str, str], ...] = ()  # of its process, beside what the run has


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
    unit: str = "x"  # of a figure that is no ratio: "us", "MiB"


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
    budget_s: float = 240.0  # after ROUNDS_MIN rounds, none begins that would not fit into it
    timeout_s: float = 90.0  # of one round of one contestant, and of `prepare`


ROUNDS_MIN = 3


def ratio(one: str, other: str, metric: str) -> Callable[[Round], float]:
    """A contestant's figure divided by another's."""
    return lambda found: found[one][metric] / found[other][metric]


def figure(one: str, metric: str) -> Callable[[Round], float]:
    """A contestant's figure itself, for a goal that has a unit."""
    return lambda found: found[one][metric]
