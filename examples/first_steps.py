"""Sends events from an application through an outbox into SQLite; `make run` runs this.

Enqueues the events of `examples/data/events.ndjson` into a new outbox in `var/first-steps`, and prints the delivered rows.
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
    """Enqueue the events, deliver them and print the result."""
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

    print(f"accepted   {accepted} events in {(stored - began) * 1e6 / len(events):.1f} us each, thread start included")
    print(f"delivered  {stats.delivered} in {(delivered - stored) * 1e3:.0f} ms; {stats.pending_files} files pending")

    database = sqlite3.connect(FOLDER / "events.db")
    print("\nDelivered events by key:")
    for key, count in database.execute("SELECT event_key, COUNT(*) FROM tracking_event GROUP BY 1 ORDER BY 2 DESC LIMIT 5"):
        print(f"  {count:4}  {key}")
    print("\nThe first three rows:")
    for row in database.execute("SELECT event_id, event_key, scope_kind, scope_id FROM tracking_event ORDER BY rowid LIMIT 3"):
        print("  " + "  ".join(map(str, row)))
    arrived = database.execute("SELECT COUNT(*) FROM tracking_event").fetchone()[0]
    database.close()
    if not (complete and arrived == accepted == len(events)):
        raise SystemExit(f"{len(events)} events, {accepted} accepted, {arrived} delivered: the numbers differ")
    print_next_steps()


def print_next_steps() -> None:
    """Print commands to try next."""
    folder = FOLDER.relative_to(HERE.parent)
    print(f"""
All events were delivered once. Try next:
  .venv/bin/pillarbox enqueue -d {folder}/outbox --ack examples/data/events.ndjson   # stored, not delivered yet
  .venv/bin/pillarbox status -d {folder}/outbox                                      # shows the pending events
  .venv/bin/pillarbox deliver -d {folder}/outbox --sink sqlite:///{folder}/events.db --once
                                                       # delivers them; the destination detects the ids as duplicates
  sqlite3 {folder}/events.db 'SELECT * FROM tracking_event LIMIT 5'
  make test""")


if __name__ == "__main__":
    main()
