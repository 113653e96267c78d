"""From an application, over the disk, into SQLite: what `make run` shows.

Takes the events of `examples/data/events.ndjson` through a new outbox in `var/first-steps` and looks at what arrived.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from pathlib import Path

import msgspec

import pillarbox

HERE = Path(__file__).parent
FOLDER = HERE.parent / "var" / "first-steps"


def main() -> None:
    """Store, deliver, look."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    lines = (HERE / "data" / "events.ndjson").read_bytes().splitlines()
    events = [msgspec.json.decode(line, type=pillarbox.TrackingEvent) for line in lines]

    with pillarbox.Outbox(str(FOLDER / "outbox"), sink=f"sqlite:///{FOLDER / 'events.db'}") as outbox:
        began = time.perf_counter()
        accepted = sum(bool(outbox.enqueue(event)) for event in events)
        stored = time.perf_counter()
        complete = outbox.flush(timeout=30)
        delivered = time.perf_counter()
        stats = outbox.stats()

    print(f"accepted   {accepted} events in {(stored - began) * 1e6 / len(events):.1f} us each, threads started on the way")
    print(f"delivered  {stats.delivered} within {(delivered - stored) * 1e3:.0f} ms; files that wait: {stats.pending_files}")

    database = sqlite3.connect(FOLDER / "events.db")
    print("\nWhat arrived, by kind:")
    for key, count in database.execute("SELECT event_key, COUNT(*) FROM tracking_event GROUP BY 1 ORDER BY 2 DESC LIMIT 5"):
        print(f"  {count:4}  {key}")
    print("\nThe first three:")
    for row in database.execute("SELECT event_id, event_key, scope_kind, scope_id FROM tracking_event ORDER BY rowid LIMIT 3"):
        print("  " + "  ".join(map(str, row)))
    arrived = database.execute("SELECT COUNT(*) FROM tracking_event").fetchone()[0]
    database.close()
    if not (complete and arrived == accepted == len(events)):
        raise SystemExit(f"{len(events)} events, {accepted} accepted, {arrived} arrived: see the lines above")
    try_next()


def try_next() -> None:
    """Say where to go from here."""
    folder = FOLDER.relative_to(HERE.parent)
    print(f"""
All of them arrived, once. Try next:
  .venv/bin/pillarbox enqueue -d {folder}/outbox --ack examples/data/events.ndjson   # stored; nobody delivers yet
  .venv/bin/pillarbox status -d {folder}/outbox                                      # so it waits
  .venv/bin/pillarbox deliver -d {folder}/outbox --sink sqlite:///{folder}/events.db --once
                                                       # delivered: the same ids again, so all are known duplicates
  sqlite3 {folder}/events.db 'SELECT * FROM tracking_event LIMIT 5'
  make test""")


if __name__ == "__main__":
    main()
