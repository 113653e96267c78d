"""A sealed file's bytes -> good records and damaged spans. Pure, but that it gives way.

Lines end at a line feed only; blank ones are skipped, and a record behind NUL bytes is one. A last line without its line feed
is judged like any other: one that is a whole record is one, for no proper beginning of a record is a record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.store import compression, record
from pillarbox.store.record import DamagedRecordError

if TYPE_CHECKING:
    from collections.abc import Callable

YIELD_EVERY_LINES: Final = (
    50  # lines; more would hold the interpreter from the callers of `enqueue` for longer than a write takes
)


class DamagedRange(msgspec.Struct, frozen=True):
    """Damaged bytes: where in the file, and what is wrong with them."""

    offset: int
    length: int
    reason: str


class FileContents(msgspec.Struct, frozen=True):
    """What a file holds."""

    payloads: list[bytes]  # the JSON of each good event, in order
    damaged: list[DamagedRange]


def _record_after_nul(line: bytes) -> tuple[int, bytes] | None:
    """Where in a line a whole record begins behind NUL bytes, and its payload.

    The loss of power, or a sync that fails, may leave NUL bytes where whole lines stood, the line feed of the last among them.
    """
    begin = line.rfind(b"\0") + 1
    if not begin:
        return None
    try:
        return begin, record.payload(line[begin:])
    except DamagedRecordError:
        return None


def read_file(name: str, data: bytes, yield_gil: Callable[[], None]) -> tuple[FileContents, bytes]:
    """What a file holds whose bytes are `data`, whatever its ending, and the bytes that the spans are of.

    Of a compressed file that is damaged, what comes before the damage is read like any other, and a last span is the whole
    file as it was: nobody can tell what is in the rest. Raises `FileUnusableError` where it is compressed and zstd is missing.
    """
    plain, problem = compression.decompress(name, data)
    contents = read_lines(plain, yield_gil)
    if not problem:
        return contents, plain
    contents.damaged.append(DamagedRange(len(plain), len(data), f"bad_compression: {problem}"))
    return contents, plain + data


def read_lines(data: bytes, yield_gil: Callable[[], None]) -> FileContents:
    """Tell the good lines of a file from the damaged ones."""
    payloads: list[bytes] = []
    spans: list[DamagedRange] = []
    offset = number = 0  # of the line
    while offset <= len(data):
        ahead = YIELD_EVERY_LINES - number % YIELD_EVERY_LINES
        if ahead == YIELD_EVERY_LINES:
            yield_gil()
        good, offset = record.payloads(data, offset, ahead)
        payloads += good
        number += len(good)
        if len(good) < ahead:
            offset = _read_line(data, offset, payloads, spans)
            number += 1
    return FileContents(payloads, spans)


def _read_line(data: bytes, offset: int, payloads: list[bytes], spans: list[DamagedRange]) -> int:
    """Tell whether one line is good or damaged; where the next one begins."""
    end = data.find(b"\n", offset)
    line = data[offset : end if end >= 0 else len(data)]
    if line and not line.isspace():
        try:
            payloads.append(record.payload(line))
        except DamagedRecordError as damage:
            length = min(len(line) + 1, len(data) - offset)
            behind = _record_after_nul(line)
            if behind is not None:
                payloads.append(behind[1])
                length = behind[0]
            torn = offset + len(line) == len(data)
            spans.append(DamagedRange(offset, length, f"torn: {damage.reason}" if torn else damage.reason))
    return offset + len(line) + 1
