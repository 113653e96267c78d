"""How events of a type become the argument of a function: SATS-JSON in its compact array form. Pure.

A struct is an array of its fields in the order of the schema, an option is null or `[0, value]`, a variant without data is
`{"position": []}`, which servers 1.x and 2.x both take. What does not fit is found when the fitting is made, field by field;
what only a value can show (a text that is no variant, a number out of range) refuses that one event.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from operator import attrgetter
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Union, get_args, get_origin

import msgspec

from pillarbox.event import ScopeKind, TrackingEvent
from pillarbox.sinks.base import Refusal
from pillarbox.sinks.spacetimedb.schema import Function, Schema, Type, canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Convert = "Callable[[Any], Any] | None"  # None: the value goes as it is

_INTEGERS: Final = {f"{sign}{bits}": (sign, bits) for sign in "IU" for bits in (8, 16, 32, 64, 128, 256)}
_MICROS: Final = {"__timestamp_micros_since_unix_epoch__", "__time_duration_micros__"}
# Texts whose values have a closed set all the same: a module that lacks one of them is set up wrongly, not the event.
_CLOSED: Final[dict[tuple[type, str], type[enum.Enum]]] = {(TrackingEvent, "scope_kind"): ScopeKind}


class Unfit(Exception):  # noqa: N818 - reads as the sentence it is
    """A value that the function's type does not take; refuses one event."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class Misfit(NamedTuple):
    """A field that does not fit, and what would put it right."""

    field: str
    problem: str


class Fitting:
    """Events of one type, fitted to one function. `misfits` is empty where they can be sent."""

    def __init__(self, schema: Schema, function: Function, event_type: type[msgspec.Struct]) -> None:
        self.function = function
        self.misfits: list[Misfit] = []
        self.counted = function.returns is not None
        self._schema = schema
        element = schema.element(function.parameters[0].type) if len(function.parameters) == 1 else None
        columns = schema.product(element) if element is not None else None
        if columns is None or element is None:
            takes = ", ".join(schema.words(parameter.type) for parameter in function.parameters) or "nothing"
            self.misfits.append(Misfit(function.name, f"takes {takes}; it must take one list of structs: Vec<...>"))
            return
        self._row = self._struct(event_type, element, "")

    def _struct(self, kind: type[msgspec.Struct], of: Type, path: str) -> Callable[[Any], list[Any]]:
        """How a struct becomes an array."""
        fields = {canonical(field.encode_name): field for field in msgspec.structs.fields(kind)}
        names: list[str] = []
        converts: list[tuple[int, Callable[[Any], Any]]] = []
        for column in self._schema.product(of) or []:
            field = fields.pop(canonical(column.name), None)
            name = f"{path}{column.name}"
            if field is None:
                # An option that the event type does not know is none; a place-holder keeps the positions.
                if self._schema.option(column.type) is None:
                    wanted = f"the module wants {self._schema.words(column.type)}, the event type has no such field"
                    self.misfits.append(Misfit(name, wanted))
                names.append("__class__")
                converts.append((len(names) - 1, _nothing))
                continue
            names.append(field.name)
            convert = self._value(field.type, column.type, name, _CLOSED.get((kind, field.name)))
            if convert is not None:
                converts.append((len(names) - 1, convert))
        for left in fields.values():
            self.misfits.append(Misfit(f"{path}{left.encode_name}", "the module has no such field; its values would be lost"))
        get = attrgetter(*names, "__class__")  # one more, so that it is a tuple for a single field too

        def row(event: Any) -> list[Any]:
            values = list(get(event)[:-1])
            for position, convert in converts:
                values[position] = convert(values[position])
            return values

        return row

    def _value(
        self, annotation: Any, of: Type, path: str, closed: type[enum.Enum] | None = None
    ) -> Callable[[Any], Any] | None:
        """How a value becomes one of the type `of`; None where it goes as it is."""
        kinds = set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}
        nullable = NoneType in kinds or Any in kinds
        kinds.discard(NoneType)
        kind = kinds.pop() if len(kinds) == 1 else Any
        inner = self._schema.option(of)
        if inner is not None:
            return _option(self._value(kind, inner, path, closed))
        if nullable and annotation is not Any:
            words = self._schema.words(of)
            self.misfits.append(Misfit(path, f"may be None, the module's is {words}: make it Option<{words}>"))
        return self._present(kind, self._schema.resolve(of), path, closed)

    def _present(self, kind: Any, of: Type, path: str, closed: type[enum.Enum] | None) -> Callable[[Any], Any] | None:
        plain = get_origin(kind) or kind
        if isinstance(plain, type) and issubclass(plain, enum.Enum):
            closed = plain
        name = next(iter(of))
        variants = self._schema.variants(of)
        if variants is not None and (closed is not None or plain in (str, Literal)):
            return self._variant([variant.name for variant in variants], closed, path)
        if name == "String":
            return None if plain in (str, Literal) or closed is not None else _json_text
        if name == "Bool" and plain is bool:
            return None
        if name in ("F32", "F64") and plain in (float, int):
            return None
        if name in _INTEGERS and (plain is int or (closed is not None and issubclass(closed, int))):
            return _integer(*_INTEGERS[name])
        fields = self._schema.product(of)
        if fields is not None and [field.name for field in fields] and fields[0].name in _MICROS and plain in (int, datetime):
            return _micros
        if fields is not None and isinstance(plain, type) and issubclass(plain, msgspec.Struct):
            return self._struct(plain, of, f"{path}.")
        element = self._schema.element(of)
        if element is not None and plain in (list, tuple, set, frozenset, bytes):
            arguments = [one for one in get_args(kind) if one is not Ellipsis]
            return _list(self._value(int if plain is bytes else arguments[0] if arguments else Any, element, f"{path}[]"))
        shown = getattr(kind, "__name__", str(kind))
        self.misfits.append(Misfit(path, f"is {shown}, the module's is {self._schema.words(of)}"))
        return None

    def _variant(self, variants: list[str], closed: type[enum.Enum] | None, path: str) -> Callable[[Any], Any]:
        positions = {canonical(variant): msgspec.Raw(b'{"%d":[]}' % position) for position, variant in enumerate(variants)}
        known: dict[Any, msgspec.Raw] = {}
        for member in closed or ():
            position = positions.get(canonical(str(member.value)), positions.get(canonical(member.name)))
            if position is None:
                self.misfits.append(Misfit(path, f"the module's enum lacks {member.name}; it has {', '.join(variants)}"))
            else:
                known[member.value] = known[member] = position

        def convert(value: Any) -> msgspec.Raw:
            found = known.get(value) or positions.get(canonical(str(value)))
            if found is None:
                reason = f"{path}: {value!r} is none of {', '.join(variants)}"
                raise Unfit(Refusal("unknown_variant", reason))
            known[value] = found
            return found

        return convert

    def body(self, events: Iterable[tuple[int, Any]], refused: dict[int, Refusal]) -> tuple[bytes, list[int]]:
        """The function's arguments, and the index in the batch of each event in it; adds to `refused` what cannot be sent."""
        rows, indexes = [], []
        row = self._row
        for index, event in events:
            try:
                rows.append(row(event))
            except Unfit as unfit:
                refused[index] = unfit.refusal
            else:
                indexes.append(index)
        return msgspec.json.encode([rows]), indexes


def _nothing(_value: Any) -> None:
    return None


def _option(convert: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    if convert is None:
        return lambda value: None if value is None else (0, value)
    return lambda value: None if value is None else (0, convert(value))


def _list(convert: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    return list if convert is None else lambda value: [convert(one) for one in value]


def _integer(sign: str, bits: int) -> Callable[[Any], Any]:
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if sign == "I" else (0, 2**bits - 1)

    def convert(value: int) -> int:
        if not least <= value <= most:
            raise Unfit(Refusal("out_of_range", f"{value} does not fit into {sign.lower()}{bits}"))
        return value

    return convert


def _micros(value: int | datetime) -> list[int]:
    if isinstance(value, datetime):
        since = (value if value.tzinfo else value.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
        return [(since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds]
    return [value]


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
