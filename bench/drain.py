"""How fast a backlog goes into SQLite, beside a loop that decodes and inserts the same files with the same pragmas."""

from __future__ import annotations

import shutil
import sqlite3
import statistics
import time
from typing import TYPE_CHECKING

import msgspec

from bench import sample
from pillarbox import Outbox, TrackingEvent

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 3


class _Line(msgspec.Struct):
    event: TrackingEvent


def bare(backlog: Path, database: Path) -> float:
    """Seconds for `msgspec` and `executemany`, a file a transaction; files are not removed, nothing is checked."""
    began = time.perf_counter()
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    fields = TrackingEvent.__struct_fields__
    connection.execute(f"CREATE TABLE t ({', '.join(fields)}, PRIMARY KEY (event_id))")
    insert = f"INSERT INTO t VALUES ({', '.join('?' * len(fields))}) ON CONFLICT DO NOTHING"
    decode, row = msgspec.json.Decoder(_Line).decode, msgspec.structs.astuple
    for file in sorted(backlog.iterdir()):
        rows = [row(decode(line).event) for line in file.read_bytes().splitlines()]
        connection.execute("BEGIN")
        connection.executemany(insert, rows)
        connection.execute("COMMIT")
    connection.close()
    return time.perf_counter() - began


def ours(backlog: Path, database: Path) -> float:
    """Seconds for an outbox to deliver a copy of the backlog."""
    directory = backlog.with_name("outbox")
    shutil.copytree(backlog, directory)
    began = time.perf_counter()
    with Outbox(str(directory), sink=f"sqlite:///{database}", max_bytes=2**40) as outbox:
        if not outbox.flush(600):
            raise SystemExit("the backlog was not delivered in ten minutes")
        took = time.perf_counter() - began
    shutil.rmtree(directory)
    return took


def measure(place: Path, quick: bool) -> None:
    """Print events a second of both."""
    files = 100 if quick else 600
    events = files * sample.BATCH
    backlog = place / "backlog"
    sample.sealed_files(backlog, files)
    print(f"\ndrain into SQLite: {ROUNDS} rounds of {events:,} events in files of {sample.BATCH}, in turn")
    took: dict[str, list[float]] = {"bare": [], "ours": []}
    for number in range(ROUNDS):
        for name, run in (("bare", bare), ("ours", ours)):
            took[name].append(run(backlog, place / f"{name}-{number}.db"))
    for name, label in (("bare", "decode + executemany"), ("ours", "pillarbox")):
        print(f"  {label:22} {events / statistics.median(took[name]):9,.0f} events/s")
    ratio = statistics.median(a / b for a, b in zip(took["bare"], took["ours"], strict=True))
    print(f"  ratio: {ratio:.2f}; goal: at least 0.6")
