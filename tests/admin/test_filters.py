"""Filters for records, batch ids and times."""

from __future__ import annotations

import msgspec
import pytest

from pillarbox.admin.dead_letters import DeadLetterRecord
from pillarbox.admin.filters import RecordFilter, parse_batch_id
from pillarbox.admin.text import format_time, parse_time
from pillarbox.delivery.dead_letter import DeadLetter
from pillarbox.errors import UsageError

NOW = 1_700_000_000_000_000
LETTER = DeadLetter(msgspec.Raw(b"{}"), "wrong_type", "Expected `str` for 7", "sqlite:///e.db", 4, 1, 100, 200)
RECORD = DeadLetterRecord("sealed-0000000000000001-a", 0, LETTER, "e-1", "click")


@pytest.mark.parametrize(
    ("text", "micros"),
    [
        ("90s", NOW - 90_000_000),
        ("1.5h", NOW - 5_400_000_000),
        ("3d", NOW - 259_200_000_000),
        ("1w", NOW - 604_800_000_000),
        ("1970-01-01T00:00:01", 1_000_000),
        ("1970-01-01T01:00:01+01:00", 1_000_000),
        ("1970-01-02", 86_400_000_000),
        ("1970-01-01T00:00:00.000001Z", 1),
    ],
)
def test_a_time_is_an_age_or_iso_8601(text: str, micros: int) -> None:
    """ISO 8601 without an offset is UTC."""
    assert parse_time(text, NOW) == micros


@pytest.mark.parametrize("text", ["", "yesterday", "3", "-3d", "2026-13-01"])
def test_text_that_is_not_a_time_is_rejected_with_examples(text: str) -> None:
    """The error shows both forms."""
    with pytest.raises(UsageError, match="2h"):
        parse_time(text, NOW)


def test_times_are_formatted_in_utc() -> None:
    """A time after the year 9999 is a number."""
    assert format_time(1_700_000_000_999_999) == "2023-11-14T22:13:20Z"
    assert format_time(None) == "-"
    assert format_time(2**63) == f"{2**63} us"


@pytest.mark.parametrize(
    ("matching", "other"),
    [
        ({"batches": ("sealed-0000000000000001",)}, {"batches": ("sealed-2",)}),
        ({"records": ("sealed-0000000000000001-a#4",)}, {"records": ("sealed-0000000000000001-a#5",)}),
        ({"records": ("sealed-0000000000000001-a#4",)}, {"records": ("sealed-0000000000000001-b#4",)}),
        ({"reasons": ("nothing", "`str`")}, {"reasons": ("`int`",)}),
        ({"codes": ("wrong_type",)}, {"codes": ("wrong",)}),
        ({"sinks": ("sqlite",)}, {"sinks": ("https",)}),
        ({"event_keys": ("click",)}, {"event_keys": ("cl",)}),
        ({"event_ids": ("e-1", "e-2")}, {"event_ids": ("e",)}),
        ({"since_micros": 200}, {"since_micros": 201}),
        ({"until_micros": 201}, {"until_micros": 200}),
    ],
)
def test_every_field_and_any_value_of_a_field_has_to_match(matching: dict[str, object], other: dict[str, object]) -> None:
    """Each field by itself, and together with others."""
    others = {"codes": ("wrong_type",), "event_keys": ("click",)}
    assert RecordFilter(**matching).matches(RECORD)  # type: ignore[arg-type]
    assert not RecordFilter(**other).matches(RECORD)  # type: ignore[arg-type]
    assert RecordFilter(**others | matching).matches(RECORD)  # type: ignore[arg-type]
    assert not RecordFilter(**others | other).matches(RECORD)  # type: ignore[arg-type]


def test_an_unknown_time_matches_only_a_filter_without_a_time() -> None:
    """Whichever end is open."""
    assert RecordFilter().matches_time(None)
    assert not RecordFilter(since_micros=1).matches_time(None)
    assert not RecordFilter(until_micros=1).matches_time(None)


@pytest.mark.parametrize(
    "typed", ["sealed-1-a", "box/dead-sealed-1-a.ndjson", "corrupt-sealed-1-a.spans.json", "sealed-1-a.ndjson"]
)
def test_a_batch_id_is_read_from_the_name_of_any_of_its_files(typed: str) -> None:
    """Or from its path."""
    assert parse_batch_id(typed) == "sealed-1-a"
