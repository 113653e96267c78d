"""The hot path's and the reader's pieces in Python: what `_speed.c` and `_lines.c` have compiled. `store/speed.py` chooses."""

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


def records(
    data: bytes, offset: int, most: int, value: Callable[[bytes], bytes | None], check: Callable[[bytes], object]
) -> tuple[list[bytes], int]:
    """The payloads of up to `most` lines from an offset on, and where they end.

    At the latest where the first line begins that has no line feed, of which `value` is None, whose payload is not UTF-8, or
    for which `check` raises.
    """
    payloads: list[bytes] = []
    if not 0 <= offset <= len(data):
        raise ValueError(f"offset {offset} is not within the {len(data)} bytes")
    while len(payloads) < most and (end := data.find(b"\n", offset)) >= 0:
        found = value(data[offset:end])
        if found is None:
            break
        try:
            if not found.isascii():
                found.decode()
            check(found)
        except Exception:  # noqa: BLE001 - what is wrong, if anything is, the reader finds again
            break
        payloads.append(found)
        offset = end + 1
    return payloads, offset


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
