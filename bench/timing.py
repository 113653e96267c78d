"""Loops that time calls: one reads no clock and gives the mean; another reads it at each call and gives the tails."""

from __future__ import annotations

import time
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bench.definitions import Figures

now = time.perf_counter_ns
WARMUP_CALLS = 1000  # calls before the measurement
T = TypeVar("T")


class Mean(NamedTuple):
    """Mean of a loop that reads no clock: microseconds per item, which is seconds per million items."""

    wall: float
    cpu: float  # of all threads of the process


class Stopwatch:
    """Measures the time between its creation and `mean`."""

    def __init__(self) -> None:
        self._cpu = time.process_time_ns()
        self._wall = now()

    def mean(self, count: int) -> Mean:
        """The mean over `count` items."""
        wall, cpu = now() - self._wall, time.process_time_ns() - self._cpu
        return Mean(wall / count / 1e3, cpu / count / 1e3)


def untimed(put: Callable[[T], object], item: T, count: int) -> Mean:
    """The mean of `count` calls."""
    loop = Stopwatch()
    for _ in repeat(None, count):
        put(item)
    return loop.mean(count)


def timed(put: Callable[[T], object], item: T, count: int) -> list[int]:
    """The time of each of `count` calls in nanoseconds."""
    call_times = [0] * count
    for index in range(count):
        began = now()
        put(item)
        call_times[index] = now() - began
    return call_times


def tails(call_times: Iterable[int]) -> Figures:
    """Median and percentiles of call times in nanoseconds. A percentile is left out if there are too few calls for it."""
    ordered = sorted(call_times)
    shares = {"median_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}
    return {name: ordered[int(len(ordered) * share)] / 1e3 for name, share in shares.items() if len(ordered) * (1 - share) > 1}


def figures(mean: Mean, call_times: Iterable[int]) -> Figures:
    """The mean per event, and the percentiles of the calls."""
    return {"mean_us": mean.wall, "per_s": 1e6 / mean.wall, "cpu_s": mean.cpu, **tails(call_times)}
