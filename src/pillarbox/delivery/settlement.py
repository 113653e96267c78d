"""The order in which things become durable before a sealed file goes.

Quarantine and dead letters first, each written aside, synced and renamed over; then the unlink. Killed anywhere in between, the
batch is sent again under the same ids and the same two files are written over with the same content: nothing is kept twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pillarbox.store import layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pillarbox.store.directory import Directory
    from pillarbox.store.reader import Span


class DeadLetter(msgspec.Struct, frozen=True):
    """A well-formed record that the destination refuses for good; one line of a `dead-` file."""

    event: msgspec.Raw
    code: str
    reason: str
    sink: str
    index: int  # among the good records of the batch, from 0
    attempts: int
    first_at_micros: int
    last_at_micros: int


def keep_damaged(directory: Directory, batch: str, data: bytes, spans: Sequence[Span]) -> None:
    """Set damaged bytes aside, unchanged, with where they stood and why they are there."""
    index = b"[\n" + b",\n".join(msgspec.json.encode(span) for span in spans) + b"\n]\n"
    directory.put(layout.spans_name(batch), index)
    directory.put(layout.corrupt_name(batch), b"".join(data[span.offset : span.offset + span.length] for span in spans))


def keep_dead(directory: Directory, batch: str, dead: Mapping[int, DeadLetter]) -> None:
    """Set refused records aside, in the order in which they stood."""
    directory.put(layout.dead_name(batch), b"".join(msgspec.json.encode(dead[index]) + b"\n" for index in sorted(dead)))
