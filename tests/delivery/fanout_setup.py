"""Helpers for tests with several sinks: real destinations, their contents, and the counts of the ledgers."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from pillarbox import Outbox
from pillarbox.clock import SystemClock
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.reconciliation import reconcile, reconcile_queues
from tests.conftest import event
from tests.sinks.http_server import CannedResponse, Request

if TYPE_CHECKING:
    from pillarbox.store.ledger_entries import LedgerRow

BUSY_RESPONSE = CannedResponse(503, headers={"Retry-After": "0"})


def open_directory(box: Path) -> Directory:
    return Directory(str(box), OsFilesystem(), SystemClock())


def enqueue_events(outbox: Outbox, count: int, first: int = 0, **members: object) -> None:
    assert all(outbox.enqueue(event(number, **members)) for number in range(first, first + count))


def enqueue_files(outbox: Outbox, files: int, each: int = 10, first: int = 0, **members: object) -> None:
    """Seal files of `each` events. Each file is stored in one write, because a segment may be sealed by age in between."""
    for start in range(first, first + files * each, each):
        assert all(outbox.enqueue_many([event(number, **members) for number in range(start, start + each)]))
        assert outbox._sealer.seal_now("manual", 60)


def event_ids(count: int, first: int = 0) -> list[str]:
    return [f"e-{number:06d}" for number in range(first, first + count)]


def stored_event_ids(database: Path) -> list[str]:
    """The event ids in a database. The id is the primary key, so each is stored once."""
    with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection:
        return [event_id for (event_id,) in connection.execute("SELECT event_id FROM tracking_event ORDER BY event_id")]


def received_counts(requests: list[Request], keys: set[str] | None = None) -> Counter[str]:
    """How often an HTTP server received each event. A repeated idempotency key is not counted."""
    known_keys: set[str] = set() if keys is None else keys
    counts: Counter[str] = Counter()
    for request in requests:
        if request.method == "POST" and request.idempotency_key not in known_keys:
            known_keys.add(request.idempotency_key)
            counts.update(received["event_id"] for received in request.events)
    return counts


def reject_poison(request: Request) -> CannedResponse:
    """Accept all events except those with the key "poison", and name these in the response."""
    if request.method != "POST":
        return CannedResponse(405)
    poisoned = [index for index, received in enumerate(request.events) if received["event_key"] == "poison"]
    if not poisoned:
        return CannedResponse(202)
    refused = {"refused": [{"index": index, "reason": "poison"} for index in poisoned]}
    return CannedResponse(422, json.dumps(refused).encode(), {"Content-Type": "application/json"})


def batch_files(box: Path) -> list[str]:
    """Batch files in a directory, or in a queue that may not exist yet."""
    names = os.listdir(box) if box.exists() else []
    return sorted(name for name in names if layout.kind_of(name) is layout.Kind.SEALED)


def balanced_totals(box: Path) -> dict[str, LedgerRow]:
    """The counts of the directory and of each sink, after a check that they balance."""
    outbox_dir = open_directory(box)
    overall = reconcile(outbox_dir)
    found = {"": overall, **reconcile_queues(outbox_dir, overall)}
    assert all(reconciliation.balances for reconciliation in found.values()), found
    return {name: reconciliation.reconciliation.total for name, reconciliation in found.items()}
