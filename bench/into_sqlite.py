"""A backlog into SQLite, by the standard library's own module and by us."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import msgspec

from bench import backlog, sample
from bench.plan import Contestant

if TYPE_CHECKING:
    from bench.plan import Figures, RoundPaths

BARE, OURS = "sqlite3, executemany", "pillarbox, sqlite"
BACKLOG = "sqlite"
_OPTIONAL = ("user_id", "owner_user_id", "profile_id", "module_key")


def _column(name: str) -> str:
    """As the sink makes it."""
    kind = "INTEGER" if name == "occurred_at_micros" else "TEXT"
    return f"{name} {kind}" + (" PRIMARY KEY" if name == "event_id" else "") + ("" if name in _OPTIONAL else " NOT NULL")


def files(quick: bool) -> int:
    """How many sealed files there are to deliver."""
    return 40 if quick else 600


def bare(folder: RoundPaths) -> Figures:
    """`msgspec` and `executemany`, a file a transaction, with the same table and pragmas; no file is removed."""

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

    return backlog.measured(files(folder.quick) * sample.BATCH, deliver)


def ours(folder: RoundPaths) -> Figures:
    """By an outbox with its defaults."""
    url = f"sqlite:///{folder.own / 'events.db'}"
    return backlog.by_an_outbox(folder, BACKLOG, files(folder.quick) * sample.BATCH, url)


CONTESTANTS = (Contestant(BARE, bare), Contestant(OURS, ours, ours=True))
