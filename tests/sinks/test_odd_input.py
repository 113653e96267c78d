"""Odd URLs and schemas raise errors of Pillarbox, never Python's own, and never show a secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pillarbox import PillarboxError, TrackingEvent, UsageError
from pillarbox.exporters import MetricsExporters
from pillarbox.settings import Settings
from pillarbox.sinks import make_sink, redact_url
from pillarbox.sinks.spacetimedb.encoding import RowEncoder
from pillarbox.sinks.spacetimedb.schema import DatabaseSchema, SchemaError
from pillarbox.store.directory import Directory
from pillarbox.testing import ManualClock
from tests.cli.test_commands import run

SECRET = "s3cret-password"  # noqa: S105 - not a real one
SCHEMES = ["http", "https", "spacetimedb", "spacetimedb+https", "sqlite"]
ODD_RESTS = [
    "", ":", "//", "//[", "//]", "//[::1", "//[x]/d", "//[fe80::1%]/d", "//h:x/d", "//h:99999/d", "//h:-1/d", "//h:٣/d", "//h:1_0/d",
    "//ho℀st/d", f"//u:{SECRET}@ho℀st/d", "//xn--/d", "//xn--a-ecp.ru/d", f"//{'a' * 64}.example/d", f"//{'a.' * 200}b/d",
    "//h/d#format=x&timeout=nan", "//h/d#timeout=inf", f"//h/d#connections={'9' * 5000}", f"//h/d?connections={'9' * 5000}",
    f"//h/d?timeout={'9' * 5000}", "//h/d?timeout=nan", "//h/d?window=-inf", "//h/\udc80", "//\udc80/d", "//h/\x00", "/\x00", "///\x00",
    "///a\x00b.db", "///?table=\x00", "///\udc80?table=\udc80", "//h/d?token_file=\x00", "//h/d?token_file=/proc/self/mem",
    f"//u:{SECRET}@[/d", f"//u:{SECRET}@h:x/d", f"//u:{SECRET}@/x.db", f"//u:{SECRET}/x@h/d?y#z", f"//h/d?key={SECRET}", f"//h/d#{SECRET}",
    "//h/d?" + "&".join(["a=b"] * 2000), "//h/%", "//%zz/d", "//h/d\n", "//h\t/d", "//h/ d", "//@/d", "//:@h/d", "//h/" + "a/" * 5000,
]  # fmt: skip


def check_url(url: str) -> None:
    shown, leaks = "", False
    try:
        shown = repr(make_sink(url, TrackingEvent))
    except PillarboxError as error:
        shown = str(error)
        leaks = error.__cause__ is not None or not (error.__context__ is None or error.__suppress_context__)
    assert SECRET not in shown
    assert not leaks
    if SECRET in url and "@" in url:
        assert SECRET not in redact_url(url)


@pytest.mark.parametrize("rest", ODD_RESTS)
@pytest.mark.parametrize("scheme", [*SCHEMES, "HTTP", "ftp", "", "é", "http\x00"])
def test_an_odd_url_raises_an_error_of_pillarbox(scheme: str, rest: str) -> None:
    """Or is accepted; a wrong URL is the user's mistake, not a defect."""
    check_url(f"{scheme}:{rest}")


@given(scheme=st.sampled_from(SCHEMES), rest=st.text(st.characters() | st.sampled_from("/:@?#[]%&=."), max_size=40))
@settings(max_examples=300)
@example("http", "//[::1]:")
def test_any_text_as_a_url_raises_an_error_of_pillarbox(scheme: str, rest: str) -> None:
    """Whatever the characters."""
    check_url(f"{scheme}://{rest}")


@pytest.mark.parametrize(
    "server", ["http://[", "http://h:x", "http://u:s3cret-password@h:3000", "h:3000", "u:s3cret-password@h", "http://h/\n"]
)
def test_an_odd_server_to_publish_to_is_a_usage_error(tmp_path: Path, server: str) -> None:
    """Its password is not shown, and no token is sent anywhere."""
    completed = run("spacetimedb", "publish", "--server", server, "--database", "d", cwd=tmp_path)
    assert completed.returncode == 2
    assert b"Traceback" not in completed.stderr
    assert SECRET.encode() not in completed.stderr + completed.stdout


@pytest.mark.parametrize(
    ("metrics", "otlp"),
    [
        (f"{'a' * 64}.example:1", None), ("\udc80:1", None), ("é" * 70 + ":1", None), ("127.0.0.1:" + "9" * 5000, None), ("h:٣", None),
        (None, "http://["), (None, "http://h:x"), (None, "ftp://h"), (None, f"http://u:{SECRET}@h"), (None, "http://h:99999"),
    ],
)  # fmt: skip
def test_an_odd_address_of_an_exporter_is_a_usage_error(
    outbox_dir: Directory, clock: ManualClock, metrics: str | None, otlp: str | None
) -> None:
    """For people who typed it."""
    with pytest.raises(UsageError) as caught:
        MetricsExporters(outbox_dir, Settings(directory="box"), clock, metrics, otlp)
    assert SECRET not in str(caught.value)


class Tree(msgspec.Struct):
    """An event whose type contains itself."""

    event_id: str
    children: list[Tree] = []


def named(name: str, kind: dict[str, Any]) -> dict[str, Any]:
    return {"name": {"some": name}, "algebraic_type": kind}


def schema_of(*types: dict[str, Any], parameter: dict[str, Any], returns: dict[str, Any] | None = None) -> dict[str, Any]:
    """A schema with one function, `f`."""
    function = {"name": "f", "params": {"elements": [named("events", parameter)]}}
    reducers = [] if returns is not None else [function | {"lifecycle": {"none": []}}]
    exports = [] if returns is None else [{"Procedure": function | {"return_type": returns}}]
    tables = [{"name": "t", "product_type_ref": 0, "table_access": {"Private": []}}]
    return {"typespace": {"types": list(types)}, "tables": tables, "reducers": reducers, "misc_exports": exports}


def option(kind: dict[str, Any]) -> dict[str, Any]:
    return {"Sum": {"variants": [named("some", kind), named("none", {"Product": {"elements": []}})]}}


STRING: dict[str, Any] = {"String": []}
ROW: dict[str, Any] = {"Product": {"elements": [named("event_id", STRING)]}}
GOOD = schema_of(ROW, option({"Ref": 0}), parameter={"Array": {"Ref": 0}}, returns=option(STRING))


class Row(msgspec.Struct):
    """The event of these schemas."""

    event_id: str


def use_schema(text: bytes, event_type: type[msgspec.Struct] = Row) -> None:
    """Do with a schema what the sink and `publish` do."""
    schema = DatabaseSchema(text)
    schema.table_columns("t")
    for function in schema.functions.values():
        RowEncoder(schema, function, event_type)
        for parameter in function.parameters:
            schema.rust_type(parameter.type)


ODD_SCHEMAS = {
    "refers to itself": schema_of({"Ref": 0}, parameter={"Array": {"Ref": 0}}),
    "refer to each other": schema_of({"Ref": 1}, {"Ref": 0}, parameter={"Array": {"Ref": 0}}),
    "an array of itself": schema_of({"Array": {"Ref": 0}}, parameter={"Ref": 0}),
    "an option of itself": schema_of(option({"Ref": 0}), parameter={"Array": {"Ref": 0}}),
    "a field that is an option of itself": schema_of(
        {"Product": {"elements": [named("event_id", {"Ref": 1})]}}, option({"Ref": 1}), parameter={"Array": {"Ref": 0}}
    ),
    "a missing type": schema_of(ROW, parameter={"Array": {"Ref": 7}}),
    "a negative type": schema_of(ROW, parameter={"Array": {"Ref": -1}}),
    "a type by name": schema_of(ROW, parameter={"Array": {"Ref": "0"}}),
    "a type by truth": schema_of(ROW, parameter={"Array": {"Ref": True}}),
    "a type without a name": schema_of({"": []}, parameter={"Array": {"Ref": 0}}),
    "a type of nothing": schema_of({}, parameter={"Array": {"Ref": 0}}),
    "a list as a type": schema_of([], parameter={"Array": []}),  # type: ignore[arg-type]
    "a result that refers to itself": schema_of({"Ref": 0}, parameter={"Array": STRING}, returns={"Ref": 0}),
    "deep": schema_of(ROW, parameter=json.loads('{"Array":' * 200 + '{"Ref":0}' + "}" * 200)),
    "deep options": schema_of(
        {"Product": {"elements": [named("event_id", _deep := option(STRING))]}}, parameter={"Array": {"Ref": 0}}
    ),
}
for _ in range(100):
    _deep["Sum"]["variants"][0] = named("some", option(_deep["Sum"]["variants"][0]["algebraic_type"]))


@pytest.mark.parametrize("name", ODD_SCHEMAS)
def test_an_odd_schema_raises_an_error_of_pillarbox(name: str) -> None:
    """Or is described as not matching; it never exhausts the stack."""
    text = ""
    try:
        use_schema(json.dumps(ODD_SCHEMAS[name]).encode())
    except SchemaError as error:
        text = str(error)
    assert len(text) < 500


def test_a_type_that_contains_itself_is_named() -> None:
    """An event of such a type could be encoded only without knowing how deep it is."""
    tree = {"Product": {"elements": [named("event_id", STRING), named("children", {"Array": {"Ref": 0}})]}}
    with pytest.raises(SchemaError, match=r"the types of children.*are nested more than 32 levels deep"):
        use_schema(json.dumps(schema_of(tree, parameter={"Array": {"Ref": 0}})).encode(), Tree)


def test_a_good_schema_is_accepted() -> None:
    """Otherwise the tests of damaged ones would prove nothing."""
    use_schema(json.dumps(GOOD).encode())


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.sampled_from(["some", "Ref", "Array", "Sum", "Product"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["Ref", "Array", "name", "some", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside of a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inner for found in paths_of(part, (*path, key)))]


@given(path=st.sampled_from(paths_of(GOOD)), value=VALUES)
@settings(max_examples=1000)
def test_a_damaged_schema_raises_an_error_of_pillarbox(path: tuple[Any, ...], value: Any) -> None:
    """Wherever it is damaged."""
    damaged = json.loads(json.dumps(GOOD))
    if path:
        part = damaged
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
    else:
        damaged = value
    text = ""
    try:
        use_schema(json.dumps(damaged).encode())
    except SchemaError as error:
        text = str(error)
    assert len(text) < 500
