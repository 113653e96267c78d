"""Salvaging events from damaged bytes."""

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


def salvaged(data: bytes) -> list[tuple[bytes, bool]]:
    return [(event.payload, event.verified) for event in salvage(data, VALIDATOR).events]


def test_a_torn_line_yields_its_event_if_that_is_complete() -> None:
    """Wherever it is torn. With its complete checksum, the event is verified."""
    whole = len(b'{"event":') + len(EVENT)
    for length in range(1, len(LINE)):
        checksum_is_complete = length >= len(LINE) - len(b'"}\n')
        expected = [(EVENT, checksum_is_complete)] if length >= whole else []
        assert salvaged(LINE[:length]) == expected, LINE[:length]


def test_a_cut_off_checksum_that_matches_is_distinguished_from_one_that_does_not() -> None:
    """One that does not match means that the event was altered."""
    right = salvage(LINE[:-6], VALIDATOR).events[0].how
    wrong = salvage(LINE[:-8] + b"g", VALIDATOR).events[0].how
    none = salvage(LINE[:-15], VALIDATOR).events[0].how
    assert "are left match" in right
    assert "does not match" in wrong
    assert none == "it has no checksum"


def test_a_flipped_bit_yields_an_unverified_event_or_none() -> None:
    """None if the JSON or the type is damaged."""
    for position in range(len(LINE) - 1):
        for bit in range(8):
            damaged = bytearray(LINE)
            damaged[position] ^= 1 << bit
            if reader.read_lines(bytes(damaged), lambda: None).payloads:
                continue  # a line feed within the line, or a space in place of another
            events = salvaged(bytes(damaged))
            assert len(events) <= 1
            for event, verified in events:
                VALIDATOR.validate(event)
                assert not verified or event == EVENT


def test_a_line_without_a_line_feed_and_the_next_one_are_both_salvaged() -> None:
    """With and without NUL bytes between them."""
    other = record.line(event_json(2))
    for between in (b"", b"\0" * 7):
        assert salvaged(LINE[:-1] + between + other) == [(EVENT, True), (event_json(2), True)]
        assert salvaged(LINE[:40] + between + other) == [(event_json(2), True)]
        assert salvaged(LINE[:-6] + between + other) == [(EVENT, False), (event_json(2), True)]


def test_a_record_within_an_event_is_not_an_event() -> None:
    """Inside a line, only a checksum proves that bytes are a record."""
    inner = b'{"event":' + event_json(2) + b"}"
    outer = b'{"event":{"scope_id":' + inner + b',"event_key":"'
    assert salvaged(outer) == []


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
def test_an_event_in_another_envelope_or_in_none_is_not_verified(data: bytes) -> None:
    """For example, one written by hand."""
    assert salvaged(data) == [(EVENT, False)]


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
def test_the_reason_is_given_if_there_is_no_event(data: bytes, problem: str) -> None:
    """One reason for each part of the bytes."""
    result = salvage(data, VALIDATOR)
    assert not result.events
    assert problem in result.problems[0]


@given(
    st.lists(st.sampled_from([LINE, EVENT, b"\0\0", b"{", b'{"event":', b"\xff", b'"}', b',"crc":"', json.dumps("x").encode()]))
)
def test_salvage_accepts_any_bytes(parts: list[bytes]) -> None:
    """Whatever it returns is valid."""
    for event, _ in salvaged(b"".join(parts)):
        VALIDATOR.validate(event)
