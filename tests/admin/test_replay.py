"""Edits of dead letters, and the validation of what is replayed."""

from __future__ import annotations

import msgspec
import pytest

from pillarbox import TrackingEvent
from pillarbox.admin.dead_letters import DeadLetterRecord
from pillarbox.admin.replay import InvalidReplayError, parse_assignments, parse_edited_file, to_editable_line, with_fields
from pillarbox.delivery.dead_letter import DeadLetter
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
def test_a_value_is_json_if_the_field_accepts_that_and_text_otherwise(text: str, json: bytes) -> None:
    """So text needs no JSON quotes inside the shell's."""
    ((_, value),) = parse_assignments([text], TrackingEvent).items()
    assert bytes(value) == json


@pytest.mark.parametrize("text", ["scope_id", "colour=red", "occurred_at_micros=soon", "=x"])
def test_an_assignment_that_cannot_be_made_is_rejected(text: str) -> None:
    """The error names the fields, or the type of the value."""
    with pytest.raises(UsageError, match=r"fields of TrackingEvent|Expected `int`"):
        parse_assignments([text], TrackingEvent)


class Camel(msgspec.Struct, rename="camel"):
    """An event type whose fields have other names in JSON."""

    event_id: str
    line_total: float = 0.0


def test_a_field_can_have_its_name_in_json_or_in_python() -> None:
    """The result has its name in JSON."""
    assert list(parse_assignments(["line_total=1", "lineTotal=2"], Camel)) == ["lineTotal"]


def test_fields_that_are_not_set_stay_byte_for_byte() -> None:
    """Unknown fields, unusual numbers and spaces too."""
    old = b'{"event_id": "e", "x":{"a" : 1.50}, "scope_id":5,"u":"\\u00e9"}'
    new = with_fields(VALIDATOR, old, parse_assignments(["scope_id=s", "event_key=k"], TrackingEvent))
    assert new == b'{"event_id":"e","x":{"a" : 1.50},"scope_id":"s","u":"\\u00e9","event_key":"k"}'


@pytest.mark.parametrize("old", [b"5", b"[]", b'"x"'])
def test_fields_cannot_be_set_if_the_event_is_not_an_object(old: bytes) -> None:
    """The error says so."""
    with pytest.raises(InvalidReplayError, match="not a JSON object"):
        with_fields(VALIDATOR, old, parse_assignments(["scope_id=s"], TrackingEvent))


@pytest.mark.parametrize("new", [b'{"event_id":"f"}', b"{}", b'{"event_id":5}'])
def test_an_event_must_keep_its_id(new: bytes) -> None:
    """With another id it could be delivered twice."""
    with pytest.raises(InvalidReplayError, match="must keep its event_id e"):
        VALIDATOR.check_same_id(b'{"event_id":"e"}', new)


@pytest.mark.parametrize("old", [b"5", b"{}", b'{"event_id":5}'])
def test_an_event_without_a_valid_id_may_get_one(old: bytes) -> None:
    """The outbox requires one."""
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
def test_an_event_that_the_outbox_would_drop_is_invalid(event: bytes, problem: str) -> None:
    """So is one without an id, which would get a new one at each attempt."""
    VALIDATOR.validate(event_json(1))
    with pytest.raises(InvalidReplayError, match=problem):
        VALIDATOR.validate(event)


def test_a_dead_letter_survives_the_editor() -> None:
    """A changed event is read as changed; blank lines are ignored."""
    letter = DeadLetter(msgspec.Raw(event_json(1, 5)), "wrong_type", "Expected", "sqlite:", 7, 1, 1, 1)
    line = to_editable_line(DeadLetterRecord("b", 0, letter, None, None))
    parsed = parse_edited_file(line + b"\n  \n" + line.replace(b"#7", b"#8").replace(b":5,", b':"5",'))
    assert parsed == ({"b#7": event_json(1, 5), "b#8": event_json(1, "5")}, [])


def test_a_broken_line_of_an_edited_file_is_reported() -> None:
    """By its number. Of two lines for one dead letter the first counts."""
    good = b'{"letter":"b#1","why":"","event":{}}\n'
    parsed = parse_edited_file(
        b"{\n" + good + b'{"letter":"b#2"}\n' + good.replace(b"{}", b"[]") + b'{"letter":"b#3","why":"\xff","event":1}'
    )
    assert parsed.events == {"b#1": b"{}"}
    assert [number for number, _ in parsed.problems] == [1, 3, 4, 5]
