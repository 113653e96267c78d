"""The destinations of the torture: it starts them, reads the arrived events, empties them after each round, and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import random
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote

import msgspec

from pillarbox.delivery.runner import ONLY_SINK
from pillarbox.event import TrackingEvent
from pillarbox.sinks import make_sink
from pillarbox.sinks.sqlite import SqliteSink
from tests.crash.kills import KillViolation, fork
from tests.sinks.spacetimedb.server import ROOT, SpacetimeDbServer, free_port
from tests.torture import chaotic, destination, lives
from tests.torture.account import CounterRow, Event
from tests.torture.destination import Arrived, HttpDestination
from tests.torture.events import POISON
from tests.torture.lives import FICKLE, STEADY
from tests.torture.proxy import Proxy

_MODULE: Final = ROOT / "src/pillarbox/sinks/spacetimedb/wasm/tracking_event_v1.wasm"
_UP_S: Final = 10.0


_DOWN: Final = "down"  # while this file exists, all destinations but the steady one reject everything


class RunningDestination(Protocol):
    """A destination. The processes `pids` must run as long as the torture."""

    url: str
    pids: list[int]
    takes_all: bool  # including poisoned events

    def arrived(self) -> tuple[Counter[Event], list[str]]:
        """How often each event has arrived, and the errors that the destination noticed."""

    def empty(self) -> None:
        """Delete all events."""

    def end(self) -> None:
        """End the processes that were started."""


class Steady:
    """A table that accepts everything at once."""

    takes_all = True

    def __init__(self, file: Path, check: str = "TRUE") -> None:
        self.pids: list[int] = []
        self._file = file
        self.url = f"sqlite:///{file}"
        sink = make_sink(self.url, TrackingEvent)
        assert isinstance(sink, SqliteSink)
        columns = sink._create_table_sql().rpartition(")")[0]
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute(f"{columns}, CHECK ({check}))")

    def _execute(self, statement: str) -> list[tuple[str]]:
        with contextlib.closing(sqlite3.connect(self._file, timeout=30.0, isolation_level=None)) as connection:
            return connection.execute(statement).fetchall()

    def arrived(self) -> tuple[Counter[Event], list[str]]:
        return Counter(parsed(row[0]) for row in self._execute("SELECT event_id FROM tracking_event")), []

    def empty(self) -> None:
        self._execute("DELETE FROM tracking_event")

    def end(self) -> None:
        pass


class Sqlite(Steady):
    """A table whose CHECK rejects poisoned events; the random answers are in the delivery workers, around the sink."""

    takes_all = False

    def __init__(self, folder: Path, seed: int, row: CounterRow) -> None:
        super().__init__(folder / "destination.db", f"event_key <> '{POISON}'")
        self.url = f"chaotic:///{self._file}?seed={seed}&down={folder / _DOWN}"
        chaotic.row, chaotic.hang_s = row, lives.HANG_S
        chaotic.register(folder / "entry-point")


class SpacetimeDb:
    """A real server, with a proxy in front of it."""

    takes_all = False

    def __init__(self, folder: Path, seed: int, row: CounterRow) -> None:
        self._server = SpacetimeDbServer(folder / "server")
        self._server.publish("events", _MODULE.read_bytes())
        port = free_port()
        proxy = Proxy(f"{seed}", folder / _DOWN, row, lives.HANG_S, self._server.port)
        self.pids = [fork(folder / "failures", lambda: asyncio.run(proxy.serve(port)))]
        token = quote(self._server.token, safe="")
        self.url = f"spacetimedb://:{token}@127.0.0.1:{port}/events?timeout={lives.CALL_TIMEOUT_S}&confirm_wait=0.05"

    def arrived(self) -> tuple[Counter[Event], list[str]]:
        return Counter(map(parsed, self._server.stored_event_ids("events"))), []

    def empty(self) -> None:
        self._server.rows("events", "DELETE FROM tracking_event")

    def end(self) -> None:
        _end(self.pids)
        self._server.kill()


class Http:
    """The HTTP destination of `destination.py`."""

    takes_all = False

    def __init__(self, folder: Path, seed: int, row: CounterRow) -> None:
        self._port = free_port()
        served = HttpDestination(f"{seed}", folder / _DOWN, row, lives.HANG_S)
        self.pids = [fork(folder / "failures", lambda: asyncio.run(served.serve(self._port)))]
        packed = random.Random(seed).choice(("none", "gzip"))
        self.url = f"http://127.0.0.1:{self._port}/events#timeout={lives.CALL_TIMEOUT_S}&compress={packed}"

    def _ask(self, path: str) -> Arrived:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return msgspec.json.decode(connection.getresponse().read(), type=Arrived)

    def arrived(self) -> tuple[Counter[Event], list[str]]:
        report = self._ask(destination.ARRIVED)
        return Counter({(life, number): count for life, number, count in report.events}), report.wrong

    def empty(self) -> None:
        self._ask(destination.FORGET)

    def end(self) -> None:
        _end(self.pids)


class Arena:
    """The destinations of a run: one, or a steady one and others, which the rounds use in turn."""

    def __init__(self, folder: Path, fickle: list[RunningDestination], steady: RunningDestination | None = None) -> None:
        self._down = folder / _DOWN
        self._fickle = fickle
        self._steady = steady
        self.pids = [pid for workdir in fickle for pid in workdir.pids]

    def sinks(self, number: int) -> dict[str, RunningDestination]:
        """The URLs of the destinations of a round, by sink name."""
        fickle = self._fickle[number % len(self._fickle)]
        return {ONLY_SINK: fickle} if self._steady is None else {STEADY: self._steady, FICKLE: fickle}

    def go_down(self) -> None:
        """Make all but the steady destination reject everything."""
        self._down.touch()

    def come_back(self) -> None:
        """Let them accept again."""
        self._down.unlink(missing_ok=True)

    def end(self) -> None:
        """End all processes."""
        for workdir in self._fickle:
            workdir.end()


def _one(make: Callable[[Path, int, CounterRow], RunningDestination]) -> Callable[[Path, int, CounterRow], Arena]:
    return lambda folder, seed, row: Arena(folder, [make(folder, seed, row)])


def _two(folder: Path, seed: int, row: CounterRow) -> Arena:
    return Arena(folder, [Http(folder, seed, row), Sqlite(folder, seed, row)], Steady(folder / "steady.db"))


TWO: Final = "two-sinks"
DESTINATIONS: Final[dict[str, Callable[[Path, int, CounterRow], Arena]]] = {
    "sqlite": _one(Sqlite),
    "spacetimedb": _one(SpacetimeDb),
    "http": _one(Http),
    TWO: _two,
}


def parsed(event_id: str) -> Event:
    """The event with this id. Raises `KillViolation` for an id that no writer made."""
    life, _, number = event_id.partition("-")
    if not (life.isdecimal() and number.isdecimal()):
        raise KillViolation(f"an id that no writer made: {event_id!r}")
    return int(life), int(number)


def _end(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    pids.clear()


def has_server() -> bool:
    """Whether a SpacetimeDB server is available. Builds one if possible."""
    if os.environ.get("PILLARBOX_TEST_SPACETIMEDB"):
        return True
    return subprocess.run([ROOT / "tools/spacetimedb-server"], check=False, stdout=subprocess.DEVNULL).returncode == 0
