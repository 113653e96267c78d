"""The three destinations as the referee has them: started, asked what is there, emptied for the next round, and ended."""

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

from pillarbox.event import TrackingEvent
from pillarbox.sinks import make_sink
from pillarbox.sinks.sqlite import SqliteSink
from tests.crash.kills import Violation, fork
from tests.sinks.spacetimedb.server import ROOT, Server, free_port
from tests.torture import chaotic, destination, lives
from tests.torture.account import Event, Row
from tests.torture.destination import Arrived, Destination
from tests.torture.events import POISON
from tests.torture.proxy import Proxy

_MODULE: Final = ROOT / "src/pillarbox/sinks/spacetimedb/wasm/tracking_event_v1.wasm"
_UP_S: Final = 10.0


class Place(Protocol):
    """A destination; `pids` are the processes that must live as long as the run."""

    url: str
    pids: list[int]

    def arrived(self) -> tuple[Counter[Event], list[str]]:
        """How often each event is there, and what should not have happened."""

    def empty(self) -> None:
        """Forget all events."""

    def end(self) -> None:
        """End what was started."""


class Sqlite:
    """A table whose CHECK refuses what is poisoned; the chaos is in the deliverers, around the sink."""

    def __init__(self, folder: Path, seed: int, row: Row) -> None:
        self.pids: list[int] = []
        self._file = folder / "destination.db"
        self.url = f"chaotic:///{self._file}?seed={seed}"
        chaotic.row, chaotic.hang_s = row, lives.HANG_S
        chaotic.register(folder / "entry-point")
        sink = make_sink(f"sqlite:///{self._file}", TrackingEvent)
        assert isinstance(sink, SqliteSink)
        columns = sink._create_table().rpartition(")")[0]
        with contextlib.closing(sqlite3.connect(self._file)) as connection:
            connection.execute(f"{columns}, CHECK (event_key <> '{POISON}'))")

    def _execute(self, statement: str) -> list[tuple[str]]:
        with contextlib.closing(sqlite3.connect(self._file, timeout=30.0, isolation_level=None)) as connection:
            return connection.execute(statement).fetchall()

    def arrived(self) -> tuple[Counter[Event], list[str]]:
        return Counter(parsed(row[0]) for row in self._execute("SELECT event_id FROM tracking_event")), []

    def empty(self) -> None:
        self._execute("DELETE FROM tracking_event")

    def end(self) -> None:
        pass


class SpacetimeDb:
    """A real server, with a proxy in front of it."""

    def __init__(self, folder: Path, seed: int, row: Row) -> None:
        self._server = Server(folder / "server")
        self._server.publish("events", _MODULE.read_bytes())
        port = free_port()
        proxy = Proxy(f"{seed}", row, lives.HANG_S, self._server.port)
        self.pids = [fork(folder / "failures", lambda: asyncio.run(proxy.serve(port)))]
        token = quote(self._server.token, safe="")
        self.url = f"spacetimedb://:{token}@127.0.0.1:{port}/events?timeout={lives.CALL_TIMEOUT_S}&confirm_wait=0.05"

    def arrived(self) -> tuple[Counter[Event], list[str]]:
        return Counter(map(parsed, self._server.ids("events"))), []

    def empty(self) -> None:
        self._server.rows("events", "DELETE FROM tracking_event")

    def end(self) -> None:
        _end(self.pids)
        self._server.kill()


class Http:
    """A destination of our own."""

    def __init__(self, folder: Path, seed: int, row: Row) -> None:
        self._port = free_port()
        served = Destination(f"{seed}", row, lives.HANG_S)
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


PLACES: Final[dict[str, Callable[[Path, int, Row], Place]]] = {"sqlite": Sqlite, "spacetimedb": SpacetimeDb, "http": Http}


def parsed(event_id: str) -> Event:
    """The event that an id is of; raises `Violation` for one that nobody has made."""
    life, _, number = event_id.partition("-")
    if not (life.isdecimal() and number.isdecimal()):
        raise Violation(f"an id that nobody has made: {event_id!r}")
    return int(life), int(number)


def _end(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    pids.clear()


def has_server() -> bool:
    """Whether there is a SpacetimeDB to talk to; builds it where it can be built."""
    if os.environ.get("PILLARBOX_TEST_SPACETIMEDB"):
        return True
    return subprocess.run([ROOT / "tools/spacetimedb-server"], check=False, stdout=subprocess.DEVNULL).returncode == 0
