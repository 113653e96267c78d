"""The hot path's pieces in Python: what `pillarbox.store._speed` has compiled. Either is chosen in `store/speed.py`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

    from pillarbox.outcome import Dropped

LINE: Final = b'{"event":%b,"crc":"%08x"}\n'  # (payload, crc32(payload)); the writer's closure formats it itself
OVERHEAD: Final = len(LINE % (b"", 0))
_UNENDED: Final = LINE[:-1]
_HEAD_BYTES: Final = len(b'{"event":')
_TAIL_BYTES: Final = len(b',"crc":"00000000"}')


class Counts:
    """What the hot path keeps of a file: at `attend_at` events it has the writer attend to it."""

    __slots__ = ("attend_at", "bytes", "events", "fd")

    attend_at: int
    bytes: int
    events: int
    fd: int


class Appending:
    """What the hot path keeps of a writer."""

    lock: threading.RLock
    _file: Any  # a `Counts`
    _limit: int
    _broken: bool


def line(payload: bytes) -> bytes:
    """The record of a payload."""
    return LINE % (payload, crc32(payload))


def value(line: bytes) -> bytes | None:
    """The payload of a record without its line feed; None where it has not the shape that `line` gives."""
    found = line[_HEAD_BYTES:-_TAIL_BYTES]
    return found if _UNENDED % (found, crc32(found)) == line else None


def pack(
    events: Iterable[Any],
    encode: Callable[[Any], bytes],
    event_type: type,
    bytes_max: int,
    line_of: Callable[[Any], bytes | Dropped],
) -> tuple[bytes, list[Dropped | None]]:
    """The records of all events in one, and for each None, or what `line_of` refuses it with.

    `line_of` is asked about what is not of `event_type`, does not encode, or has more than `bytes_max` bytes.
    """
    lines: list[bytes] = []
    refused: list[Dropped | None] = []
    for event in events:
        found: bytes | Dropped = b""
        if type(event) is event_type:
            with contextlib.suppress(Exception):
                payload = encode(event)
                if len(payload) <= bytes_max:
                    found = LINE % (payload, crc32(payload))
        found = found or line_of(event)
        if isinstance(found, bytes):
            lines.append(found)
            refused.append(None)
        else:
            refused.append(found)
    return b"".join(lines), refused
