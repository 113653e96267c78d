"""A destination that comes back after an outage, simulated: where all who have waited call at once, and where they are paced.

No time passes, and nothing is random but for the seed: the same seed gives the same figures on any machine, so that
`make bench` leaves it out. `python -m bench.recovery` prints them, and writes them into `docs/how-to/drain.md` and the plot
into `docs/dev/recovery.svg`.

The server serves one call after the other. A call that nobody waits for any more is served all the same, as servers do: that is
what makes the collapse. The clients are Pillarbox's own decisions (`policy`, `backoff`, `pacing`), told the simulation's time.
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


class World(NamedTuple):
    """What is simulated. Times in seconds, rates in events/s."""

    clients: int = 20
    in_flight: int = 4  # calls that each has under way at once
    live_rate: float = 30.0  # of each client
    batch: int = 500  # events of a full file
    well_s: float = 120.0  # before the outage
    outage_s: float = 900.0
    horizon_s: float = 1800.0  # after the outage
    watched_s: float = 300.0  # after the outage: how late are the files that are sealed in this time?
    call_s: float = 0.005  # of service for a call, and
    event_s: float = 0.0004  # for each of its events: 2,440 events/s in full files
    cold: float = 0.4  # of its speed is what the server has when it comes back, and
    warm_after_s: float = 120.0  # all of it after so long
    jitter: float = 0.2  # of a call's service, up or down
    timeout_s: float = 10.0  # for which a client waits for an answer
    refused_s: float = 0.05  # a connection error takes so long


class Fixed(Backoff):
    """The same pause before each try."""

    def delay(self, attempt: int, share: float) -> float:
        """A second, whatever the attempt."""
        del attempt, share
        return 1.0


class Unpaced(Pacer):
    """Nothing is ever held back."""

    def seconds_until_next(self, now: float) -> float:
        """No time, whatever has happened."""
        del now
        return 0.0


class Drain(NamedTuple):
    """A way to drain: when what failed is tried again, and what holds calls back."""

    name: str
    backoff: Backoff
    pacer: type[Pacer]
    live_share: float = 0.0


DRAINS: Final = (
    Drain("full speed, tried again every second", Fixed(), Unpaced),
    Drain("full speed, with backoff", Backoff(), Unpaced),
    Drain("paced", Backoff(), Pacer),
    Drain("paced, live_share 0.25", Backoff(), Pacer, 0.25),
)


class File:
    """Events that go in one call."""

    def __init__(self, sealed_at: float, records: int) -> None:
        self.name = f"{sealed_at * 1e6:016.0f}"
        self.sealed_at = sealed_at
        self.records = records
        self.attempts = 0


class Call:
    """A file on its way."""

    def __init__(self, client: Client, file: File, began: float) -> None:
        self.client = client
        self.file = file
        self.began = began
        self.given_up = False
        self.answered = False


class Simulation:
    """Time, and what happens in it, in order."""

    def __init__(self, world: World, drain: Drain, seed: int) -> None:
        self.world = world
        self.chance = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self.back_at = world.well_s + world.outage_s
        self.server = Server(self)
        self.acknowledged: list[tuple[float, File]] = []
        self.clients = [Client(self, drain) for _ in range(world.clients)]

    def at(self, moment: float, do: Callable[[], None]) -> None:
        """Have something done then."""
        self._number += 1
        heapq.heappush(self._events, (moment, self._number, do))

    def run(self) -> None:
        """Until the horizon."""
        end = self.back_at + self.world.horizon_s
        while self._events and self._events[0][0] <= end:
            self.now, _, do = heapq.heappop(self._events)
            do()

    @property
    def is_down(self) -> bool:
        """Whether this is the outage."""
        return self.world.well_s <= self.now < self.back_at


class Server:
    """A queue that is served in order, one call at a time."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._queue: deque[Call] = deque()
        self._busy = False
        self.served_in_vain_s = 0.0
        self.served_s = 0.0

    def take(self, call: Call) -> None:
        """A call arrives."""
        self._queue.append(call)
        if not self._busy:
            self._next()

    def _next(self) -> None:
        simulation, world = self._simulation, self._simulation.world
        self._busy = bool(self._queue)
        if not self._busy:
            return
        call = self._queue.popleft()
        since = simulation.now - simulation.back_at
        speed = 1.0 if since < 0 else min(1.0, world.cold + (1 - world.cold) * since / world.warm_after_s)
        work = world.call_s + world.event_s * call.file.records
        took = work / speed * simulation.chance.uniform(1 - world.jitter, 1 + world.jitter)
        simulation.at(simulation.now + took, lambda: self._done(call, took))

    def _done(self, call: Call, took: float) -> None:
        if self._simulation.now >= self._simulation.back_at:
            self.served_s += took
            self.served_in_vain_s += took if call.given_up else 0.0
        if not call.given_up:
            call.client.hear(call, Delivered(call.file.records))
        self._next()


class Client:
    """One process with an outbox: seals what comes in, and sends it as its drain has it."""

    def __init__(self, simulation: Simulation, drain: Drain) -> None:
        self._simulation = simulation
        world = simulation.world
        self._rules = DeliveryConfig(backoff=drain.backoff, max_in_flight=world.in_flight)
        self._pacer = drain.pacer(PacingConfig(), world.in_flight)
        self._lineup = Scheduler(drain.live_share)
        self._outages = 0
        self.files: dict[str, File] = {}  # that are not acknowledged yet, by name
        self._again: list[File] = []
        self._under_way = 0
        self._not_before = 0.0
        self._wakes_at = -1.0
        self._open_since = 0.0
        simulation.at(simulation.chance.uniform(0, 1), self._seal)

    def _seal(self) -> None:
        """Once a second while nothing waits, otherwise when a file is full."""
        simulation, world = self._simulation, self._simulation.world
        records = round((simulation.now - self._open_since) * world.live_rate)
        if records >= (world.batch if self.files else 1):
            file = File(simulation.now, records)
            self.files[file.name] = file
            self._lineup.add_live([file.name])
            self._open_since = simulation.now
        simulation.at(simulation.now + 1.0, self._seal)
        self._go_on()

    def _go_on(self) -> None:
        simulation = self._simulation
        while self._under_way < self._rules.max_in_flight and (self._again or self._lineup):
            due = max(self._not_before, simulation.now + self._pacer.seconds_until_next(simulation.now))
            if due > simulation.now:
                self._wake(due)
                return
            self._send(self._again.pop(0) if self._again else self.files[self._lineup.pop_next()])
        if not self.files:
            self._pacer.note_drained()

    def _wake(self, due: float) -> None:
        if self._wakes_at > self._simulation.now and self._wakes_at <= due:
            return
        self._wakes_at = due
        self._simulation.at(due + 1e-9, self._go_on)

    def _send(self, file: File) -> None:
        simulation, world = self._simulation, self._simulation.world
        call = Call(self, file, simulation.now)
        self._under_way += 1
        self._pacer.note_sent(simulation.now, file.records)
        if simulation.is_down:
            simulation.at(simulation.now + world.refused_s, lambda: self.hear(call, Retry("connection refused")))
            return
        simulation.server.take(call)
        simulation.at(simulation.now + world.timeout_s, lambda: self._give_up(call))

    def _give_up(self, call: Call) -> None:
        if not call.answered:
            call.given_up = True
            self.hear(call, Retry("no answer"))

    def hear(self, call: Call, answer: DeliveryResult) -> None:
        """What became of a call."""
        simulation, file = self._simulation, call.file
        call.answered = True
        self._under_way -= 1
        file.attempts += 1
        action = retry.decide(answer, file.records, file.attempts, simulation.chance.random(), AttemptContext(), self._rules)
        match action:
            case PartDone():
                self._pacer.note_accepted(call.began, simulation.now, file.records)
                if self._pacer.outages != self._outages:
                    self._outages = self._pacer.outages
                    self._lineup.start_backlog()
                    self._lineup.add_live([])
                del self.files[file.name]
                simulation.acknowledged.append((simulation.now, file))
            case Wait(seconds) | Stop(seconds):
                self._pacer.note_failure(call.began, simulation.now, file.records)
                self._not_before = max(self._not_before, simulation.now + seconds)
                self._again.append(file)
        self._go_on()


class Figures(NamedTuple):
    """What came of a drain, from the moment when the server was back."""

    goodput: float  # events/s that were acknowledged, until the backlog was, or to the horizon
    empty_s: float  # until the last event from before was acknowledged; infinite: not within the horizon
    late_s: float  # median of the time from sealing to acknowledgement, of what was sealed while it was watched
    late_p99_s: float
    in_vain: float  # share of the server's time that went into calls nobody waited for
    curve: list[float]  # events/s acknowledged, minute by minute


def run(drain: Drain, seed: int, world: World = World()) -> Figures:  # noqa: B008 - immutable
    """Simulate one drain."""
    simulation = Simulation(world, drain, seed)
    simulation.run()
    back = simulation.back_at
    left = [file for client in simulation.clients for file in client.files.values()]
    since = [(at, file) for at, file in simulation.acknowledged if at >= back]
    if any(file.sealed_at < back for file in left):
        empty = math.inf
    else:
        empty = max(at for at, file in since if file.sealed_at < back) - back
    minutes = [0.0] * int(world.horizon_s / 60)
    for at, file in since:
        minutes[min(int((at - back) / 60), len(minutes) - 1)] += file.records / 60
    everything = [*since, *((math.inf, file) for file in left)]
    late = sorted(
        at - file.sealed_at
        for at, file in everything
        if back <= file.sealed_at < back + world.watched_s
        for _ in range(file.records)
    )
    stretch = min(empty, world.horizon_s)
    return Figures(
        sum(file.records for at, file in since if at - back <= stretch) / stretch,
        empty,
        late[len(late) // 2],
        late[int(len(late) * 0.99)],
        simulation.server.served_in_vain_s / simulation.server.served_s,
        minutes,
    )


def _seconds(number: float, world: World) -> str:
    return f"{number:,.0f} s" if number < math.inf else f"not within {world.horizon_s / 60:.0f} min"


def table(results: Mapping[str, Sequence[Figures]], world: World = World()) -> str:  # noqa: B008 - immutable
    """The figures as the documents have them: of each drain, the medians over its runs."""
    lines = [
        "| drain | acknowledged | backlog gone after | new events: median | new events: 99 of 100 | server's work in vain |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in results.items():
        goodput = statistics.median(run.goodput for run in runs)
        in_vain = statistics.median(run.in_vain for run in runs)
        spans = zip(*((run.empty_s, run.late_s, run.late_p99_s) for run in runs), strict=True)
        times = " | ".join(_seconds(statistics.median(span), world) for span in spans)
        lines.append(f"| {name} | {goodput:,.0f} events/s | {times} | {100 * in_vain:.0f} % |")
    return "\n".join(lines) + "\n"


def results(seeds: Sequence[int]) -> dict[str, list[Figures]]:
    """The figures of each drain, for these seeds."""
    return {drain.name: [run(drain, seed) for seed in seeds] for drain in DRAINS}


def plot(found: Mapping[str, Sequence[Figures]]) -> str:
    """The plot of the first seed's runs, as SVG."""
    world = World()
    lines = {name: runs[0].curve for name, runs in found.items() if "live_share" not in name}
    return chart.lines("events/s acknowledged, by minutes since the server is back", lines, world.horizon_s / 60)


def with_table(text: str, found: Mapping[str, Sequence[Figures]]) -> str:
    """The page with these figures in place of its own."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(found) + END + rest.split(END)[1]


def main() -> None:
    """Print the figures, and write them and the plot into the documents."""
    found = results(SEEDS)
    print(table(found), end="")
    PAGE.write_text(with_table(PAGE.read_text(), found))
    PLOT.write_text(plot(found))


if __name__ == "__main__":
    main()
