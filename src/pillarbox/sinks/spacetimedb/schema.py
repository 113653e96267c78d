"""A database's schema (version 9, which servers 1.x and 2.x describe themselves in) -> what can be called, with which types.

Types are kept in the server's own shape: `{"String": []}`, `{"Array": T}`, `{"Product": {"elements": [...]}}`,
`{"Sum": {"variants": [...]}}`, `{"Ref": n}`. Pure.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

Type = dict[str, Any]
Returns = Literal["nothing", "count", "result", "value"]


class SchemaUnreadable(Exception):  # noqa: N818 - reads as the sentence it is
    """The text is no schema of a database in version 9."""


class Member(NamedTuple):
    """A field of a product or a variant of a sum."""

    name: str
    type: Type


class Function(NamedTuple):
    """Something that can be called."""

    name: str
    kind: Literal["reducer", "procedure"]
    parameters: list[Member]
    returns: Type | None  # of a procedure


class Schema:
    """What a database says of itself."""

    def __init__(self, text: bytes) -> None:
        try:
            raw = msgspec.json.decode(text)
            self._types: list[Type] = raw["typespace"]["types"]
            self.tables = [str(table["name"]) for table in raw["tables"]]
            self._raw_tables = raw["tables"]
            self.lifecycle = [str(reducer["name"]) for reducer in raw["reducers"] if "some" in reducer.get("lifecycle", {})]
            self.functions = {
                reducer["name"]: Function(reducer["name"], "reducer", _members(reducer["params"]["elements"]), None)
                for reducer in raw["reducers"]
                if "some" not in reducer.get("lifecycle", {})
            }
            for export in raw.get("misc_exports", []):
                procedure = export.get("Procedure")
                if procedure is not None and procedure["name"] not in self.functions:
                    parameters = _members(procedure["params"]["elements"])
                    self.functions[procedure["name"]] = Function(
                        procedure["name"], "procedure", parameters, procedure["return_type"]
                    )
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
            raise SchemaUnreadable(f"{type(error).__name__}: {error}") from None

    def resolve(self, of: Type) -> Type:
        """The type that a reference stands for."""
        for _ in range(len(self._types) + 1):
            if "Ref" not in of:
                return of
            of = self._types[of["Ref"]]
        raise SchemaUnreadable("a type that refers to itself only")

    def product(self, of: Type) -> list[Member] | None:
        """The fields of a product type."""
        of = self.resolve(of)
        return _members(of["Product"]["elements"]) if "Product" in of else None

    def variants(self, of: Type) -> list[Member] | None:
        """The variants of a sum type."""
        of = self.resolve(of)
        return _members(of["Sum"]["variants"]) if "Sum" in of else None

    def option(self, of: Type) -> Type | None:
        """What an option type holds."""
        variants = self.variants(of)
        if variants is not None and [variant.name for variant in variants] == ["some", "none"]:
            return variants[0].type
        return None

    def table(self, name: str) -> tuple[list[Member], bool]:
        """The columns of a table, and whether it is private."""
        for table in self._raw_tables:
            if table["name"] == name:
                return self.product({"Ref": table["product_type_ref"]}) or [], "Private" in table["table_access"]
        return [], False

    def answer(self, function: Function) -> Returns:
        """What a successful call answers with."""
        if function.returns is None:
            return "nothing"
        of = self.resolve(function.returns)
        if [variant.name for variant in self.variants(of) or []] == ["ok", "err"]:
            return "result"
        return "count" if next(iter(of))[:1] in "IU" and next(iter(of))[1:].isdigit() else "value"

    def element(self, of: Type) -> Type | None:
        """What an array type holds."""
        return self.resolve(of).get("Array")

    def words(self, of: Type) -> str:
        """The type as Rust writes it."""
        of = self.resolve(of)
        inner = self.option(of)
        if inner is not None:
            return f"Option<{self.words(inner)}>"
        if "Array" in of:
            return f"Vec<{self.words(of['Array'])}>"
        variants = self.variants(of)
        if variants is not None:
            return f"enum {{{', '.join(variant.name for variant in variants)}}}"
        fields = self.product(of)
        if fields is not None:
            return f"struct {{{', '.join(field.name for field in fields)}}}"
        name = next(iter(of))
        return name.lower() if name[-1].isdigit() or name == "Bool" else name


def _members(raw: list[dict[str, Any]]) -> list[Member]:
    return [Member(member["name"].get("some", ""), member["algebraic_type"]) for member in raw]


def canonical(name: str) -> str:
    """A name without what servers 2.x change about it: `UserProfile`, `userProfile` and `user_profile` are one."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
