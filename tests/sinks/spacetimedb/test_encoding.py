"""What fits a function's argument and what does not, found before the first event; and what only a value can show."""

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


def fit(event_type: type[msgspec.Struct], **columns: Kind) -> RowEncoder:
    """An event type against a reducer that takes a list of structs with these columns."""
    text = {
        "typespace": {"types": [{"Product": {"elements": [named(name, kind) for name, kind in columns.items()]}}]},
        "tables": [],
        "reducers": [
            {"name": "f", "params": {"elements": [named("events", {"Array": {"Ref": 0}})]}, "lifecycle": {"none": []}}
        ],
    }
    schema = DatabaseSchema(json.dumps(text).encode())
    return RowEncoder(schema, schema.functions["f"], event_type)


def one(annotation: Any, column: Kind) -> list[FieldMismatch]:
    """The misfits of an event type with one field of this type."""
    kind = msgspec.defstruct("Event", [("event_id", str), ("value", annotation)])
    return fit(kind, event_id=STRING, value=column).mismatches


class Number(enum.IntEnum):
    """Numbers."""

    ONE = 1


class Colour(enum.Enum):
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
    (Colour, STRING),
    (Colour, variants("Red", "DarkBlue")),
    (Colour, variants("red", "darkBlue", "green")),
    (Literal["a", "b"], variants("A", "B")),
    (str, variants("A")),
    (float, {"F64": []}),
    (bool, {"Bool": []}),
    (list[str], {"Array": STRING}),
    (dict[str, int], STRING),
    (int, {"Product": {"elements": [named("__timestamp_micros_since_unix_epoch__", {"I64": []})]}}),
]
BAD: list[tuple[Any, Kind, str]] = [
    (str, {"I64": []}, "is str, the module's is i64"),
    (str | None, STRING, "may be None, the module's is String: make it Option<String>"),
    (Number, STRING, "is Number, the module's is String"),
    (Literal[1, 2], STRING, "the module's is String"),
    (int, STRING, "is int, the module's is String"),
    (Colour, variants("Red"), "the module's enum lacks DARK_BLUE; it has Red"),
    (Literal["a", "b"], variants("A"), "the module's enum lacks b; it has A"),
    (str, variants("A", data=STRING), "the module's variant A carries data"),
    (float, {"I64": []}, "is float, the module's is i64"),
    (list[int], {"Array": STRING}, "is int, the module's is String"),
    (bool, {"U8": []}, "is bool, the module's is u8"),
]


@pytest.mark.parametrize(("annotation", "column"), GOOD)
def test_what_fits(annotation: Any, column: Kind) -> None:
    """No misfit."""
    assert one(annotation, column) == []


@pytest.mark.parametrize(("annotation", "column", "said"), BAD)
def test_what_does_not_fit_is_named_with_both_sides(annotation: Any, column: Kind, said: str) -> None:
    """Field by field."""
    (misfit,) = one(annotation, column)
    assert misfit.field.startswith("value")
    assert said in misfit.problem


def test_missing_and_superfluous_fields_are_misfits_but_an_option_may_be_missing() -> None:
    """In the event type, and in the module."""
    kind = msgspec.defstruct("Event", [("event_id", str), ("mine", str)])
    misfits = fit(kind, event_id=STRING, theirs=STRING, maybe=option(STRING)).mismatches
    assert [misfit.field for misfit in misfits] == ["theirs", "mine"]


class Narrow(TrackingEvent, frozen=True):
    """An application's own TrackingEvent."""


@pytest.mark.parametrize("kind", [TrackingEvent, Narrow])
def test_a_module_must_know_every_scope_kind(kind: type[msgspec.Struct]) -> None:
    """Although the field is a text: that is the set-up's fault, not an event's."""
    columns: dict[str, Kind] = {
        name: option(STRING) if name in ("user_id", "owner_user_id", "profile_id", "module_key") else STRING
        for name in TrackingEvent.__struct_fields__
    }
    columns |= {"occurred_at_micros": {"I64": []}, "scope_kind": variants(*list(ScopeKind)[:3])}
    assert [misfit.field for misfit in fit(kind, **columns).mismatches] == ["scope_kind"]


def test_columns_in_another_order_and_case_are_filled_by_name() -> None:
    """Names are compared without case and underscores."""
    kind = msgspec.defstruct("Event", [("event_id", str), ("user_name", str), ("n", int)])
    fitting = fit(kind, n={"I64": []}, eventId=STRING, maybe=option(STRING), UserName=STRING)
    refused: dict[int, Rejection] = {}
    body, indexes = fitting.encode_arguments([kind("a", "b", 1)], [4], refused)
    assert (json.loads(body), indexes, refused) == ([[[1, "a", None, "b"]]], [4], {})


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [({"I64": []}, -(2**63), 2**63), ({"U8": []}, 255, 256), ({"U64": []}, 2**64 - 1, -1), ({"I8": []}, -128, -129)],
)
def test_an_integer_out_of_range_refuses_its_event_only(column: Kind, good: int, bad: int) -> None:
    """With the column's range in the reason."""
    kind = msgspec.defstruct("Event", [("event_id", str), ("n", int)])
    refused: dict[int, Rejection] = {}
    _, indexes = fit(kind, event_id=STRING, n=column).encode_arguments([kind("a", good), kind("b", bad)], range(2), refused)
    assert indexes == [0]
    assert refused[1].code == "out_of_range"


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"typespace":{"types":[]}}', b"<html>"])
def test_what_is_no_schema_is_said_to_be_none(text: bytes) -> None:
    """Not a traceback."""
    with pytest.raises(SchemaError):
        DatabaseSchema(text)
