"""Loops that time calls. The mean is that of a loop without a clock; the tails are another's, which reads it each time."""

from __future__ import annotations

import time
from itertools import repeat
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bench.plan import Figures

now = time.perf_counter_ns
WARM = 1000  # calls before anything counts
T = TypeVar("T")


def untimed(put: Callable[[T], object], one: T, count: int) -> float:
    """Microseconds a call, in the mean."""
    began = now()
    for _ in repeat(None, count):
        put(one)
    return (now() - began) / count / 1e3


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


def figures(mean_us: float, took: Iterable[int]) -> Figures:
    """Of what is accepted at one event in `mean_us`, in calls that took so long."""
    return {"mean_us": mean_us, "per_s": 1e6 / mean_us, **tails(took)}
