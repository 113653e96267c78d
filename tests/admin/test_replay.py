"""Events put right."""

from __future__ import annotations

import msgspec
import pytest

from pillarbox import TrackingEvent
from pillarbox.admin.dead_letters import DeadLetterRecord
from pillarbox.admin.replay import InvalidReplayError, parse_assignments, parse_edited_file, to_editable_line, with_fields
from pillarbox.delivery.settlement import DeadLetter
from pillarbox.errors import UsageError
from pillarbox.event import EVENT_BYTES_MAX
from tests.admin.prepared_outboxes import VALIDATOR, event_json


@pytest.mark.parametrize(
    ("text", "json"),
    [
        ("scope_id=7", b'"7"'),
        ('scope_id="7"', b'"7"'),
        ("scope_id=a=b", b'"a=b"'),
        ("user_id=null", b"null"),
        ("metadata_json={}", b'"{}"'),
        ("occurred_at_micros=17", b"17"),
    ],
)
def test_a_value_is_json_where_the_member_takes_that_and_text_otherwise(text: str, json: bytes) -> None:
    """So that nobody must quote a text twice."""
    ((_, value),) = parse_assignments([text], TrackingEvent).items()
    assert bytes(value) == json


@pytest.mark.parametrize("text", ["scope_id", "colour=red", "occurred_at_micros=soon", "=x"])
def test_what_cannot_be_set_is_refused(text: str) -> None:
    """With the members that there are, or what the value must be."""
    with pytest.raises(UsageError, match=r"fields of TrackingEvent|Expected `int`"):
        parse_assignments([text], TrackingEvent)


class Camel(msgspec.Struct, rename="camel"):
    """A type whose members have other names in JSON."""

    event_id: str
    line_total: float = 0.0


def test_a_member_may_be_named_as_in_json_or_as_in_python() -> None:
    """It is set under its name in JSON."""
    assert list(parse_assignments(["line_total=1", "lineTotal=2"], Camel)) == ["lineTotal"]


def test_members_that_are_not_set_stay_byte_for_byte() -> None:
    """Unknown ones, odd numbers and spaces too."""
    old = b'{"event_id": "e", "x":{"a" : 1.50}, "scope_id":5,"u":"\\u00e9"}'
    new = with_fields(VALIDATOR, old, parse_assignments(["scope_id=s", "event_key=k"], TrackingEvent))
    assert new == b'{"event_id":"e","x":{"a" : 1.50},"scope_id":"s","u":"\\u00e9","event_key":"k"}'


@pytest.mark.parametrize("old", [b"5", b"[]", b'"x"'])
def test_members_of_what_is_no_object_cannot_be_set(old: bytes) -> None:
    """It is named, and stays."""
    with pytest.raises(InvalidReplayError, match="not a JSON object"):
        with_fields(VALIDATOR, old, parse_assignments(["scope_id=s"], TrackingEvent))


@pytest.mark.parametrize("new", [b'{"event_id":"f"}', b"{}", b'{"event_id":5}'])
def test_an_event_keeps_its_id(new: bytes) -> None:
    """Under another one it could be delivered twice."""
    with pytest.raises(InvalidReplayError, match="must keep its event_id e"):
        VALIDATOR.check_same_id(b'{"event_id":"e"}', new)


@pytest.mark.parametrize("old", [b"5", b"{}", b'{"event_id":5}'])
def test_an_event_without_an_id_may_get_one(old: bytes) -> None:
    """It cannot go in without."""
    VALIDATOR.check_same_id(old, b'{"event_id":"f"}')


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        (b"5", "not a JSON object"),
        (event_json(1, 5), "not a valid TrackingEvent"),
        (event_json(1).replace(b"w-000001", b"\xff"), "not a valid TrackingEvent"),
        (event_json(1).replace(b'"event_id":"w-000001",', b""), "event_id: is missing"),
        (event_json(1, key="k" * EVENT_BYTES_MAX), "bytes as JSON"),
    ],
)
def test_what_the_front_door_would_refuse_does_not_get_there(event: bytes, problem: str) -> None:
    """Nor what would get another id at each look."""
    VALIDATOR.validate(event_json(1))
    with pytest.raises(InvalidReplayError, match=problem):
        VALIDATOR.validate(event)


def test_what_goes_to_the_editor_comes_back() -> None:
    """Unless it was changed; blank lines are nothing."""
    letter = DeadLetter(msgspec.Raw(event_json(1, 5)), "wrong_type", "Expected", "sqlite:", 7, 1, 1, 1)
    line = to_editable_line(DeadLetterRecord("b", 0, letter, None, None))
    back = parse_edited_file(line + b"\n  \n" + line.replace(b"#7", b"#8").replace(b":5,", b':"5",'))
    assert back == ({"b#7": event_json(1, 5), "b#8": event_json(1, "5")}, [])


def test_what_is_no_line_of_the_editor_any_more_is_named() -> None:
    """By its number; of two for one dead letter the first counts."""
    good = b'{"letter":"b#1","why":"","event":{}}\n'
    back = parse_edited_file(
        b"{\n" + good + b'{"letter":"b#2"}\n' + good.replace(b"{}", b"[]") + b'{"letter":"b#3","why":"\xff","event":1}'
    )
    assert back.events == {"b#1": b"{}"}
    assert [number for number, _ in back.problems] == [1, 3, 4, 5]
