"""How events of a type become the argument of a function: SATS-JSON in its compact array form. Pure.

A struct is an array of its fields in the order of the schema, an option is null or `[0, value]`, a variant without data is
`{"position": []}`, which servers 1.x and 2.x both take. What does not fit is found when the fitting is made, field by field;
what only a value can show (a text that is no variant, a number out of range) refuses that one event.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Union, get_args, get_origin

import msgspec

from pillarbox.event import ScopeKind, TrackingEvent
from pillarbox.sinks.base import Refusal
from pillarbox.sinks.spacetimedb.schema import Function, Member, Schema, Type, canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_Members = tuple[tuple[str, Any], ...]  # (name, value) of a closed set
_INTEGERS: Final = {f"{sign}{bits}": (sign, bits) for sign in "IU" for bits in (8, 16, 32, 64, 128, 256)}
_TOGETHER: Final = 50  # events whose fields are converted at once: no more than between two chances for other threads
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
        self.returns = schema.answer(function)
        self._schema = schema
        element = schema.element(function.parameters[0].type) if len(function.parameters) == 1 else None
        columns = schema.product(element) if element is not None else None
        if columns is None or element is None:
            takes = ", ".join(schema.words(parameter.type) for parameter in function.parameters) or "nothing"
            self.misfits.append(Misfit(function.name, f"takes {takes}; it must take one list of structs: Vec<...>"))
            return
        self._rows = self._struct(event_type, element, "")

    def _struct(self, kind: type[msgspec.Struct], of: Type, path: str) -> _Rows:
        """How structs become arrays."""
        fields = {canonical(field.encode_name): field for field in msgspec.structs.fields(kind)}
        places = {name: at for at, name in enumerate(kind.__struct_fields__)}
        order: list[int | None] = []
        options: list[int] = []
        converts: list[tuple[int, Callable[[Any], Any]]] = []
        for column in self._schema.product(of) or []:
            field = fields.pop(canonical(column.name), None)
            name = f"{path}{column.name}"
            if field is None:
                # An option that the event type does not know is none.
                if self._schema.option(column.type) is None:
                    wanted = f"the module wants {self._schema.words(column.type)}, the event type has no such field"
                    self.misfits.append(Misfit(name, wanted))
                order.append(None)
                continue
            order.append(places[field.name])
            convert = self._value(field.type, column.type, name, _closed(kind, field.name))
            if convert is _some:
                options.append(len(order) - 1)
            elif convert is not None:
                converts.append((len(order) - 1, convert))
        for left in fields.values():
            self.misfits.append(Misfit(f"{path}{left.encode_name}", "the module has no such field; its values would be lost"))
        return _Rows(order, options, converts)

    def _value(self, annotation: Any, of: Type, path: str, closed: _Members = ()) -> Callable[[Any], Any] | None:
        """How a value becomes one of the type `of`; None where it goes as it is."""
        kinds = set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}
        nullable = NoneType in kinds
        kinds.discard(NoneType)
        kind = kinds.pop() if len(kinds) == 1 else Any
        inner = self._schema.option(of)
        if inner is not None:
            return _option(self._value(kind, inner, path, closed))
        if nullable:
            words = self._schema.words(of)
            self.misfits.append(Misfit(path, f"may be None, the module's is {words}: make it Option<{words}>"))
        return self._present(kind, self._schema.resolve(of), path, closed)

    def _present(self, kind: Any, of: Type, path: str, closed: _Members) -> Callable[[Any], Any] | None:
        plain, closed = _scalar(kind, closed)
        name = next(iter(of))
        variants = self._schema.variants(of)
        if variants is not None and plain is str:
            return self._variant(variants, closed, path)
        if name == "String" and plain is not int:
            return None if plain is str else _json_text
        if name == "Bool" and plain is bool:
            return None
        if name in ("F32", "F64") and plain in (float, int):
            return None
        if name in _INTEGERS and plain is int:
            return _Integer(*_INTEGERS[name])
        fields = self._schema.product(of) or []
        if fields and fields[0].name in _MICROS and plain in (int, datetime):
            return _micros
        if "Product" in of and isinstance(plain, type) and issubclass(plain, msgspec.Struct):
            rows = self._struct(plain, of, f"{path}.")
            return lambda value: rows((value,))[0]
        element = self._schema.element(of)
        if element is not None and plain in (list, tuple, set, frozenset, bytes):
            arguments = [one for one in get_args(kind) if one is not Ellipsis]
            return _list(self._value(int if plain is bytes else arguments[0] if arguments else Any, element, f"{path}[]"))
        shown = getattr(kind, "__name__", str(kind))
        self.misfits.append(Misfit(path, f"is {shown}, the module's is {self._schema.words(of)}"))
        return None

    def _variant(self, variants: list[Member], closed: _Members, path: str) -> Callable[[Any], Any]:
        """How a text becomes a variant; every member of a closed set must have one."""
        names = ", ".join(variant.name for variant in variants)
        for variant in variants:
            if self._schema.product(variant.type) != []:
                self.misfits.append(
                    Misfit(path, f"the module's variant {variant.name} carries data, which no text can give it")
                )
        positions = {canonical(one.name): msgspec.Raw(b'{"%d":[]}' % at) for at, one in enumerate(variants)}
        known: dict[Any, msgspec.Raw] = {}
        for name, value in closed:
            position = positions.get(canonical(str(value)), positions.get(canonical(name)))
            if position is None:
                self.misfits.append(Misfit(path, f"the module's enum lacks {name}; it has {names}"))
            else:
                known[value] = position

        return _Variants(known, positions, f"{path}: ", f" is none of {names}").__getitem__

    def body(self, events: Sequence[Any], indexes: Sequence[int], refused: dict[int, Refusal]) -> tuple[bytes, Sequence[int]]:
        """The function's arguments, and the index in the batch of each event in it; adds to `refused` what cannot be sent."""
        parts: list[bytes] = []
        unfit: set[int] = set()
        for start in range(0, len(events), _TOGETHER):
            part = events[start : start + _TOGETHER]
            try:
                rows = self._rows(part)
            except Unfit:
                rows = self._singly(part, indexes[start : start + _TOGETHER], refused, unfit)
            if rows:
                parts.append(msgspec.json.encode(rows)[1:-1])
        return b"[[%b]]" % b",".join(parts), [index for index in indexes if index not in unfit] if unfit else indexes

    def _singly(
        self, events: Sequence[Any], indexes: Sequence[int], refused: dict[int, Refusal], unfit: set[int]
    ) -> list[tuple[Any, ...]]:
        """The rows of those that can be sent."""
        rows: list[tuple[Any, ...]] = []
        for event, index in zip(events, indexes, strict=True):
            try:
                rows += self._rows((event,))
            except Unfit as error:
                refused[index] = error.refusal
                unfit.add(index)
        return rows


class _Rows:
    """Structs -> arrays: several at once, column by column, for most columns of most events need nothing done."""

    def __init__(
        self, order: Sequence[int | None], options: Sequence[int], converts: Sequence[tuple[int, Callable[[Any], Any]]]
    ) -> None:
        self._order = order  # which field each column has, by its position; None: none
        self._options = options  # columns of what needs no more than to be told apart from none
        self._converts = converts

    def __call__(self, events: Sequence[Any]) -> list[tuple[Any, ...]]:
        fields = list(zip(*map(msgspec.structs.astuple, events), strict=True))
        nothing = (None,) * len(events)
        columns: list[Sequence[Any]] = [nothing if at is None else fields[at] for at in self._order]
        for position in self._options:
            if columns[position].count(None) < len(events):
                columns[position] = [None if value is None else (0, value) for value in columns[position]]
        for position, convert in self._converts:
            if not (isinstance(convert, _Integer) and convert.takes(columns[position])):
                columns[position] = list(map(convert, columns[position]))
        return list(zip(*columns, strict=True)) if columns else [()] * len(events)


def _closed(kind: type[msgspec.Struct], field: str) -> _Members:
    for (owner, name), members in _CLOSED.items():
        if issubclass(kind, owner) and name == field:
            return tuple((member.name, member.value) for member in members)
    return ()


def _scalar(kind: Any, closed: _Members) -> tuple[Any, _Members]:
    """(str or int for an enum or a Literal of such, its members); any other type as it is."""
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


class _Variants(dict[Any, msgspec.Raw]):
    """Text or enum member -> variant; a dictionary, for it is asked once an event."""

    def __init__(self, known: dict[Any, msgspec.Raw], positions: dict[str, msgspec.Raw], before: str, after: str) -> None:
        super().__init__(known)
        self._positions = positions
        self._words = (before, after)

    def __missing__(self, value: Any) -> msgspec.Raw:
        text = value.value if isinstance(value, enum.Enum) else value
        found = self._positions.get(canonical(str(text)))
        if found is None:
            raise Unfit(Refusal("unknown_variant", f"{self._words[0]}{text!r}{self._words[1]}"))
        self[value] = found  # no more than there are spellings of the variants
        return found


def _some(value: Any) -> Any:
    return None if value is None else (0, value)


def _option(convert: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    if convert is None:
        return _some
    return lambda value: None if value is None else (0, convert(value))


def _list(convert: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    return list if convert is None else lambda value: [convert(one) for one in value]


class _Integer:
    """A whole number, or an enum of such, within the bounds of its type."""

    def __init__(self, sign: str, bits: int) -> None:
        self._name = f"{sign.lower()}{bits}"
        self._least: int = -(2 ** (bits - 1)) if sign == "I" else 0
        self._most: int = 2 ** (bits - (sign == "I")) - 1

    def __call__(self, value: Any) -> int:
        if type(value) is not int:
            value = int(value.value)  # an enum's
        if not self._least <= value <= self._most:
            raise Unfit(Refusal("out_of_range", f"{value} does not fit into {self._name}"))
        return value  # type: ignore[no-any-return]  # an int by now

    def takes(self, values: Sequence[Any]) -> bool:
        """Whether all of them go as they are."""
        return set(map(type, values)) == {int} and self._least <= min(values) and max(values) <= self._most


def _micros(value: int | datetime) -> list[int]:
    if isinstance(value, datetime):
        since = (value if value.tzinfo else value.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
        return [(since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds]
    return [value]


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
