"""The event of the benchmark, and batch files with such events."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pillarbox import TrackingEvent
from pillarbox.store import layout, record

if TYPE_CHECKING:
    from pathlib import Path

BATCH = 500


def event(event_id: str = "019b76da-a800-7000-8000-000000000000") -> TrackingEvent:
    """A page view, 281 bytes as JSON."""
    return TrackingEvent(
        event_id=event_id,
        event_key="page_view",
        scope_kind="Site",
        scope_id="site-1",
        user_id="user-12345",
        metadata_json='{"path":"/a/b","ms":12}',
        occurred_at_micros=1_795_436_302_841_870,
    )


def sealed_files(directory: Path, files: int, batch: int = BATCH) -> int:
    """Write batch files of `batch` events each, all ids unique; returns the total number of bytes."""
    directory.mkdir(mode=0o700, parents=True)
    before, _, after = msgspec.json.encode(event("ID")).partition(b"ID")
    size = 0
    for number in range(files):
        name = layout.sealed_name(1_795_436_302_841_870 + number, "00000000-0000-4000-8000-000000000000")
        ids = (b"019b76da-a800-7000-8000-%012x" % at for at in range(number * batch, (number + 1) * batch))
        lines = b"".join([record.line(before + event_id + after) for event_id in ids])
        (directory / name).write_bytes(lines)
        size += len(lines)
    return size
