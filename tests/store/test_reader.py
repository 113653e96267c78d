"""Reading the contents of a batch file: well-formed records and damaged byte ranges."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from pillarbox.store import reader, record
from tests.conftest import DATA, existing_events

GOOD = st.integers(0, 10**6).map(lambda number: record.line(b'{"n":%d}' % number))
BLANK = st.sampled_from([b"\n", b"   \n", b"\r\n", b"\t\n"])
BAD = st.sampled_from([b"active\n", b'{"event":{"n":1},"crc":"00000000"}\n', b'{"event":\n', b"\x00\x00\n", b"\xff\xfe\n"])


def read(data: bytes) -> reader.FileContents:
    return reader.read_lines(data, lambda: None)


@given(st.lists(st.one_of(GOOD, BLANK, BAD)))
def test_good_lines_are_read_in_order_and_every_damaged_byte_is_in_a_range(lines: list[bytes]) -> None:
    """Blank lines are ignored."""
    data = b"".join(lines)
    contents = read(data)
    good = [line for line in lines if line.startswith(b'{"event":{"n":') and b"00000000" not in line]
    assert contents.payloads == [record.payload(line[:-1]) for line in good]
    bad = [line for line in lines if line.strip(b" \r\n\t") and line not in good]
    assert [data[damaged.offset : damaged.offset + damaged.length] for damaged in contents.damaged] == bad


@given(st.lists(GOOD, min_size=1), st.data())
def test_a_torn_tail_is_a_damaged_range_and_the_lines_before_it_are_good(lines: list[bytes], data: st.DataObject) -> None:
    """At any position. If only the line feed is missing, nothing is damaged."""
    whole = b"".join(lines)
    cut = data.draw(st.integers(len(whole) - len(lines[-1]) + 1, len(whole) - 1))
    contents = read(whole[:cut])
    if cut == len(whole) - 1:
        assert (len(contents.payloads), contents.damaged) == (len(lines), [])
    else:
        assert len(contents.payloads) == len(lines) - 1
        (damaged,) = contents.damaged
        assert (damaged.offset, damaged.offset + damaged.length) == (len(whole) - len(lines[-1]), cut)
        assert damaged.reason.startswith("torn: ")


def test_a_tail_of_nul_bytes_is_one_damaged_range() -> None:
    """ext4 leaves such a tail if the size was written and the data was not."""
    good = record.line(b"{}")
    contents = read(good + good[:7] + b"\0" * 4089)
    assert contents.payloads == [b"{}"]
    assert [(damaged.offset, damaged.length, damaged.reason) for damaged in contents.damaged] == [
        (len(good), 4096, "torn: nul_bytes")
    ]


def test_only_a_line_feed_ends_a_line() -> None:
    """U+2028, U+0085 and form feeds are part of a line. Files of the older system contain U+2028."""
    payload = '{"a":"x\u2028y\u0085z\x7f"}'.encode()
    assert read(record.line(payload)).payloads == [payload]


def test_files_of_the_older_system_are_read_unchanged() -> None:
    """All 127 events are read in order."""
    folder = DATA / "existing-outbox"
    files = [*sorted(folder.glob("sealed-*")), folder / "active.ndjson"]
    all_contents = [read(file.read_bytes()) for file in files]
    assert [json.loads(payload) for contents in all_contents for payload in contents.payloads] == existing_events()
    assert not [damaged for contents in all_contents for damaged in contents.damaged]


def test_the_reader_yields_the_gil_every_fifty_lines() -> None:
    """Otherwise callers of `enqueue` would wait too long."""
    calls: list[None] = []
    reader.read_lines(record.line(b"{}") * 500, lambda: calls.append(None))
    assert len(calls) == 500 // reader.YIELD_EVERY_LINES + 1


def test_many_adjacent_damaged_lines_are_one_range() -> None:
    """A file of a few kilobytes may unpack to millions of them; each damaged byte is still in a range."""
    good = record.line(b"1")
    data = b"x\n" * 5000 + b"\n \n" + b"{\n" * 3 + good + b"z\n" + good + b"\n\n" + good + b"torn"
    contents = reader.read_lines(data, lambda: None)
    assert contents.payloads == [b"1"] * 3
    assert len(contents.damaged) == reader.SINGLE_RANGES_MAX + 2
    covered = b"".join(data[damaged.offset : damaged.offset + damaged.length] for damaged in contents.damaged)
    assert covered == data.replace(good + b"\n\n", b"").replace(good, b"")


def test_an_empty_file_has_no_records_and_no_damage() -> None:
    """It has no blank line either."""
    assert read(b"") == reader.FileContents([], [])


def test_a_record_after_nul_bytes_is_read() -> None:
    """NUL bytes may replace whole lines, including their line feeds. Only the NUL bytes are damaged."""
    good, other = record.line(b"1"), record.line(b"2")
    contents = reader.read_lines(good + b"\0" * 20 + other, lambda: None)
    assert contents.payloads == [b"1", b"2"]
    assert [(damaged.offset, damaged.length) for damaged in contents.damaged] == [(len(good), 20)]
    assert reader.read_lines(b"\0" * 20 + other[:-3], lambda: None).payloads == []
