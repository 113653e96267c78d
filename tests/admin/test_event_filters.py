"""Which events are meant; the filters that `tail` is shown with are in `tests/cli/test_tail.py`."""

from __future__ import annotations

import msgspec
import pytest

from pillarbox import TrackingEvent
from pillarbox.admin.filters import EventFilter, EventHeader, EventHeaderDecoder, parse_conditions
from pillarbox.errors import UsageError


class Purchase(msgspec.Struct, rename="camel"):
    """An event of another type."""

    event_id: int
    user_id: str = ""


def test_members_have_the_names_of_the_event_type() -> None:
    """A number is an id as well as text."""
    face = EventHeaderDecoder(Purchase).decode(b'{"eventId":17,"userId":"u","event_key":"k"}')
    assert (face.event_id, face.user_id, face.event_key) == ("17", "u", "k")


@pytest.mark.parametrize("payload", [b"[1]", b"5", b'{"event_id":true,"occurred_at_micros":"x"}'])
def test_what_is_no_event_has_no_face(payload: bytes) -> None:
    """A dead letter may be any JSON."""
    assert EventHeaderDecoder(TrackingEvent).decode(payload) == EventHeader(None, None, None, None, None, None)


def test_an_event_without_a_time_has_that_of_its_file() -> None:
    """One that is not sealed yet is as new as can be."""
    face = EventHeaderDecoder(TrackingEvent).decode(b"{}")
    assert EventFilter(since_micros=5).matches(b"{}", face, 5)
    assert not EventFilter(since_micros=6).matches(b"{}", face, 5)
    assert EventFilter(since_micros=5).matches(b"{}", face, None)
    assert not EventFilter(until_micros=5).matches(b"{}", face, None)


@pytest.mark.parametrize("text", ["", "=x", "member"])
def test_a_condition_that_is_none_is_refused(text: str) -> None:
    """With how to write it."""
    with pytest.raises(UsageError, match="FIELD=VALUE"):
        parse_conditions([text])


def test_values_of_one_member_are_alternatives_and_members_are_not() -> None:
    """As with all filters; a text that is no JSON has nothing inside."""
    payload = b'{"a":{"b":[1,true,null]},"c":"text"}'
    face = EventHeaderDecoder(TrackingEvent).decode(payload)
    for texts, fits in [
        (["a.b.0=1"], True),
        (["a.b.0=2", "a.b.0=1"], True),
        (["a.b.1=true", "a.b.2=null", "c=text"], True),
        (["a.b.0=1", "c=other"], False),
        (["c.d=1"], False),
        (["a.b.7=1"], False),
        (["a.b=[1,true,null]"], True),
    ]:
        assert EventFilter(conditions=parse_conditions(texts)).matches(payload, face, None) is fits, texts
