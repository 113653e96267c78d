"""The simulation of a destination that comes back: paced, it does; and the documents have its figures."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import pytest
from bench import recovery
from bench.recovery import DRAINS, SEEDS, Figures, World

FIXED, BACKOFF, PACED, LIVE = (drain.name for drain in DRAINS)


@functools.cache
def simulation_results() -> Mapping[str, Sequence[Figures]]:
    """All runs; some seconds."""
    return recovery.results(SEEDS)


@pytest.mark.parametrize("at", range(len(SEEDS)), ids=[f"seed {seed}" for seed in SEEDS])
def test_paced_the_server_recovers_and_at_full_speed_it_does_not(at: int) -> None:
    """Goodput, time to empty, lateness and work in vain, against full speed with either way of trying again."""
    paced = simulation_results()[PACED][at]
    for name in (FIXED, BACKOFF):
        full = simulation_results()[name][at]
        assert paced.goodput > 2 * full.goodput
        assert paced.empty_s < full.empty_s / 2
        assert paced.late_s < full.late_s / 2
        assert paced.in_vain < 0.05 < full.in_vain


@pytest.mark.parametrize("at", range(len(SEEDS)), ids=[f"seed {seed}" for seed in SEEDS])
def test_with_a_share_new_events_are_earlier_and_the_backlog_hardly_later(at: int) -> None:
    """What it is for."""
    live, strict = simulation_results()[LIVE][at], simulation_results()[PACED][at]
    assert live.late_s < 0.8 * strict.late_s
    assert live.empty_s < 1.3 * strict.empty_s


@pytest.mark.parametrize(
    "world",
    [
        World(clients=60, in_flight=1, live_rate=10.0, horizon_s=900.0),
        World(clients=4, in_flight=16, live_rate=100.0, horizon_s=900.0),
    ],
    ids=["many with one call at a time", "few with many at a time"],
)
def test_other_crowds_are_served_as_well(world: World) -> None:
    """The constants are not made for one."""
    figures = recovery.run(DRAINS[2], 1, world)
    assert figures.in_vain < 0.1
    assert figures.empty_s < 900


def test_the_same_seed_gives_the_same_figures() -> None:
    """And another one others."""
    small = World(outage_s=60.0, horizon_s=120.0, watched_s=60.0)
    first, second, other = (recovery.run(DRAINS[2], seed, small) for seed in (1, 1, 2))
    assert first == second != other


def test_the_documents_have_the_figures_of_the_run() -> None:
    """Mend them with `python -m bench.recovery`."""
    page = recovery.PAGE.read_text()
    assert recovery.with_table(page, simulation_results()) == page
    plot = recovery.plot(simulation_results())
    assert recovery.PLOT.read_text() == plot
    assert plot.count("<polyline") == len(DRAINS) - 1
