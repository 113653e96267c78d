"""Parses a database's schema in version 9, which servers 1.x and 2.x return: its tables, functions and types. Pure.

Types keep the server's JSON form: `{"String": []}`, `{"Array": T}`, `{"Product": {"elements": [...]}}`,
`{"Sum": {"variants": [...]}}`, `{"Ref": n}`.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

import msgspec

AlgebraicType = dict[str, Any]
ReturnKind = Literal["nothing", "count", "result", "value"]


DEPTH_MAX: Final = 32  # levels of nested types; only a type that contains itself has more
_NAME_CHARS_MAX: Final = 200  # characters of a type's name in a message


class SchemaError(Exception):
    """The text is not a database schema in version 9."""


class NamedType(NamedTuple):
    """A field of a product type, a variant of a sum type or a parameter of a function."""

    name: str
    type: AlgebraicType


class ModuleFunction(NamedTuple):
    """A reducer or procedure of the module."""

    name: str
    kind: Literal["reducer", "procedure"]
    parameters: list[NamedType]
    returns: AlgebraicType | None  # None for a reducer


class DatabaseSchema:
    """The parsed schema of a database."""

    def __init__(self, text: bytes) -> None:
        try:
            raw = msgspec.json.decode(text)
            self._types: list[AlgebraicType] = raw["typespace"]["types"]
            self.tables = [str(table["name"]) for table in raw["tables"]]
            self._rows_by_table = {
                str(table["name"]): ({"Ref": table["product_type_ref"]}, "Private" in table["table_access"])
                for table in raw["tables"]
            }
            self.lifecycle = [str(reducer["name"]) for reducer in raw["reducers"] if "some" in reducer.get("lifecycle", {})]
            self.functions = {
                str(reducer["name"]): ModuleFunction(
                    str(reducer["name"]), "reducer", _named_types(reducer["params"]["elements"]), None
                )
                for reducer in raw["reducers"]
                if "some" not in reducer.get("lifecycle", {})
            }
            for export in raw.get("misc_exports", []):
                procedure = export.get("Procedure")
                name = "" if procedure is None else str(procedure["name"])
                if procedure is not None and name not in self.functions:
                    parameters = _named_types(procedure["params"]["elements"])
                    self.functions[name] = ModuleFunction(name, "procedure", parameters, procedure["return_type"])
            self._check_types()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise SchemaError(f"{type(error).__name__}: {str(error)[:_NAME_CHARS_MAX]}") from None

    def _check_types(self) -> None:
        """Check that every type has one of the forms above and refers to existing types: any text may come from the network."""
        types = [*self._types, *(row for row, _ in self._rows_by_table.values())]
        for function in self.functions.values():
            types += [parameter.type for parameter in function.parameters]
            types += [] if function.returns is None else [function.returns]
        while types:
            algebraic_type = types.pop()
            ((kind, content),) = algebraic_type.items()
            if kind == "Ref" and not (type(content) is int and 0 <= content < len(self._types)):
                raise SchemaError(f"there is no type {content!r:.20}")
            if kind == "Array":
                types.append(content)
            elif kind in ("Product", "Sum"):
                types += [member.type for member in _named_types(content["elements" if kind == "Product" else "variants"])]
            elif not kind:
                raise SchemaError("a type has no name")

    def resolve(self, algebraic_type: AlgebraicType) -> AlgebraicType:
        """Follow references to the type they stand for."""
        for _ in range(len(self._types) + 1):
            if "Ref" not in algebraic_type:
                return algebraic_type
            algebraic_type = self._types[algebraic_type["Ref"]]
        raise SchemaError("a type refers only to itself")

    def product_fields(self, algebraic_type: AlgebraicType) -> list[NamedType] | None:
        """Return the fields of a product type, None for another type."""
        algebraic_type = self.resolve(algebraic_type)
        return _named_types(algebraic_type["Product"]["elements"]) if "Product" in algebraic_type else None

    def sum_variants(self, algebraic_type: AlgebraicType) -> list[NamedType] | None:
        """Return the variants of a sum type, None for another type."""
        algebraic_type = self.resolve(algebraic_type)
        return _named_types(algebraic_type["Sum"]["variants"]) if "Sum" in algebraic_type else None

    def option_inner(self, algebraic_type: AlgebraicType) -> AlgebraicType | None:
        """Return the type inside an option type, None for another type."""
        variants = self.sum_variants(algebraic_type)
        if variants is not None and [variant.name for variant in variants] == ["some", "none"]:
            return variants[0].type
        return None

    def table_columns(self, name: str) -> tuple[list[NamedType], bool]:
        """Return a table's columns and whether the table is private."""
        row, is_private = self._rows_by_table.get(name, (None, False))
        return (self.product_fields(row) or [] if row is not None else []), is_private

    def return_kind(self, function: ModuleFunction) -> ReturnKind:
        """Return what a successful call of the function responds with."""
        if function.returns is None:
            return "nothing"
        of = self.resolve(function.returns)
        if [variant.name for variant in self.sum_variants(of) or []] == ["ok", "err"]:
            return "result"
        return "count" if next(iter(of))[:1] in "IU" and next(iter(of))[1:].isdigit() else "value"

    def array_element(self, algebraic_type: AlgebraicType) -> AlgebraicType | None:
        """Return the element type of an array type, None for another type."""
        return self.resolve(algebraic_type).get("Array")

    def rust_type(self, algebraic_type: AlgebraicType, depth: int = 0) -> str:
        """Return the type in Rust's notation, for messages."""
        if depth > DEPTH_MAX:
            return "..."
        algebraic_type = self.resolve(algebraic_type)
        inner = self.option_inner(algebraic_type)
        if inner is not None:
            return f"Option<{self.rust_type(inner, depth + 1)}>"
        if "Array" in algebraic_type:
            return f"Vec<{self.rust_type(algebraic_type['Array'], depth + 1)}>"
        variants = self.sum_variants(algebraic_type)
        if variants is not None:
            return f"enum {{{_joined(variants)}}}"
        fields = self.product_fields(algebraic_type)
        if fields is not None:
            return f"struct {{{_joined(fields)}}}"
        name = next(iter(algebraic_type))[:_NAME_CHARS_MAX]
        return name.lower() if name[-1].isdigit() or name == "Bool" else name


def _joined(members: list[NamedType]) -> str:
    return ", ".join(member.name for member in members)[:_NAME_CHARS_MAX]


def _named_types(raw: list[dict[str, Any]]) -> list[NamedType]:
    return [NamedType(str(member["name"].get("some", "")), member["algebraic_type"]) for member in raw]


def canonical_name(name: str) -> str:
    """Return a name without case and punctuation, which servers 2.x change: `UserProfile` and `user_profile` are equal."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
