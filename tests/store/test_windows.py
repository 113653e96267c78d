"""A file that is read in windows has the same records and damaged bytes as if it were read at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pillarbox.store import compression, record, windows
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.reader import read_lines
from pillarbox.store.windows import Window, read_windows

WINDOW_BYTES = 100
GOOD = [record.line(b'{"n":%d}' % number) for number in range(20)]
LONG = record.line(b'"' + b"x" * 60 + b'"')

pytestmark = pytest.mark.skipif(not compression.is_available(), reason="zstd is not installed")


def read(folder: Path, data: bytes, name: str = "sealed-a.ndjson") -> list[Window]:
    path, filesystem = folder / name, OsFilesystem()
    path.write_bytes(data)
    fd = filesystem.open_existing(str(path))
    try:
        return list(read_windows(filesystem, name, fd, window_bytes=WINDOW_BYTES))
    finally:
        filesystem.close(fd)


def payloads(parts: list[Window]) -> list[bytes]:
    return [payload for part in parts for payload in part.contents.payloads]


def damaged_bytes(parts: list[Window]) -> bytes:
    return b"".join(part.damaged_bytes() for part in parts)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[0],
        b"".join(GOOD),
        b"".join([*GOOD, LONG, b"torn"]),
        b"".join([*GOOD[:5], b"damaged\n", *GOOD[5:], b"\n\n", LONG, b"damaged too\r\n", LONG]),
        b"\n".join([b"damaged"] * 50),
        b"".join([*GOOD[:3], b"\0" * 70, *GOOD[3:], b"\0" * 50]),
    ],
)
def test_windows_have_the_records_and_the_damaged_bytes_of_the_file(tmp_path: Path, data: bytes) -> None:
    parts = read(tmp_path, data)
    whole = read_lines(data, windows.no_yield)
    assert payloads(parts) == whole.payloads
    assert damaged_bytes(parts) == b"".join(data[each.offset : each.offset + each.length] for each in whole.damaged)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert b"".join(part.data for part in parts) == data
    assert all(len(part.data) <= WINDOW_BYTES for part in parts)
    for part in parts:
        for each in part.contents.damaged:
            assert data[each.offset : each.offset + each.length] in part.damaged_bytes()


def test_a_compressed_file_has_the_windows_of_the_plain_one(tmp_path: Path) -> None:
    data, name = b"".join([*GOOD, b"damaged\n"]), "sealed-a.ndjson.zst"
    compressed = compression.compress(name, data)
    assert read(tmp_path, compressed, name) == read(tmp_path, data)
    cut = read(tmp_path, compressed[:-9], name)
    assert cut[-1].data == compressed[:-9], "the whole compressed file is quarantined"
    assert cut[-1].contents.damaged[0].reason.startswith("bad_compression")
    assert all(payload in payloads(read(tmp_path, data)) for payload in payloads(cut))


@pytest.mark.parametrize("between", [b"\0" * 1000, b"\0" * 150, b"x" * 60 + b"\0" * 300])
def test_a_record_behind_more_nul_bytes_than_a_window_is_delivered(tmp_path: Path, between: bytes) -> None:
    data = GOOD[0] + between + GOOD[1] + GOOD[2]
    parts = read(tmp_path, data)
    assert payloads(parts) == [b'{"n":0}', b'{"n":1}', b'{"n":2}']
    assert damaged_bytes(parts) == between


def test_no_part_of_a_line_that_is_longer_than_a_window_is_a_record(tmp_path: Path) -> None:
    """A window may begin with a part of it that looks like a record."""
    for filler in range(WINDOW_BYTES - 30, WINDOW_BYTES + 30):
        line = b"x" * filler + GOOD[1]
        parts = read(tmp_path, GOOD[0] + line + GOOD[2])
        assert (filler, payloads(parts)) == (filler, [b'{"n":0}', b'{"n":2}'])
        assert damaged_bytes(parts) == line


def test_a_compressed_file_that_is_larger_than_any_of_ours_is_damaged_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "PLAIN_BYTES_MAX", 250)
    data = b"z" * 300
    parts = read(tmp_path, data, "sealed-a.ndjson.zst")
    assert damaged_bytes(parts) == data
    assert payloads(parts) == []
    assert [part.is_last for part in parts] == [False, False, True]


def test_a_record_that_is_longer_than_a_window_is_a_window_of_its_own(tmp_path: Path) -> None:
    """An older writer may have stored it. A line that is longer than any record is damaged."""
    longest = windows.LINE_WINDOWS * WINDOW_BYTES
    empty = len(record.line(b'""'))
    for length, is_good in ((WINDOW_BYTES + 1, True), (longest, True), (longest + 1, False), (3 * longest, False)):
        line = record.line(b'"' + b"x" * (length - empty) + b'"')
        assert len(line) == length
        parts = read(tmp_path, GOOD[0] + line + GOOD[1])
        assert len(payloads(parts)) == 2 + is_good
        assert damaged_bytes(parts).rstrip(b"\n") == (b"" if is_good else line.rstrip(b"\n"))
        assert max(len(part.data) for part in parts) <= (length if is_good else WINDOW_BYTES)
