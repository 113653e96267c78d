"""Encoding and decoding a record, which is one line."""

from __future__ import annotations

import contextlib
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillarbox.store import record
from pillarbox.store.record import DamagedRecordError
from tests.conftest import DATA

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
)


def damage_reason(line: bytes) -> str:
    with pytest.raises(DamagedRecordError) as caught:
        record.payload(line)
    return caught.value.reason


@given(JSON)
def test_a_record_is_read_as_it_was_written(value: object) -> None:
    """For any JSON value, byte for byte."""
    payload = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    line = record.line(payload)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert record.payload(line[:-1]) == payload
    assert json.loads(line) == {"event": value, "crc": f"{zlib.crc32(payload):08x}"}


@given(JSON, st.data())
def test_a_record_with_a_changed_byte_is_never_good(value: object, data: st.DataObject) -> None:
    """The checksum detects changes of the value, and the parser those of the rest."""
    payload = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    line = bytearray(record.line(payload)[:-1])
    line[data.draw(st.integers(0, len(line) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(DamagedRecordError):
        assert record.payload(bytes(line)) == payload  # the changed byte has no meaning in JSON


@given(JSON, st.data())
def test_a_proper_prefix_of_a_line_is_never_a_record(value: object, data: st.DataObject) -> None:
    """So a torn line is recognized without its line feed."""
    line = record.line(json.dumps(value).encode())[:-1]
    damage_reason(line[: data.draw(st.integers(0, len(line) - 1))] or b"{")


@pytest.mark.parametrize(
    ("line", "payload"),
    [
        (b'{"event":{"a":1}}', b'{"a":1}'),
        (b'{"event":5}', b"5"),
        (b' { "event" : { "a" : 1 } } ', b'{ "a" : 1 }'),
        (b'{"event":{"a":1}}\r', b'{"a":1}'),
        ('{"event":{"a":"line\u2028separator"}}'.encode(), '{"a":"line\u2028separator"}'.encode()),
    ],
)
def test_a_line_without_a_checksum_is_read(line: bytes, payload: bytes) -> None:
    """An older version wrote such lines."""
    assert record.payload(line) == payload


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"active", "bad_json"),
        (b"5", "not_a_record"),
        (b"{}", "not_a_record"),
        (b'{"a":1}', "not_a_record"),
        (b'{"event":1,"other":2}', "not_a_record"),
        (b'{"event":1,"crc":5}', "not_a_record"),
        (b'{"event":{"a":1},"crc":"00000000"}', "bad_checksum"),
        (b'{"event":{"a":1},"crc":"561D1BA1"}', "bad_checksum"),
        (b'{"event":{"a":1}', "bad_json"),
        (b'{"event":{"a":1}}{"event":2}', "bad_json"),
        (b'{"event":{"a":"\xff"}}', "bad_utf8"),
        (b'{"event":' + b"[" * 100_000, "bad_json"),
        (b"\x00" * 40, "nul_bytes"),
        (b'{"event":{"a":1\x00\x00\x00', "nul_bytes"),
    ],
)
def test_anything_else_is_damaged(line: bytes, reason: str) -> None:
    """The error contains the reason."""
    assert damage_reason(line) == reason


def test_bad_json_with_a_correct_checksum_is_damaged() -> None:
    """Only JSON is delivered, whatever a program wrote into the file."""
    for value in (b'{"a":1', b'{"a":1},"x":{"b":2}', b"", b"NaN"):
        assert damage_reason(record.line(value)[:-1]) in ("bad_json", "not_a_record")
    assert damage_reason(record.line(b'{"a":"\xff"}')[:-1]) == "bad_utf8"


def test_the_golden_lines_are_written_and_read() -> None:
    """`docs/reference/file-format.md` shows this file; a change of the format fails here."""
    golden = (DATA / "golden" / "records.ndjson").read_bytes()
    payloads = [record.payload(line) for line in golden.split(b"\n")[:-1]]
    assert b"".join(record.line(payload) for payload in payloads) == golden
