"""The shape of `results.json`: every figure of every round, and all that it takes to make the page of it.

A file of this shape is what `python -m bench` writes and what `bench/page.py` reads; the page needs nothing else.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

SHAPE = 1  # changes when the meaning of a member does


class Spread(NamedTuple):
    """What the rounds gave."""

    median: float
    least: float
    most: float


def spread(figures: Iterable[float]) -> Spread | None:
    """None where there are no figures."""
    ordered = sorted(figures)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1]) if ordered else None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it ran, and what else went on there."""

    platform: str
    kernel: str
    processor: str
    cores: int  # that this process may use
    memory_gib: float
    filesystem: str  # of the directory that was written to
    load_before: float  # average of the last minute
    load_after: float
    stolen_percent: float  # of the processors' time meanwhile, by the host of a virtual machine


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """What ran."""

    python: str
    msgspec: str
    sqlite: str
    zlib: str
    packages: dict[str, str]  # distribution -> version, of the contestants
    commit: str
    dirty: bool  # with changes that are not committed
    compiled: bool  # whether the hot path was the compiled one


class Column(msgspec.Struct, frozen=True):
    """One metric in the table of a section."""

    metric: str
    heading: str
    digits: int


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """A bound, and what was found in each round in which everybody that it is about was measured."""

    text: str
    bound: float
    at_least: bool
    unit: str  # "x" for a ratio
    found: list[float]

    @property
    def spread(self) -> Spread | None:
        """None where it was not measured."""
        return spread(self.found)

    @property
    def met(self) -> bool | None:
        """By the median; None where it was not measured."""
        found = self.spread
        if found is None:
            return None
        return found.median >= self.bound if self.at_least else found.median <= self.bound


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one section."""

    key: str
    title: str
    about: str
    contestants: list[str]
    ours: list[str]  # those of them that are Pillarbox
    columns: list[Column]
    chart: str  # the metric that is drawn; "" for none
    rounds_planned: int
    order: list[list[str]]  # of each round: who came after whom
    rounds: list[dict[str, dict[str, float]]]  # of each round: contestant -> metric -> figure
    failed: dict[str, str]  # contestant -> why it was not measured, or not in all rounds
    goals: list[Goal]
    seconds: float  # that the section took

    def spread(self, contestant: str, metric: str) -> Spread | None:
        """Of one metric of one contestant, over the rounds; None where it has none."""
        return spread(found[contestant][metric] for found in self.rounds if metric in found.get(contestant, {}))


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    shape: int = SHAPE
    began: str  # UTC
    seconds: float
    quick: bool  # with less of everything: the figures mean little
    seed: int  # of the orders
    machine: Machine
    versions: Versions
    sections: list[Section]


def encode(results: Results) -> bytes:
    """JSON with an indent, for people and for diffs."""
    return msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"


def decode(text: bytes) -> Results:
    """Raises `msgspec.ValidationError` where the shape is another."""
    found = msgspec.json.decode(text, type=Results)
    if found.shape != SHAPE:
        raise msgspec.ValidationError(f"shape {found.shape}, not {SHAPE}")
    return found
