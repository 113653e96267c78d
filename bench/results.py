"""The format of `results.json`: every figure of every round, and the texts of the page.

`python -m bench` writes it; `bench/page.py` makes the page from it alone.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

SHAPE = 1  # increase it when the meaning of a field changes


class Spread(NamedTuple):
    """Median, minimum and maximum over the rounds."""

    median: float
    least: float
    most: float


def spread(figures: Iterable[float]) -> Spread | None:
    """None if there are no figures."""
    ordered = sorted(figures)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1]) if ordered else None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine, and its load during the run."""

    platform: str
    kernel: str
    processor: str
    cores: int  # available to this process
    memory_gib: float
    filesystem: str  # of the directory where the benchmark wrote
    load_before: float  # one-minute average
    load_after: float
    stolen_percent: float  # CPU time taken by the host of a virtual machine


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """Versions of what ran."""

    python: str
    msgspec: str
    sqlite: str
    zlib: str
    packages: dict[str, str]  # distribution -> version, of the contestants
    commit: str
    dirty: bool  # there were uncommitted changes
    compiled: bool  # the C extension was in use


class ColumnHeading(msgspec.Struct, frozen=True):
    """A column in the table of a section: one metric."""

    metric: str
    heading: str
    digits: int


class GoalResult(msgspec.Struct, frozen=True, kw_only=True):
    """A bound, and the figure of each round that measured all of the goal's contestants."""

    text: str
    bound: float
    at_least: bool
    unit: str  # "x" for a ratio
    found: list[float]

    @property
    def spread(self) -> Spread | None:
        """None if it was not measured."""
        return spread(self.found)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the bound; None if it was not measured."""
        measured = self.spread
        if measured is None:
            return None
        return measured.median >= self.bound if self.at_least else measured.median <= self.bound


class SectionResult(msgspec.Struct, frozen=True, kw_only=True):
    """The results of one section."""

    key: str
    title: str
    about: str
    contestants: list[str]
    ours: list[str]  # the contestants that are Pillarbox
    columns: list[ColumnHeading]
    chart: str  # metric of the chart; "": no chart
    rounds_planned: int
    order: list[list[str]]  # of each round: the contestants in the order in which they ran
    rounds: list[dict[str, dict[str, float]]]  # of each round: contestant -> metric -> figure
    failed: dict[str, str]  # contestant -> why it was not measured in all rounds
    goals: list[GoalResult]
    seconds: float  # duration of the section

    def spread(self, contestant: str, metric: str) -> Spread | None:
        """One metric of one contestant over the rounds; None if it has no such figure."""
        return spread(figures[contestant][metric] for figures in self.rounds if metric in figures.get(contestant, {}))


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """The results of one run."""

    shape: int = SHAPE
    began: str  # UTC
    seconds: float
    quick: bool  # a quick run: its figures mean little
    seed: int  # of the orders
    machine: Machine
    versions: Versions
    sections: list[SectionResult]


def encode(results: Results) -> bytes:
    """Indented JSON, readable and easy to diff."""
    return msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"


def decode(text: bytes) -> Results:
    """Decode results; raises `msgspec.ValidationError` if the format is another one."""
    results = msgspec.json.decode(text, type=Results)
    if results.shape != SHAPE:
        raise msgspec.ValidationError(f"shape {results.shape}, not {SHAPE}")
    return results
