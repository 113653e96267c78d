"""Backlogs that Pillarbox and a plain client deliver: their lines, and the time that a delivery takes."""

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

    from bench.definitions import Figures, RoundPaths

FIELDS = TrackingEvent.__struct_fields__


class Line(msgspec.Struct, gc=False):
    """A line as a plain client decodes it: without a checksum, with no checks but msgspec's checks of types."""

    event: without_post_init(TrackingEvent)  # type: ignore[valid-type]  # created at import


class Envelope(msgspec.Struct, gc=False):
    """A line whose event is passed on unchanged."""

    event: msgspec.Raw


def lines(backlog: Path) -> Iterator[list[bytes]]:
    """The lines of each batch file, in order."""
    for file in sorted(backlog.iterdir()):
        yield file.read_bytes().splitlines()


def measure_delivery(events: int, deliver: Callable[[], None]) -> Figures:
    """Events per second, and seconds of CPU time of this process per million events."""
    began, cpu = time.perf_counter(), time.process_time()
    deliver()
    took, used = time.perf_counter() - began, time.process_time() - cpu
    return {"per_s": events / took, "cpu_s": used / events * 1e6}


def deliver_with_outbox(folder: RoundPaths, backlog: str, events: int, sink: str) -> Figures:
    """Deliver a copy of the backlog with an outbox, from its creation until the last batch is settled."""
    directory = folder.own / "outbox"
    shutil.copytree(folder.shared / backlog, directory)

    def deliver() -> None:
        with Outbox(str(directory), sink=sink, max_bytes=2**40) as outbox:
            if not outbox.flush(120):
                raise SystemExit(f"the backlog was not delivered in two minutes: {outbox.stats()}")

    return measure_delivery(events, deliver)
