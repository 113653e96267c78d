"""Filters for events. Those of the command line are tested in `tests/cli/test_tail.py`."""

from __future__ import annotations

import msgspec
import pytest

from pillarbox import TrackingEvent
from pillarbox.admin.filters import EventFilter, EventHeader, EventHeaderDecoder, parse_conditions
from pillarbox.errors import UsageError


class Purchase(msgspec.Struct, rename="camel"):
    """Another event type."""

    event_id: int
    user_id: str = ""


def test_fields_have_the_names_of_the_event_type() -> None:
    """An id may be a number or text."""
    header = EventHeaderDecoder(Purchase).decode(b'{"eventId":17,"userId":"u","event_key":"k"}')
    assert (header.event_id, header.user_id, header.event_key) == ("17", "u", "k")


@pytest.mark.parametrize("payload", [b"[1]", b"5", b'{"event_id":true,"occurred_at_micros":"x"}'])
def test_json_that_is_not_an_event_has_an_empty_header(payload: bytes) -> None:
    """A dead letter may be any JSON."""
    assert EventHeaderDecoder(TrackingEvent).decode(payload) == EventHeader(None, None, None, None, None, None)


def test_an_event_without_a_time_has_the_time_of_its_seal() -> None:
    """In a segment, it counts as new."""
    header = EventHeaderDecoder(TrackingEvent).decode(b"{}")
    assert EventFilter(since_micros=5).matches(b"{}", header, 5)
    assert not EventFilter(since_micros=6).matches(b"{}", header, 5)
    assert EventFilter(since_micros=5).matches(b"{}", header, None)
    assert not EventFilter(until_micros=5).matches(b"{}", header, None)


@pytest.mark.parametrize("text", ["", "=x", "member"])
def test_a_malformed_condition_is_rejected(text: str) -> None:
    """The error shows the form."""
    with pytest.raises(UsageError, match="FIELD=VALUE"):
        parse_conditions([text])


def test_values_of_one_field_are_alternatives_and_fields_are_not() -> None:
    """As with all filters. Text that is not JSON has no fields."""
    payload = b'{"a":{"b":[1,true,null]},"c":"text"}'
    header = EventHeaderDecoder(TrackingEvent).decode(payload)
    for texts, matches in [
        (["a.b.0=1"], True),
        (["a.b.0=2", "a.b.0=1"], True),
        (["a.b.1=true", "a.b.2=null", "c=text"], True),
        (["a.b.0=1", "c=other"], False),
        (["c.d=1"], False),
        (["a.b.7=1"], False),
        (["a.b=[1,true,null]"], True),
    ]:
        assert EventFilter(conditions=parse_conditions(texts)).matches(payload, header, None) is matches, texts
