"""Simulates a destination that comes back after an outage: all clients call it at once, or they pace their calls.

The simulation has its own clock, and all randomness comes from a seed: the same seed gives the same figures on any machine, so
`make bench` does not run it. `python -m bench.recovery` prints the figures, writes them into `docs/how-to/drain.md`, and draws
`docs/dev/recovery.svg`.

The server serves one call after the other. It also serves calls whose client has given up, as servers do: this causes the
collapse. The clients use the decisions of Pillarbox (`retry`, `Backoff`, `Pacer`) with the time of the simulation.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from bench import chart
from pillarbox.delivery import retry
from pillarbox.delivery.config import Backoff, DeliveryConfig
from pillarbox.delivery.fetcher import Scheduler
from pillarbox.delivery.pacing import Pacer, PacingConfig
from pillarbox.delivery.retry import AttemptContext, PartDone, Stop, Wait
from pillarbox.sinks.base import Delivered, DeliveryResult, Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DOCS: Final = Path(__file__).parents[1] / "docs"
PAGE: Final = DOCS / "how-to" / "drain.md"
PLOT: Final = DOCS / "dev" / "recovery.svg"
BEGIN: Final = "<!-- python -m bench.recovery -->\n"
END: Final = "<!-- end -->\n"
SEEDS: Final = (1, 2, 3, 4, 5)


class Scenario(NamedTuple):
    """The parameters of a simulation. Times in seconds, rates in events/s."""

    clients: int = 20
    in_flight: int = 4  # calls of each client in flight
    live_rate: float = 30.0  # of each client
    batch: int = 500  # events of a full file
    healthy_s: float = 120.0  # before the outage
    outage_s: float = 900.0
    horizon_s: float = 1800.0  # after the outage
    observed_s: float = 300.0  # after the outage: batches sealed in this time count for the latency
    call_s: float = 0.005  # service time per call, plus
    event_s: float = 0.0004  # per event: 2,440 events/s in full batches
    cold: float = 0.4  # fraction of the full speed when the server comes back
    warm_after_s: float = 120.0  # time until it has its full speed again
    jitter: float = 0.2  # relative variation of the service time, up and down
    timeout_s: float = 10.0  # of a client
    connection_error_s: float = 0.05  # duration of a failed connection


class FixedBackoff(Backoff):
    """The same pause before each attempt."""

    def delay(self, attempt: int, share: float) -> float:
        """One second for every attempt."""
        del attempt, share
        return 1.0


class UnpacedPacer(Pacer):
    """A pacer that never delays a call."""

    def seconds_until_next(self, now: float) -> float:
        """Always zero."""
        del now
        return 0.0


class DrainStrategy(NamedTuple):
    """A strategy for draining: when failed calls are repeated, and how calls are paced."""

    name: str
    backoff: Backoff
    pacer: type[Pacer]
    live_share: float = 0.0


STRATEGIES: Final = (
    DrainStrategy("full speed, retry every second", FixedBackoff(), UnpacedPacer),
    DrainStrategy("full speed, with backoff", Backoff(), UnpacedPacer),
    DrainStrategy("paced", Backoff(), Pacer),
    DrainStrategy("paced, live_share 0.25", Backoff(), Pacer, 0.25),
)


class BatchFile:
    """The events of one call."""

    def __init__(self, sealed_at: float, records: int) -> None:
        self.name = f"{sealed_at * 1e6:016.0f}"
        self.sealed_at = sealed_at
        self.records = records
        self.attempts = 0


class Call:
    """A call in flight."""

    def __init__(self, client: Client, file: BatchFile, began: float) -> None:
        self.client = client
        self.file = file
        self.began = began
        self.timed_out = False
        self.completed = False


class Simulation:
    """The clock, and the scheduled actions in order."""

    def __init__(self, scenario: Scenario, strategy: DrainStrategy, seed: int) -> None:
        self.scenario = scenario
        self.random = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self.recovered_at = scenario.healthy_s + scenario.outage_s
        self.server = SimulatedServer(self)
        self.acknowledged: list[tuple[float, BatchFile]] = []
        self.clients = [Client(self, strategy) for _ in range(scenario.clients)]

    def schedule(self, time: float, action: Callable[[], None]) -> None:
        """Schedule an action."""
        self._number += 1
        heapq.heappush(self._events, (time, self._number, action))

    def run(self) -> None:
        """Run until the end of the horizon."""
        end = self.recovered_at + self.scenario.horizon_s
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()

    @property
    def is_down(self) -> bool:
        """Whether the server is down now."""
        return self.scenario.healthy_s <= self.now < self.recovered_at


class SimulatedServer:
    """Serves a queue of calls in order, one at a time."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._queue: deque[Call] = deque()
        self._busy = False
        self.wasted_s = 0.0
        self.served_s = 0.0

    def receive(self, call: Call) -> None:
        """A call arrives."""
        self._queue.append(call)
        if not self._busy:
            self._serve_next()

    def _serve_next(self) -> None:
        simulation, scenario = self._simulation, self._simulation.scenario
        self._busy = bool(self._queue)
        if not self._busy:
            return
        call = self._queue.popleft()
        since = simulation.now - simulation.recovered_at
        speed = 1.0 if since < 0 else min(1.0, scenario.cold + (1 - scenario.cold) * since / scenario.warm_after_s)
        work = scenario.call_s + scenario.event_s * call.file.records
        took = work / speed * simulation.random.uniform(1 - scenario.jitter, 1 + scenario.jitter)
        simulation.schedule(simulation.now + took, lambda: self._complete(call, took))

    def _complete(self, call: Call, took: float) -> None:
        if self._simulation.now >= self._simulation.recovered_at:
            self.served_s += took
            self.wasted_s += took if call.timed_out else 0.0
        if not call.timed_out:
            call.client.handle_result(call, Delivered(call.file.records))
        self._serve_next()


class Client:
    """A process with an outbox: seals events, and sends batches with its strategy."""

    def __init__(self, simulation: Simulation, strategy: DrainStrategy) -> None:
        self._simulation = simulation
        scenario = simulation.scenario
        self._config = DeliveryConfig(backoff=strategy.backoff, max_in_flight=scenario.in_flight)
        self._pacer = strategy.pacer(PacingConfig(), scenario.in_flight)
        self._scheduler = Scheduler(strategy.live_share)
        self._outages = 0
        self.files: dict[str, BatchFile] = {}  # by name; not acknowledged yet
        self._to_retry: list[BatchFile] = []
        self._in_flight = 0
        self._retry_at = 0.0
        self._wake_up_at = -1.0
        self._open_since = 0.0
        simulation.schedule(simulation.random.uniform(0, 1), self._seal)

    def _seal(self) -> None:
        """Once a second while nothing is pending, otherwise when the batch is full."""
        simulation, scenario = self._simulation, self._simulation.scenario
        records = round((simulation.now - self._open_since) * scenario.live_rate)
        if records >= (scenario.batch if self.files else 1):
            file = BatchFile(simulation.now, records)
            self.files[file.name] = file
            self._scheduler.add_live([file.name])
            self._open_since = simulation.now
        simulation.schedule(simulation.now + 1.0, self._seal)
        self._send_due()

    def _send_due(self) -> None:
        simulation = self._simulation
        while self._in_flight < self._config.max_in_flight and (self._to_retry or self._scheduler):
            due = max(self._retry_at, simulation.now + self._pacer.seconds_until_next(simulation.now))
            if due > simulation.now:
                self._schedule_wake_up(due)
                return
            self._send(self._to_retry.pop(0) if self._to_retry else self.files[self._scheduler.pop_next()])
        if not self.files:
            self._pacer.note_drained()

    def _schedule_wake_up(self, due: float) -> None:
        if self._wake_up_at > self._simulation.now and self._wake_up_at <= due:
            return
        self._wake_up_at = due
        self._simulation.schedule(due + 1e-9, self._send_due)

    def _send(self, file: BatchFile) -> None:
        simulation, scenario = self._simulation, self._simulation.scenario
        call = Call(self, file, simulation.now)
        self._in_flight += 1
        self._pacer.note_sent(simulation.now, file.records)
        if simulation.is_down:
            simulation.schedule(
                simulation.now + scenario.connection_error_s, lambda: self.handle_result(call, Retry("connection refused"))
            )
            return
        simulation.server.receive(call)
        simulation.schedule(simulation.now + scenario.timeout_s, lambda: self._time_out(call))

    def _time_out(self, call: Call) -> None:
        if not call.completed:
            call.timed_out = True
            self.handle_result(call, Retry("no answer"))

    def handle_result(self, call: Call, result: DeliveryResult) -> None:
        """Handle the result of a call."""
        simulation, file = self._simulation, call.file
        call.completed = True
        self._in_flight -= 1
        file.attempts += 1
        action = retry.decide(result, file.records, file.attempts, simulation.random.random(), AttemptContext(), self._config)
        match action:
            case PartDone():
                self._pacer.note_accepted(call.began, simulation.now, file.records)
                if self._pacer.outages != self._outages:
                    self._outages = self._pacer.outages
                    self._scheduler.start_backlog()
                    self._scheduler.add_live([])
                del self.files[file.name]
                simulation.acknowledged.append((simulation.now, file))
            case Wait(seconds) | Stop(seconds):
                self._pacer.note_failure(call.began, simulation.now, file.records)
                self._retry_at = max(self._retry_at, simulation.now + seconds)
                self._to_retry.append(file)
        self._send_due()


class Figures(NamedTuple):
    """The figures of a drain, from the moment when the server is back."""

    goodput: float  # events/s acknowledged until the backlog is empty, or until the horizon
    empty_s: float  # until the last event of the backlog is acknowledged; infinite: not within the horizon
    latency_s: float  # median time from seal to acknowledgement, for events sealed in observed_s
    latency_p99_s: float
    wasted: float  # fraction of the server's time spent on calls that had timed out
    curve: list[float]  # events/s acknowledged, for each minute


def run(strategy: DrainStrategy, seed: int, scenario: Scenario = Scenario()) -> Figures:  # noqa: B008 - immutable
    """Simulate one drain."""
    simulation = Simulation(scenario, strategy, seed)
    simulation.run()
    recovered_at = simulation.recovered_at
    unacknowledged = [file for client in simulation.clients for file in client.files.values()]
    acknowledged = [(time, file) for time, file in simulation.acknowledged if time >= recovered_at]
    if any(file.sealed_at < recovered_at for file in unacknowledged):
        empty = math.inf
    else:
        empty = max(time for time, file in acknowledged if file.sealed_at < recovered_at) - recovered_at
    rates = [0.0] * int(scenario.horizon_s / 60)
    for time, file in acknowledged:
        rates[min(int((time - recovered_at) / 60), len(rates) - 1)] += file.records / 60
    all_files = [*acknowledged, *((math.inf, file) for file in unacknowledged)]
    latencies = sorted(
        time - file.sealed_at
        for time, file in all_files
        if recovered_at <= file.sealed_at < recovered_at + scenario.observed_s
        for _ in range(file.records)
    )
    duration = min(empty, scenario.horizon_s)
    return Figures(
        sum(file.records for time, file in acknowledged if time - recovered_at <= duration) / duration,
        empty,
        latencies[len(latencies) // 2],
        latencies[int(len(latencies) * 0.99)],
        simulation.server.wasted_s / simulation.server.served_s,
        rates,
    )


def _seconds(number: float, scenario: Scenario) -> str:
    return f"{number:,.0f} s" if number < math.inf else f"not within {scenario.horizon_s / 60:.0f} min"


def table(results: Mapping[str, Sequence[Figures]], scenario: Scenario = Scenario()) -> str:  # noqa: B008 - immutable
    """The table for the documentation: for each strategy, the medians of its runs."""
    lines = [
        "| strategy | acknowledged | backlog empty after | latency of new events, median | latency, p99 | wasted server time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in results.items():
        goodput = statistics.median(run.goodput for run in runs)
        wasted = statistics.median(run.wasted for run in runs)
        columns = zip(*((run.empty_s, run.latency_s, run.latency_p99_s) for run in runs), strict=True)
        times = " | ".join(_seconds(statistics.median(column), scenario) for column in columns)
        lines.append(f"| {name} | {goodput:,.0f} events/s | {times} | {100 * wasted:.0f} % |")
    return "\n".join(lines) + "\n"


def results(seeds: Sequence[int]) -> dict[str, list[Figures]]:
    """The figures of each strategy with these seeds."""
    return {strategy.name: [run(strategy, seed) for seed in seeds] for strategy in STRATEGIES}


def plot(figures_by_strategy: Mapping[str, Sequence[Figures]]) -> str:
    """The plot of the runs with the first seed, as SVG."""
    scenario = Scenario()
    lines = {name: runs[0].curve for name, runs in figures_by_strategy.items() if "live_share" not in name}
    return chart.lines("events/s acknowledged, by minutes since the server is back", lines, scenario.horizon_s / 60)


def with_table(text: str, figures_by_strategy: Mapping[str, Sequence[Figures]]) -> str:
    """The page with the table replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(figures_by_strategy) + END + rest.split(END)[1]


def main() -> None:
    """Print the figures, and write them and the plot into the documentation."""
    figures_by_strategy = results(SEEDS)
    print(table(figures_by_strategy), end="")
    PAGE.write_text(with_table(PAGE.read_text(), figures_by_strategy))
    PLOT.write_text(plot(figures_by_strategy))


if __name__ == "__main__":
    main()
