"""Encodes events of a type as the argument of a function, in SATS-JSON's compact array form. Pure.

A struct is an array of its fields in the order of the schema, an option is null or `[0, value]`, and a variant without data is
`{"position": []}`, which servers 1.x and 2.x accept. `RowEncoder` compares event type and function once, field by field, and
lists all mismatches. A value that does not match (text that is not a variant, a number out of range) rejects its event only.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Union, get_args, get_origin

import msgspec

from pillarbox.errors import PicklableError
from pillarbox.event import ScopeKind, TrackingEvent
from pillarbox.sinks.base import Rejection
from pillarbox.sinks.spacetimedb.schema import (
    DEPTH_MAX,
    AlgebraicType,
    DatabaseSchema,
    ModuleFunction,
    NamedType,
    SchemaError,
    canonical_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ClosedSet = tuple[tuple[str, Any], ...]  # all allowed values, as (name, value)
_INTEGERS: Final = {f"{sign}{bits}": (sign, bits) for sign in "IU" for bits in (8, 16, 32, 64, 128, 256)}
_PATH_CHARS_MAX: Final = 100  # characters of a field's path in a message
_CHUNK_EVENTS: Final = 50  # events converted at a time; other threads wait for the GIL meanwhile
_MICROS_FIELDS: Final = {"__timestamp_micros_since_unix_epoch__", "__time_duration_micros__"}
# Fields of type str with a closed set of values. A module whose enum lacks one is misconfigured; the event is not at fault.
_CLOSED_SETS: Final[dict[tuple[type, str], type[enum.Enum]]] = {(TrackingEvent, "scope_kind"): ScopeKind}


class UnencodableValueError(PicklableError):
    """A value does not match the function's type; it rejects one event."""

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.reason)
        self.rejection = rejection


class FieldMismatch(NamedTuple):
    """A field of the event type that does not match the module, and what to change."""

    field: str
    problem: str


class RowEncoder:
    """Encodes events of one type for one function. They can be sent only if `mismatches` is empty."""

    def __init__(self, schema: DatabaseSchema, function: ModuleFunction, event_type: type[msgspec.Struct]) -> None:
        self.function = function
        self.mismatches: list[FieldMismatch] = []
        self.returns = schema.return_kind(function)
        self._schema = schema
        self._depth = 0
        element = schema.array_element(function.parameters[0].type) if len(function.parameters) == 1 else None
        columns = schema.product_fields(element) if element is not None else None
        if columns is None or element is None:
            takes = ", ".join(schema.rust_type(parameter.type) for parameter in function.parameters) or "nothing"
            self.mismatches.append(FieldMismatch(function.name, f"takes {takes}, but must take one list of structs: Vec<...>"))
            return
        self._encode_rows = self._struct_encoder(event_type, element, "")

    def _struct_encoder(self, kind: type[msgspec.Struct], of: AlgebraicType, path: str) -> _StructEncoder:
        """Return the encoder of a struct type, and add its mismatches."""
        fields = {canonical_name(field.encode_name): field for field in msgspec.structs.fields(kind)}
        places = {name: at for at, name in enumerate(kind.__struct_fields__)}
        order: list[int | None] = []
        options: list[int] = []
        converts: list[tuple[int, Callable[[Any], Any]]] = []
        for column in self._schema.product_fields(of) or []:
            field = fields.pop(canonical_name(column.name), None)
            name = f"{path}{column.name}"
            if field is None:
                # An optional column that the event type does not have is sent as none.
                if self._schema.option_inner(column.type) is None:
                    problem = f"the module requires {self._schema.rust_type(column.type)}; the event type has no such field"
                    self.mismatches.append(FieldMismatch(name, problem))
                order.append(None)
                continue
            order.append(places[field.name])
            convert = self._value_encoder(field.type, column.type, name, _closed_set(kind, field.name))
            if convert is _encode_some:
                options.append(len(order) - 1)
            elif convert is not None:
                converts.append((len(order) - 1, convert))
        for left in fields.values():
            self.mismatches.append(
                FieldMismatch(f"{path}{left.encode_name}", "the module has no such field, so its values would be lost")
            )
        return _StructEncoder(order, options, converts)

    def _value_encoder(
        self, annotation: Any, of: AlgebraicType, path: str, closed: _ClosedSet = ()
    ) -> Callable[[Any], Any] | None:
        """Return the function that converts a value to a module type; None where no conversion is needed.

        Raises:
            SchemaError: the types are nested too deeply, as where one contains itself.
        """
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise SchemaError(f"the types of {path[:_PATH_CHARS_MAX]} are nested more than {DEPTH_MAX} levels deep")
        try:
            return self._checked_value_encoder(annotation, of, path, closed)
        finally:
            self._depth -= 1

    def _checked_value_encoder(
        self, annotation: Any, of: AlgebraicType, path: str, closed: _ClosedSet
    ) -> Callable[[Any], Any] | None:
        kinds = set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}
        nullable = NoneType in kinds
        kinds.discard(NoneType)
        kind = kinds.pop() if len(kinds) == 1 else Any
        inner = self._schema.option_inner(of)
        if inner is not None:
            return _option_encoder(self._value_encoder(kind, inner, path, closed))
        if nullable:
            words = self._schema.rust_type(of)
            self.mismatches.append(
                FieldMismatch(path, f"may be None, but the module has {words}: change it to Option<{words}>")
            )
        return self._plain_value_encoder(kind, self._schema.resolve(of), path, closed)

    def _plain_value_encoder(self, kind: Any, of: AlgebraicType, path: str, closed: _ClosedSet) -> Callable[[Any], Any] | None:
        plain, closed = _scalar_kind(kind, closed)
        name = next(iter(of))
        variants = self._schema.sum_variants(of)
        if variants is not None and plain is str:
            return self._variant_encoder(variants, closed, path)
        if name == "String" and plain is not int:
            return None if plain is str else _encode_json_text
        if name == "Bool" and plain is bool:
            return None
        if name in ("F32", "F64") and plain in (float, int):
            return None
        if name in _INTEGERS and plain is int:
            return _IntegerEncoder(*_INTEGERS[name])
        fields = self._schema.product_fields(of) or []
        if fields and fields[0].name in _MICROS_FIELDS and plain in (int, datetime):
            return _encode_micros
        if "Product" in of and isinstance(plain, type) and issubclass(plain, msgspec.Struct):
            rows = self._struct_encoder(plain, of, f"{path}.")
            return lambda value: rows((value,))[0]
        element = self._schema.array_element(of)
        if element is not None and plain in (list, tuple, set, frozenset, bytes):
            arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
            return _list_encoder(
                self._value_encoder(int if plain is bytes else arguments[0] if arguments else Any, element, f"{path}[]")
            )
        shown = getattr(kind, "__name__", str(kind))
        self.mismatches.append(FieldMismatch(path, f"is {shown}, but the module has {self._schema.rust_type(of)}"))
        return None

    def _variant_encoder(self, variants: list[NamedType], closed: _ClosedSet, path: str) -> Callable[[Any], Any]:
        """Return the function that converts text to a variant; each value of a closed set needs a variant."""
        names = ", ".join(variant.name for variant in variants)
        for variant in variants:
            if self._schema.product_fields(variant.type) != []:
                self.mismatches.append(
                    FieldMismatch(path, f"the module's variant {variant.name} carries data, which text cannot provide")
                )
        positions = {canonical_name(variant.name): msgspec.Raw(b'{"%d":[]}' % at) for at, variant in enumerate(variants)}
        known: dict[Any, msgspec.Raw] = {}
        for name, value in closed:
            position = positions.get(canonical_name(str(value)), positions.get(canonical_name(name)))
            if position is None:
                self.mismatches.append(FieldMismatch(path, f"the module's enum has no variant {name}; it has {names}"))
            else:
                known[value] = position

        return _VariantTable(known, positions, f"{path}: ", f" is not one of {names}").__getitem__

    def encode_arguments(
        self, events: Sequence[Any], indexes: Sequence[int], rejected: dict[int, Rejection]
    ) -> tuple[bytes, Sequence[int]]:
        """Return the function's arguments and the batch index of each event in them; add the others to `rejected`."""
        parts: list[bytes] = []
        unencodable: set[int] = set()
        for start in range(0, len(events), _CHUNK_EVENTS):
            part = events[start : start + _CHUNK_EVENTS]
            try:
                rows = self._encode_rows(part)
            except UnencodableValueError:
                rows = self._encode_singly(part, indexes[start : start + _CHUNK_EVENTS], rejected, unencodable)
            if rows:
                parts.append(msgspec.json.encode(rows)[1:-1])
        return b"[[%b]]" % b",".join(parts), [
            index for index in indexes if index not in unencodable
        ] if unencodable else indexes

    def _encode_singly(
        self, events: Sequence[Any], indexes: Sequence[int], rejected: dict[int, Rejection], unencodable: set[int]
    ) -> list[tuple[Any, ...]]:
        """Return the rows of the events that can be encoded."""
        rows: list[tuple[Any, ...]] = []
        for event, index in zip(events, indexes, strict=True):
            try:
                rows += self._encode_rows((event,))
            except UnencodableValueError as error:
                rejected[index] = error.rejection
                unencodable.add(index)
        return rows


class _StructEncoder:
    """Converts structs to arrays, column by column, because most columns need no conversion."""

    def __init__(
        self, order: Sequence[int | None], options: Sequence[int], converts: Sequence[tuple[int, Callable[[Any], Any]]]
    ) -> None:
        self._order = order  # the position of each column's field; None for a column without a field
        self._options = options  # columns whose values are only wrapped as options
        self._converts = converts

    def __call__(self, events: Sequence[Any]) -> list[tuple[Any, ...]]:
        fields = list(zip(*map(msgspec.structs.astuple, events), strict=True))
        nothing = (None,) * len(events)
        columns: list[Sequence[Any]] = [nothing if at is None else fields[at] for at in self._order]
        for position in self._options:
            if columns[position].count(None) < len(events):
                columns[position] = [None if value is None else (0, value) for value in columns[position]]
        for position, convert in self._converts:
            if not (isinstance(convert, _IntegerEncoder) and convert.accepts_all(columns[position])):
                columns[position] = list(map(convert, columns[position]))
        return list(zip(*columns, strict=True)) if columns else [()] * len(events)


def _closed_set(kind: type[msgspec.Struct], field: str) -> _ClosedSet:
    for (owner, name), members in _CLOSED_SETS.items():
        if issubclass(kind, owner) and name == field:
            return tuple((member.name, member.value) for member in members)
    return ()


def _scalar_kind(kind: Any, closed: _ClosedSet) -> tuple[Any, _ClosedSet]:
    """Return str or int for an enum or Literal of these, with its values; another type unchanged."""
    plain = get_origin(kind) or kind
    if plain is Literal:
        closed = tuple((str(value), value) for value in get_args(kind))
    elif isinstance(plain, type) and issubclass(plain, enum.Enum):
        closed = tuple((member.name, member.value) for member in plain)
    else:
        return plain, closed
    for scalar in (str, int):
        if all(isinstance(value, scalar) and not isinstance(value, bool) for _, value in closed):
            return scalar, closed
    return plain, closed


class _VariantTable(dict[Any, msgspec.Raw]):
    """Maps text or an enum member to a variant. A dictionary, because each event is looked up."""

    def __init__(self, known: dict[Any, msgspec.Raw], positions: dict[str, msgspec.Raw], before: str, after: str) -> None:
        super().__init__(known)
        self._positions = positions
        self._words = (before, after)

    def __missing__(self, value: Any) -> msgspec.Raw:
        text = value.value if isinstance(value, enum.Enum) else value
        variant = self._positions.get(canonical_name(str(text)))
        if variant is None:
            raise UnencodableValueError(Rejection("unknown_variant", f"{self._words[0]}{text!r}{self._words[1]}"))
        self[value] = variant  # bounded by the number of spellings of the variants
        return variant


def _encode_some(value: Any) -> Any:
    return None if value is None else (0, value)


def _option_encoder(convert: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    if convert is None:
        return _encode_some
    return lambda value: None if value is None else (0, convert(value))


def _list_encoder(convert: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    return list if convert is None else lambda value: [convert(item) for item in value]


class _IntegerEncoder:
    """Checks that an integer, or the value of an enum of integers, is in the range of its type."""

    def __init__(self, sign: str, bits: int) -> None:
        self._name = f"{sign.lower()}{bits}"
        self._least: int = -(2 ** (bits - 1)) if sign == "I" else 0
        self._most: int = 2 ** (bits - (sign == "I")) - 1

    def __call__(self, value: Any) -> int:
        if type(value) is not int:
            value = int(value.value)  # an enum member
        if not self._least <= value <= self._most:
            raise UnencodableValueError(Rejection("out_of_range", f"{value} is out of range for {self._name}"))
        return value  # type: ignore[no-any-return]  # an int here

    def accepts_all(self, values: Sequence[Any]) -> bool:
        """Whether all values are integers in range."""
        return set(map(type, values)) == {int} and self._least <= min(values) and max(values) <= self._most


def _encode_micros(value: int | datetime) -> list[int]:
    if isinstance(value, datetime):
        since = (value if value.tzinfo else value.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
        return [(since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds]
    return [value]


def _encode_json_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
