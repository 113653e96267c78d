"""The content of a batch file -> good records and damaged byte ranges. Pure, except that it yields the GIL.

Only a line feed ends a line. Blank lines are skipped, and a record behind NUL bytes is a record. A last line without a line
feed is checked like any other: no proper prefix of a record is a record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.store import compression, record
from pillarbox.store.record import DamagedRecordError

if TYPE_CHECKING:
    from collections.abc import Callable

YIELD_EVERY_LINES: Final = 50  # lines without a yield; with more, callers of `enqueue` would wait for longer than a write takes

# Beyond this number of damaged ranges in a file, adjacent damaged lines are one range. A file of 64 MiB may have 32 million
# lines, and each range is an object of a hundred bytes.
SINGLE_RANGES_MAX: Final = 1000
BAD_COMPRESSION: Final = "bad_compression: "  # the beginning of a reason, before what is wrong


class DamagedRange(msgspec.Struct, frozen=True):
    """Damaged bytes: where they are in the file, and what is wrong with them."""

    offset: int  # offset in the file, in bytes
    length: int  # length in bytes
    reason: str  # what is wrong with them


class FileContents(msgspec.Struct, frozen=True):
    """The good events and the damaged ranges of a file."""

    payloads: list[bytes]  # the JSON of each good event, in order
    damaged: list[DamagedRange]


def _record_after_nul(line: bytes) -> tuple[int, bytes] | None:
    """The offset in a line at which a whole record begins after NUL bytes, and its payload.

    After a power loss or a failed sync there may be NUL bytes in place of whole lines, including the line feed before a good
    one.
    """
    begin = line.rfind(b"\0") + 1
    if not begin:
        return None
    try:
        return begin, record.payload(line[begin:])
    except DamagedRecordError:
        return None


def read_file(name: str, data: bytes, yield_gil: Callable[[], None]) -> tuple[FileContents, bytes]:
    """The contents of a file with the bytes `data`, compressed or not, and the bytes that its damaged ranges refer to.

    In a damaged compressed file, the lines before the damage are read as usual, and the last damaged range is the whole file,
    because the content of the rest is unknown. Raises `FileUnusableError` if the file is compressed and zstd is missing.
    """
    return read_decompressed(*compression.decompress(name, data), data, yield_gil)


def read_decompressed(plain: bytes, problem: str, data: bytes, yield_gil: Callable[[], None]) -> tuple[FileContents, bytes]:
    """The same for a file with the bytes `data` of which `plain` could be decompressed, before a `problem` if there is one."""
    contents = read_lines(plain, yield_gil)
    if not problem:
        return contents, plain
    contents.damaged.append(compression_damage(plain, problem, data))
    return contents, plain + data


def compression_damage(plain: bytes, problem: str, data: bytes) -> DamagedRange:
    """The damaged range of a compressed file: the whole file, placed after the bytes that could be decompressed."""
    return DamagedRange(len(plain), len(data), f"{BAD_COMPRESSION}{problem}")


def read_lines(data: bytes, yield_gil: Callable[[], None], *, is_rest_of_line: bool = False) -> FileContents:
    """Separate the good lines of a file from the damaged ones.

    With `is_rest_of_line`, the first line is the end of a line that is no record.
    """
    payloads: list[bytes] = []
    spans: list[DamagedRange] = []
    offset = number = 0  # of the line
    if is_rest_of_line:
        offset = _read_line(data, 0, payloads, spans, is_rest_of_line=True)
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
            if len(spans) >= SINGLE_RANGES_MAX:
                offset = _skip_lines_without_brace(data, offset, spans)
    return FileContents(payloads, spans)


def _read_line(
    data: bytes, offset: int, payloads: list[bytes], spans: list[DamagedRange], *, is_rest_of_line: bool = False
) -> int:
    """Add one line to the good or the damaged ones. Returns the offset of the next line."""
    end = data.find(b"\n", offset)
    line = data[offset : end if end >= 0 else len(data)]
    if line and (is_rest_of_line or not line.isspace()):
        try:
            if is_rest_of_line:
                raise DamagedRecordError("too_long")  # noqa: TRY301 - handled like every other damage
            payloads.append(record.payload(line))
        except DamagedRecordError as damage:
            length = min(len(line) + 1, len(data) - offset)
            after_nul = _record_after_nul(line)
            if after_nul is not None:
                payloads.append(after_nul[1])
                length = after_nul[0]
            torn = offset + len(line) == len(data)
            _add_range(data, spans, DamagedRange(offset, length, f"torn: {damage.reason}" if torn else damage.reason))
    return offset + len(line) + 1


def _skip_lines_without_brace(data: bytes, offset: int, spans: list[DamagedRange]) -> int:
    """Count lines that cannot be records as damaged. Returns the offset of the next line that may be a record."""
    brace = data.find(b"{", offset)
    end = len(data) if brace < 0 else data.rfind(b"\n", offset, brace) + 1
    if end <= offset:
        return offset
    if not data[offset:end].isspace():
        _add_range(data, spans, DamagedRange(offset, end - offset, spans[-1].reason))
    return end


def _add_range(data: bytes, spans: list[DamagedRange], damaged: DamagedRange) -> None:
    """Add a damaged range. If there are many, extend the last one instead if only white space is between them."""
    if len(spans) >= SINGLE_RANGES_MAX:
        last = spans[-1]
        end = last.offset + last.length
        if end == damaged.offset or data[end : damaged.offset].isspace():
            spans[-1] = DamagedRange(last.offset, damaged.offset + damaged.length - last.offset, last.reason)
            return
    spans.append(damaged)
