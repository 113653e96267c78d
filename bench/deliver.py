"""How fast a backlog goes to each destination, beside the fastest client of it that decodes the same files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import into_http, into_spacetimedb, into_sqlite, sample
from bench.plan import Column, Goal, Section, ratio

if TYPE_CHECKING:
    from pathlib import Path

_BARE, _OURS = into_spacetimedb.bare_name(sample.BATCH), into_spacetimedb.our_name(sample.BATCH)

ABOUT = """
Sealed files of 500 events, from opening the outbox until the last of them is settled, beside the fastest client that the
standard library gives: it reads the same files, decodes each line with msgspec, makes the same rows or bodies and has the same
durability, but checks no checksum, keeps no account and removes nothing. SQLite: a transaction for each file, WAL,
`synchronous=FULL`. SpacetimeDB: a server that is started for each round; calls over one connection that stays open, each made
while the one before is on its way, and at the end the second and the ping that confirm. Prepared bodies are the bound from
above: nothing is read or decoded there. HTTP: an endpoint on loopback, in another process, that reads each body and says 200.
Processor seconds are those of the client's process.
"""


def prepare(shared: Path, quick: bool) -> None:
    """The sealed files."""
    sample.sealed_files(shared / into_sqlite.BACKLOG, into_sqlite.files(quick))
    sample.sealed_files(shared / into_http.BACKLOG, into_http.files(quick))
    for batch in into_spacetimedb.SIZES:
        files = into_spacetimedb.events(batch, quick) // batch
        sample.sealed_files(shared / into_spacetimedb.backlog_of(batch), files, batch)


SECTION = Section(
    key="deliver",
    title="Delivering a backlog",
    about=ABOUT,
    rounds=4,
    budget_s=200.0,
    contestants=(*into_sqlite.CONTESTANTS, *into_spacetimedb.contestants(), *into_http.CONTESTANTS),
    columns=(
        Column("per_s", "events/s", 0),
        Column("cpu_s", "processor, s a million events", 2),
    ),
    goals=(
        Goal("into SQLite: of the bare client", ratio(into_sqlite.OURS, into_sqlite.BARE, "per_s"), 0.8, at_least=True),
        Goal("into SpacetimeDB, 500 a call: of the bare client", ratio(_OURS, _BARE, "per_s"), 0.9, at_least=True),
    ),
    prepare=prepare,
    chart="per_s",
)
