"""Comparison of event types with a function's argument, and values that only turn out not to match when they are sent."""

from __future__ import annotations

import enum
import json
from typing import Any, Literal

import msgspec
import pytest

from pillarbox import ScopeKind, TrackingEvent
from pillarbox.sinks.base import Rejection
from pillarbox.sinks.spacetimedb.encoding import FieldMismatch, RowEncoder
from pillarbox.sinks.spacetimedb.schema import DatabaseSchema, SchemaError

Kind = dict[str, Any]
STRING: Kind = {"String": []}
UNIT: Kind = {"Product": {"elements": []}}


def named(name: str, kind: Kind) -> Kind:
    return {"name": {"some": name}, "algebraic_type": kind}


def option(kind: Kind) -> Kind:
    return {"Sum": {"variants": [named("some", kind), named("none", UNIT)]}}


def variants(*names: str, data: Kind = UNIT) -> Kind:
    return {"Sum": {"variants": [named(name, data) for name in names]}}


def encoder_for(event_type: type[msgspec.Struct], **columns: Kind) -> RowEncoder:
    """Make the encoder for a reducer that takes a list of structs with these columns."""
    text = {
        "typespace": {"types": [{"Product": {"elements": [named(name, kind) for name, kind in columns.items()]}}]},
        "tables": [],
        "reducers": [
            {"name": "f", "params": {"elements": [named("events", {"Array": {"Ref": 0}})]}, "lifecycle": {"none": []}}
        ],
    }
    schema = DatabaseSchema(json.dumps(text).encode())
    return RowEncoder(schema, schema.functions["f"], event_type)


def mismatches_of(annotation: Any, column: Kind) -> list[FieldMismatch]:
    """Return the mismatches of an event type with one field of this type."""
    kind = msgspec.defstruct("Event", [("event_id", str), ("value", annotation)])
    return encoder_for(kind, event_id=STRING, value=column).mismatches


class Number(enum.IntEnum):
    """Numbers."""

    ONE = 1


class TextEnum(enum.Enum):
    """Texts."""

    RED = "red"
    DARK_BLUE = "dark-blue"


GOOD: list[tuple[Any, Kind]] = [
    (str, STRING),
    (str | None, option(STRING)),
    (str, option(STRING)),
    (int, {"I64": []}),
    (int, {"U8": []}),
    (Number, {"I32": []}),
    (Literal[1, 2], {"I64": []}),
    (Literal["a"], STRING),
    (TextEnum, STRING),
    (TextEnum, variants("Red", "DarkBlue")),
    (TextEnum, variants("red", "darkBlue", "green")),
    (Literal["a", "b"], variants("A", "B")),
    (str, variants("A")),
    (float, {"F64": []}),
    (bool, {"Bool": []}),
    (list[str], {"Array": STRING}),
    (dict[str, int], STRING),
    (int, {"Product": {"elements": [named("__timestamp_micros_since_unix_epoch__", {"I64": []})]}}),
]
BAD: list[tuple[Any, Kind, str]] = [
    (str, {"I64": []}, "is str, but the module has i64"),
    (str | None, STRING, "may be None, but the module has String: change it to Option<String>"),
    (Number, STRING, "is Number, but the module has String"),
    (Literal[1, 2], STRING, "but the module has String"),
    (int, STRING, "is int, but the module has String"),
    (TextEnum, variants("Red"), "the module's enum has no variant DARK_BLUE; it has Red"),
    (Literal["a", "b"], variants("A"), "the module's enum has no variant b; it has A"),
    (str, variants("A", data=STRING), "the module's variant A carries data"),
    (float, {"I64": []}, "is float, but the module has i64"),
    (list[int], {"Array": STRING}, "is int, but the module has String"),
    (bool, {"U8": []}, "is bool, but the module has u8"),
]


@pytest.mark.parametrize(("annotation", "column"), GOOD)
def test_matching_types_have_no_mismatch(annotation: Any, column: Kind) -> None:
    """Each pair of a field and a column."""
    assert mismatches_of(annotation, column) == []


@pytest.mark.parametrize(("annotation", "column", "message"), BAD)
def test_a_mismatch_names_both_types(annotation: Any, column: Kind, message: str) -> None:
    """Field by field."""
    (mismatch,) = mismatches_of(annotation, column)
    assert mismatch.field.startswith("value")
    assert message in mismatch.problem


def test_missing_fields_and_columns_are_mismatches_except_options() -> None:
    """In the event type and in the module."""
    kind = msgspec.defstruct("Event", [("event_id", str), ("mine", str)])
    mismatches = encoder_for(kind, event_id=STRING, theirs=STRING, maybe=option(STRING)).mismatches
    assert [mismatch.field for mismatch in mismatches] == ["theirs", "mine"]


class Narrow(TrackingEvent, frozen=True):
    """An application's own TrackingEvent."""


@pytest.mark.parametrize("kind", [TrackingEvent, Narrow])
def test_a_module_needs_every_scope_kind(kind: type[msgspec.Struct]) -> None:
    """Although the field is text: a missing variant is a misconfiguration."""
    columns: dict[str, Kind] = {
        name: option(STRING) if name in ("user_id", "owner_user_id", "profile_id", "module_key") else STRING
        for name in TrackingEvent.__struct_fields__
    }
    columns |= {"occurred_at_micros": {"I64": []}, "scope_kind": variants(*list(ScopeKind)[:3])}
    assert [mismatch.field for mismatch in encoder_for(kind, **columns).mismatches] == ["scope_kind"]


def test_columns_in_another_order_and_case_are_filled_by_name() -> None:
    """Names are compared without case and underscores."""
    kind = msgspec.defstruct("Event", [("event_id", str), ("user_name", str), ("n", int)])
    encoder = encoder_for(kind, n={"I64": []}, eventId=STRING, maybe=option(STRING), UserName=STRING)
    rejected: dict[int, Rejection] = {}
    body, indexes = encoder.encode_arguments([kind("a", "b", 1)], [4], rejected)
    assert (json.loads(body), indexes, rejected) == ([[[1, "a", None, "b"]]], [4], {})


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [({"I64": []}, -(2**63), 2**63), ({"U8": []}, 255, 256), ({"U64": []}, 2**64 - 1, -1), ({"I8": []}, -128, -129)],
)
def test_an_integer_out_of_range_rejects_only_its_event(column: Kind, good: int, bad: int) -> None:
    """The reason names the column's type."""
    kind = msgspec.defstruct("Event", [("event_id", str), ("n", int)])
    rejected: dict[int, Rejection] = {}
    _, indexes = encoder_for(kind, event_id=STRING, n=column).encode_arguments(
        [kind("a", good), kind("b", bad)], range(2), rejected
    )
    assert indexes == [0]
    assert rejected[1].code == "out_of_range"


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"typespace":{"types":[]}}', b"<html>"])
def test_an_invalid_schema_raises_schema_error(text: bytes) -> None:
    """Not another exception."""
    with pytest.raises(SchemaError):
        DatabaseSchema(text)
