"""How fast a backlog is delivered to each destination, compared with the fastest client that decodes the same files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import drain_http, drain_spacetimedb, drain_sqlite, sample
from bench.definitions import Column, Goal, Section, ratio

if TYPE_CHECKING:
    from pathlib import Path

_PLAIN, _PILLARBOX = drain_spacetimedb.plain_name(sample.BATCH), drain_spacetimedb.pillarbox_name(sample.BATCH)

ABOUT = """
Batches of 500 events, from opening the outbox until the last batch is settled, compared with the fastest client that the
standard library allows: it reads the same files, decodes each line with msgspec, makes the same rows or bodies and asks for
the same durability, but verifies no checksum, writes no ledger and removes no file. SQLite: one transaction per file, WAL,
`synchronous=FULL`. SpacetimeDB: a server that is started for each round; calls on one open connection, each made while the
previous one is in flight, and at the end the second call and the ping that confirm. "Prepared bodies" is an upper bound: it
reads and decodes nothing. HTTP: an endpoint on loopback, in another process, that reads each body and answers 200. Processor
seconds are those of the client's process.
"""


def prepare(shared: Path, quick: bool) -> None:
    """Write the backlogs."""
    sample.sealed_files(shared / drain_sqlite.BACKLOG, drain_sqlite.files(quick))
    sample.sealed_files(shared / drain_http.BACKLOG, drain_http.files(quick))
    for batch in drain_spacetimedb.SIZES:
        files = drain_spacetimedb.event_count(batch, quick) // batch
        sample.sealed_files(shared / drain_spacetimedb.backlog_name(batch), files, batch)


SECTION = Section(
    key="deliver",
    title="Delivering a backlog",
    about=ABOUT,
    rounds=4,
    budget_s=200.0,
    contestants=(*drain_sqlite.CONTESTANTS, *drain_spacetimedb.contestants(), *drain_http.CONTESTANTS),
    columns=(
        Column("per_s", "events/s", 0),
        Column("cpu_s", "CPU, s per million events", 2),
    ),
    goals=(
        Goal(
            "events/s into SQLite, relative to the plain client",
            ratio(drain_sqlite.PILLARBOX, drain_sqlite.PLAIN, "per_s"),
            0.8,
            at_least=True,
        ),
        Goal(
            "events/s into SpacetimeDB, 500 per call, relative to the plain client",
            ratio(_PILLARBOX, _PLAIN, "per_s"),
            0.9,
            at_least=True,
        ),
    ),
    prepare=prepare,
    chart="per_s",
)
