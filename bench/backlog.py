"""What both sides of a delivery read: sealed files, and what a client of its own makes of a line."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import msgspec

from pillarbox import Outbox, TrackingEvent
from pillarbox.event import without_post_init

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bench.plan import Figures, RoundPaths

FIELDS = TrackingEvent.__struct_fields__


class Line(msgspec.Struct, gc=False):
    """A line, decoded as a client would that trusts what it has stored: no checksum, no checks but msgspec's of the types."""

    event: without_post_init(TrackingEvent)  # type: ignore[valid-type]  # made when this is imported


class Envelope(msgspec.Struct, gc=False):
    """A line whose event goes as it stands."""

    event: msgspec.Raw


def lines(backlog: Path) -> Iterator[list[bytes]]:
    """The lines of each file, in order."""
    for file in sorted(backlog.iterdir()):
        yield file.read_bytes().splitlines()


def measured(events: int, deliver: Callable[[], None]) -> Figures:
    """Events a second, and seconds of this process's processor for a million of them."""
    began, cpu = time.perf_counter(), time.process_time()
    deliver()
    took, used = time.perf_counter() - began, time.process_time() - cpu
    return {"per_s": events / took, "cpu_s": used / events * 1e6}


def by_an_outbox(folder: RoundPaths, backlog: str, events: int, sink: str) -> Figures:
    """A copy of the backlog, from opening the outbox until all of it is settled."""
    directory = folder.own / "outbox"
    shutil.copytree(folder.shared / backlog, directory)

    def deliver() -> None:
        with Outbox(str(directory), sink=sink, max_bytes=2**40) as outbox:
            if not outbox.flush(120):
                raise SystemExit(f"the backlog was not delivered in two minutes: {outbox.stats()}")

    return measured(events, deliver)
