"""Generates the Rust table and reducer for an event type: the output of `pillarbox spacetimedb scaffold`. Pure."""

from __future__ import annotations

import enum
import re
from datetime import datetime
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, Union, get_args, get_origin

import msgspec

from pillarbox.errors import UsageError
from pillarbox.event import snake_case

if TYPE_CHECKING:
    from collections.abc import Sequence

_SCALARS: Final[dict[Any, str]] = {
    str: "String",
    int: "i64",
    float: "f64",
    bool: "bool",
    bytes: "Vec<u8>",
    datetime: "Timestamp",
}

_KEYWORDS: Final = frozenset(
    """abstract as async await become box break const continue do dyn else enum extern false final fn for gen if impl in let
    loop macro match mod move mut override priv pub ref return static struct trait true try type typeof unsafe unsized use
    virtual where while yield""".split()  # noqa: SIM905 - a list of fifty strings would be longer than the code
)


class _RustTypes:
    """Translates annotations to Rust types and collects the definitions these need, each once."""

    def __init__(self) -> None:
        self.items: dict[str, str] = {}

    def rust_type(self, annotation: Any) -> str:
        """Return the Rust type for an annotation: String, holding JSON, where there is no better one."""
        kinds = set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}
        if NoneType in kinds:
            rest = kinds - {NoneType}
            return f"Option<{self.rust_type(rest.pop()) if len(rest) == 1 else 'String'}>"
        plain = get_origin(annotation) or annotation
        if plain is Literal:
            return "i64" if all(type(value) is int for value in get_args(annotation)) else "String"
        if plain in (list, tuple, set, frozenset):
            inner = [argument for argument in get_args(annotation) if argument is not Ellipsis]
            return f"Vec<{self.rust_type(inner[0]) if inner else 'String'}>"
        if isinstance(plain, type) and issubclass(plain, enum.Enum):
            return self._add_enum(plain)
        if isinstance(plain, type) and issubclass(plain, msgspec.Struct):
            self.items[plain.__name__] = self._struct_source(plain, "#[derive(SpacetimeType, Clone, Debug)]")
            return plain.__name__
        return _SCALARS.get(plain, "String")

    def _add_enum(self, kind: type[enum.Enum]) -> str:
        if any(not isinstance(member.value, str) for member in kind):
            return "i64"
        variants = "".join(f"    {_camel_case(member.value)},\n" for member in kind)
        head = "#[derive(SpacetimeType, Clone, Copy, Debug, PartialEq, Eq)]"
        self.items[kind.__name__] = f"{head}\npub enum {kind.__name__} {{\n{variants}}}\n"
        return kind.__name__

    def _struct_source(self, kind: type[msgspec.Struct], head: str, key: str = "") -> str:
        lines = []
        for field in msgspec.structs.fields(kind):
            if field.encode_name == key:
                lines.append("    #[primary_key]\n")
            name = snake_case(field.encode_name)
            # A trailing underscore avoids Rust's keywords; the sink ignores it when it compares names.
            lines.append(f"    pub {name}{'_' if name in _KEYWORDS else ''}: {self.rust_type(field.type)},\n")
        return f"{head}\npub struct {kind.__name__} {{\n{''.join(lines)}}}\n"

    def table_source(self, kind: type[msgspec.Struct], attribute: str) -> str:
        """Return the struct of the table's rows."""
        return self._struct_source(kind, f"{attribute}\n#[derive(Clone, Debug)]", key="event_id")


def scaffold(event_type: type[msgspec.Struct], major: int) -> str:
    """Return a module for servers `major`.x, with a table and a reducer for events of this type.

    Raises:
        UsageError: the event type has no field `event_id`.
    """
    if all(field.encode_name != "event_id" for field in msgspec.structs.fields(event_type)):
        raise UsageError(f"{event_type.__name__} has no field event_id: add one, so that duplicates can be recognized")
    table = snake_case(event_type.__name__)
    name = "name" if major == 1 else "accessor"
    rust = _RustTypes()
    row = rust.table_source(event_type, f"#[spacetimedb::table({name} = {table})]")
    used = ["reducer", "ReducerContext", "Table"]
    used += ["SpacetimeType"] if rust.items else []
    used += ["Timestamp"] if "Timestamp" in row + "".join(rust.items.values()) else []
    return "\n".join(
        [f"use spacetimedb::{{{', '.join(sorted(used))}}};\n", *rust.items.values(), row, _reducer_source(event_type, table)]
    )


def _reducer_source(event_type: type[msgspec.Struct], table: str) -> str:
    text = [f.encode_name for f in msgspec.structs.fields(event_type) if f.encode_name == "event_id" and f.type is str]
    check = (
        """    for (index, event) in events.iter().enumerate() {
        if event.event_id.is_empty() {
            return Err(format!("event[{index}].event_id: must not be empty"));
        }
    }
"""
        if text
        else ""
    )
    return f"""/// Stores a batch. Skips events that the table already has, so that sending a batch twice changes nothing.
/// An error rejects the whole batch; for `event[INDEX].FIELD: REASON`, Pillarbox dead-letters that event and sends the others.
#[reducer]
pub fn record_{table}s(ctx: &ReducerContext, events: Vec<{event_type.__name__}>) -> Result<(), String> {{
{check}    for event in events {{
        if ctx.db.{table}().event_id().find(&event.event_id).is_none() {{
            ctx.db.{table}().insert(event);
        }}
    }}
    Ok(())
}}
"""


def _camel_case(name: str) -> str:
    words: Sequence[str] = re.split(r"[^A-Za-z0-9]+", name)
    text = "".join(word[:1].upper() + word[1:] for word in words)
    return text if text[:1].isalpha() else f"V{text}"
