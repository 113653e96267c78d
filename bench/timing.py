"""Loops that time calls. The mean is that of a loop without a clock; the tails are another's, which reads it each time."""

from __future__ import annotations

import time
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bench.plan import Figures

now = time.perf_counter_ns
WARM = 1000  # calls before anything counts
T = TypeVar("T")


class Mean(NamedTuple):
    """Of a loop without a clock: microseconds for each of what it counts, which is seconds for a million of them."""

    wall: float
    cpu: float  # of all threads of the process


class Loop:
    """Times what is done until `mean` is asked for."""

    def __init__(self) -> None:
        self._cpu = time.process_time_ns()
        self._wall = now()

    def mean(self, count: int) -> Mean:
        """For each of so many."""
        wall, cpu = now() - self._wall, time.process_time_ns() - self._cpu
        return Mean(wall / count / 1e3, cpu / count / 1e3)


def untimed(put: Callable[[T], object], one: T, count: int) -> Mean:
    """The mean of so many calls."""
    loop = Loop()
    for _ in repeat(None, count):
        put(one)
    return loop.mean(count)


def timed(put: Callable[[T], object], one: T, count: int) -> list[int]:
    """What each call took, in nanoseconds."""
    took = [0] * count
    for index in range(count):
        began = now()
        put(one)
        took[index] = now() - began
    return took


def tails(took: Iterable[int]) -> Figures:
    """Of the times of single calls, in nanoseconds; no more of them than so many calls can tell."""
    ordered = sorted(took)
    shares = {"median_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}
    return {name: ordered[int(len(ordered) * share)] / 1e3 for name, share in shares.items() if len(ordered) * (1 - share) > 1}


def figures(mean: Mean, took: Iterable[int]) -> Figures:
    """Of events, and of the calls that took them."""
    return {"mean_us": mean.wall, "per_s": 1e6 / mean.wall, "cpu_s": mean.cpu, **tails(took)}
