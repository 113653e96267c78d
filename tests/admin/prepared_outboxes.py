"""Outbox directories with dead letters, made by real outboxes and a real destination."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from pillarbox import Outbox, TrackingEvent
from pillarbox.admin.dead_letters import IdentityDecoder
from pillarbox.admin.replay import ReplayValidator
from pillarbox.store import record
from tests.conftest import event

IDENTITY_DECODER = IdentityDecoder(TrackingEvent)
VALIDATOR = ReplayValidator(TrackingEvent, "event_id")


def event_json(number: int, scope_id: object = "s", key: str = "buy") -> bytes:
    """An event's JSON. A `scope_id` that is not text has the wrong type."""
    scope = f'"{scope_id}"' if isinstance(scope_id, str) else str(scope_id)
    text = f'{{"event_id":"w-{number:06d}","event_key":"{key}","scope_kind":"Site","scope_id":{scope},"occurred_at_micros":1}}'
    return text.encode()


def seal_batch(box: Path, *extra: bytes, good: int = 3, first: int = 0) -> Path:
    """Seal a batch of good events, and append `extra` to its file.

    The events are stored in one write, because a segment may be sealed by its age in between.
    """
    before = set(box.glob("sealed-*"))
    with Outbox(str(box)) as outbox:
        assert all(outbox.enqueue_many([event(number) for number in range(first, first + good)]))
        assert outbox._sealer.seal_now("manual", 60)
    (file,) = set(box.glob("sealed-*")) - before
    with file.open("ab") as out:
        out.write(b"".join(extra))
    return file


def deliver_pending(box: Path, database: Path) -> None:
    """Deliver all pending batches."""
    with Outbox(str(box), sink=f"sqlite:///{database}") as outbox:
        assert outbox.flush(60)


def outbox_with_dead_letters(folder: Path, payloads: Sequence[bytes], files: int = 1) -> Path:
    """A directory with dead letters in some files. The good events of their batches were delivered."""
    box = folder / "box"
    share = -(-len(payloads) // files)
    for number in range(files):
        part = payloads[number * share : (number + 1) * share]
        seal_batch(box, *map(record.line, part), first=3 * number)
    deliver_pending(box, folder / "events.db")
    assert len(list(box.glob("dead-*"))) == files
    return box


def delivered_rows(database: Path) -> list[tuple[str, str]]:
    """(event id, scope id) of the rows in the destination, in the order of their delivery. The id is the primary key."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT event_id, scope_id FROM tracking_event ORDER BY rowid").fetchall()


def file_lines(box: Path, pattern: str) -> list[bytes]:
    """The lines of all files that match a pattern."""
    return [line for file in sorted(box.glob(pattern)) for line in file.read_bytes().split(b"\n") if line]
