"""The simulation of a destination that comes back after an outage: with pacing it recovers. The documentation has the figures."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import pytest
from bench import recovery
from bench.recovery import SEEDS, STRATEGIES, Figures, Scenario

FIXED, BACKOFF, PACED, LIVE = (strategy.name for strategy in STRATEGIES)


@functools.cache
def simulation_results() -> Mapping[str, Sequence[Figures]]:
    """The results of all runs, computed once in a few seconds."""
    return recovery.results(SEEDS)


@pytest.mark.parametrize("index", range(len(SEEDS)), ids=[f"seed {seed}" for seed in SEEDS])
def test_with_pacing_the_server_recovers_and_at_full_speed_it_does_not(index: int) -> None:
    """Throughput, time until the backlog is empty, latency and wasted server time, compared with both unpaced strategies."""
    paced = simulation_results()[PACED][index]
    for name in (FIXED, BACKOFF):
        unpaced = simulation_results()[name][index]
        assert paced.goodput > 2 * unpaced.goodput
        assert paced.empty_s < unpaced.empty_s / 2
        assert paced.latency_s < unpaced.latency_s / 2
        assert paced.wasted < 0.05 < unpaced.wasted


@pytest.mark.parametrize("index", range(len(SEEDS)), ids=[f"seed {seed}" for seed in SEEDS])
def test_live_share_delivers_new_events_earlier_and_the_backlog_hardly_later(index: int) -> None:
    """This is its purpose."""
    with_live_share, strict = simulation_results()[LIVE][index], simulation_results()[PACED][index]
    assert with_live_share.latency_s < 0.8 * strict.latency_s
    assert with_live_share.empty_s < 1.3 * strict.empty_s


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(clients=60, in_flight=1, live_rate=10.0, horizon_s=900.0),
        Scenario(clients=4, in_flight=16, live_rate=100.0, horizon_s=900.0),
    ],
    ids=["many clients with one call in flight", "few clients with many calls in flight"],
)
def test_other_numbers_of_clients_recover_too(scenario: Scenario) -> None:
    """The constants of the pacer do not only fit the default scenario."""
    figures = recovery.run(STRATEGIES[2], 1, scenario)
    assert figures.wasted < 0.1
    assert figures.empty_s < 900


def test_the_same_seed_gives_the_same_figures() -> None:
    """Another seed gives other figures."""
    short = Scenario(outage_s=60.0, horizon_s=120.0, observed_s=60.0)
    first, second, other = (recovery.run(STRATEGIES[2], seed, short) for seed in (1, 1, 2))
    assert first == second != other


def test_the_documentation_has_the_figures_of_the_simulation() -> None:
    """If it does not, run `python -m bench.recovery`."""
    page = recovery.PAGE.read_text()
    assert recovery.with_table(page, simulation_results()) == page
    plot = recovery.plot(simulation_results())
    assert recovery.PLOT.read_text() == plot
    assert plot.count("<polyline") == len(STRATEGIES) - 1
