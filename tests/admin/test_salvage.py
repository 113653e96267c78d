"""What can be had from damaged bytes."""

from __future__ import annotations

import json
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillarbox.admin.quarantine import salvage
from pillarbox.store import reader, record
from tests.admin.prepared_outboxes import VALIDATOR, event_json

EVENT = event_json(1)
LINE = record.line(EVENT)


def had(data: bytes) -> list[tuple[bytes, bool]]:
    return [(one.payload, one.verified) for one in salvage(data, VALIDATOR).events]


def test_a_torn_line_gives_its_event_as_soon_as_that_is_whole() -> None:
    """Cut anywhere; with its checksum it is sure."""
    whole = len(b'{"event":') + len(EVENT)
    for length in range(1, len(LINE)):
        checksum_is_there = length >= len(LINE) - len(b'"}\n')
        expected = [(EVENT, checksum_is_there)] if length >= whole else []
        assert had(LINE[:length]) == expected, LINE[:length]


def test_a_cut_checksum_that_does_not_fit_so_far_is_told_from_one_that_does() -> None:
    """The one means little, the other that the event was changed."""
    right = salvage(LINE[:-6], VALIDATOR).events[0].how
    wrong = salvage(LINE[:-8] + b"g", VALIDATOR).events[0].how
    none = salvage(LINE[:-15], VALIDATOR).events[0].how
    assert "are left match" in right
    assert "does not match" in wrong
    assert none == "it has no checksum"


def test_a_flipped_bit_gives_the_event_where_it_is_one_still() -> None:
    """Never as sure; where the JSON or the type suffers, nothing."""
    for place in range(len(LINE) - 1):
        for bit in range(8):
            damaged = bytearray(LINE)
            damaged[place] ^= 1 << bit
            if reader.read_lines(bytes(damaged), lambda: None).payloads:
                continue  # the line feed within, or a space for another
            found = had(bytes(damaged))
            assert len(found) <= 1
            for event, sure in found:
                VALIDATOR.validate(event)
                assert not sure or event == EVENT


def test_a_line_whose_line_feed_is_lost_is_found_with_the_next() -> None:
    """The torn part before, the whole one behind it; NUL bytes or not between."""
    other = record.line(event_json(2))
    for between in (b"", b"\0" * 7):
        assert had(LINE[:-1] + between + other) == [(EVENT, True), (event_json(2), True)]
        assert had(LINE[:40] + between + other) == [(event_json(2), True)]
        assert had(LINE[:-6] + between + other) == [(EVENT, False), (event_json(2), True)]


def test_what_an_event_holds_is_no_event_by_itself() -> None:
    """In the middle of a line only a checksum makes one."""
    inner = b'{"event":' + event_json(2) + b"}"
    outer = b'{"event":{"scope_id":' + inner + b',"event_key":"'
    assert had(outer) == []


@pytest.mark.parametrize(
    "data",
    [
        EVENT + b"\n",
        b" " + EVENT,
        b"\xef\xbb\xbf" + EVENT,
        b'{"crc":"00000000","event":%b}\n' % EVENT,
        b'{"event":%b,"colour":"red"}\n' % EVENT,
        b'{ "event" : %b , "crc" : "%08x" , "x" : 1 }' % (EVENT, crc32(EVENT) ^ 1),
        b"\0\0" + EVENT + b"\0",
    ],
)
def test_an_event_in_another_envelope_or_in_none_is_had_but_not_sure(data: bytes) -> None:
    """As somebody may have written it by hand."""
    assert had(data) == [(EVENT, False)]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\0" * 9, "only NUL"),
        (b"", "empty"),
        (b"no json\n", "not a JSON object"),
        (LINE[:50], "not complete JSON"),
        (record.line(event_json(1, 5)), "not a valid TrackingEvent"),
        (record.line(EVENT.replace(b'"event_id":"w-000001",', b"")), "event_id: is missing"),
        (b'{"event":' + b'{"a":' * 100_000, "not readable as JSON"),
    ],
)
def test_where_there_is_no_event_it_says_why(data: bytes, problem: str) -> None:
    """In a few words."""
    found = salvage(data, VALIDATOR)
    assert not found.events
    assert problem in found.problems[0]


@given(
    st.lists(st.sampled_from([LINE, EVENT, b"\0\0", b"{", b'{"event":', b"\xff", b'"}', b',"crc":"', json.dumps("x").encode()]))
)
def test_no_bytes_are_too_strange(parts: list[bytes]) -> None:
    """Whatever comes out may go in."""
    for event, _ in had(b"".join(parts)):
        VALIDATOR.validate(event)
