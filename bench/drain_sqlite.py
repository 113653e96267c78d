"""A backlog delivered into SQLite: by the `sqlite3` module and by Pillarbox."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import msgspec

from bench import backlog, sample
from bench.definitions import Contestant

if TYPE_CHECKING:
    from bench.definitions import Figures, RoundPaths

PLAIN, PILLARBOX = "sqlite3, executemany", "pillarbox, sqlite"
BACKLOG = "sqlite"
_OPTIONAL = ("user_id", "owner_user_id", "profile_id", "module_key")


def _column(name: str) -> str:
    """The column definition that the sink uses."""
    kind = "INTEGER" if name == "occurred_at_micros" else "TEXT"
    return f"{name} {kind}" + (" PRIMARY KEY" if name == "event_id" else "") + ("" if name in _OPTIONAL else " NOT NULL")


def files(quick: bool) -> int:
    """The number of batch files to deliver."""
    return 40 if quick else 600


def deliver_plain(folder: RoundPaths) -> Figures:
    """`msgspec` and `executemany`, one transaction per file, with the same table and pragmas. No file is deleted."""

    def deliver() -> None:
        connection = sqlite3.connect(folder.own / "events.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"CREATE TABLE t ({', '.join(map(_column, backlog.FIELDS))})")
        insert = f"INSERT INTO t VALUES ({', '.join('?' * len(backlog.FIELDS))}) ON CONFLICT DO NOTHING"
        decode, row = msgspec.json.Decoder(backlog.Line).decode, msgspec.structs.astuple
        for lines in backlog.lines(folder.shared / BACKLOG):
            rows = [row(decode(line).event) for line in lines]
            connection.execute("BEGIN")
            connection.executemany(insert, rows)
            connection.execute("COMMIT")
        connection.close()

    return backlog.measure_delivery(files(folder.quick) * sample.BATCH, deliver)


def deliver_pillarbox(folder: RoundPaths) -> Figures:
    """An outbox with default settings."""
    url = f"sqlite:///{folder.own / 'events.db'}"
    return backlog.deliver_with_outbox(folder, BACKLOG, files(folder.quick) * sample.BATCH, url)


CONTESTANTS = (Contestant(PLAIN, deliver_plain), Contestant(PILLARBOX, deliver_pillarbox, ours=True))
