"""`TrackingEvent` validates itself; other event types are validated by `enqueue`."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
import uuid
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import forkserver
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pillarbox.event
from pillarbox import InvalidEventError, ScopeKind, TrackingEvent
from pillarbox._native import COMPILED
from pillarbox.codec import Codec
from pillarbox.errors import UsageError
from pillarbox.event import new_event_id, now_micros
from tests.conftest import event


class Text(str):
    """A subclass of `str`, as template engines and translation libraries use them."""

    __slots__ = ()


FIELDS = [
    "event_id",
    "event_key",
    "scope_kind",
    "scope_id",
    "user_id",
    "owner_user_id",
    "profile_id",
    "module_key",
    "metadata_json",
    "occurred_at_micros",
]


def test_all_ten_fields_are_in_the_json_in_order() -> None:
    """None is written as null."""
    text = Codec(TrackingEvent).encode(event(1))
    assert list(msgspec.json.decode(text)) == FIELDS
    assert b'"user_id":null' in text


def test_id_and_time_have_defaults() -> None:
    """The id is a UUIDv7 whose time is that of `occurred_at_micros`."""
    created = TrackingEvent(event_key="k", scope_kind=ScopeKind.USER, scope_id="u")
    parsed = uuid.UUID(created.event_id)
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert abs((parsed.int >> 80) - created.occurred_at_micros // 1000) < 1000
    assert b'"scope_kind":"User"' in Codec(TrackingEvent).encode(created)


def test_ids_and_times_use_the_wall_clock() -> None:
    """An id has milliseconds, a time has microseconds."""
    for _ in range(100):
        before = time.time_ns()
        new_id, micros = uuid.UUID(new_event_id()), now_micros()
        after = time.time_ns()
        assert before // 10**6 <= new_id.int >> 80 <= after // 10**6
        assert before // 10**3 <= micros <= after // 10**3


def test_compiled_ids_have_the_same_random_parts_as_those_of_python() -> None:
    """A random middle, and a counter with a random start."""
    plain, reseed = pillarbox.event._uuid7_generator()
    try:
        for seed in (pillarbox.event._random_seed(), pillarbox.event._random_seed()):
            reseed(*seed)
            pillarbox.event._reseed(*seed)
            tails = [new_event_id()[13:] for _ in range(3)]
            assert tails == [plain()[13:] for _ in range(3)]
            assert tails[0] == f"{seed[0]}{seed[1]:x}"
    finally:
        pillarbox.event._reseed(*pillarbox.event._random_seed())


def test_ids_are_unique_and_increase_within_a_thread() -> None:
    """Across threads, no two are equal."""
    with ThreadPoolExecutor(8) as pool:
        ids_by_thread = list(pool.map(new_ids, [20_000] * 8))
    assert all(thread_ids == sorted(thread_ids) for thread_ids in ids_by_thread)
    ids = {event_id for thread_ids in ids_by_thread for event_id in thread_ids}
    assert len(ids) == 160_000
    assert all(
        re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", event_id) for event_id in ids
    )


def new_ids(count: int) -> list[str]:
    return [new_event_id() for _ in range(count)]


def test_children_forked_while_threads_make_ids_make_different_ids() -> None:
    """Each child reseeds the generator before any code of the application runs."""
    id_lists: list[list[str]] = []
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            futures = [pool.submit(new_ids, 5000) for _ in range(4)]
            id_lists += [ids_of_forked_child() for _ in range(3)]
            id_lists += [future.result() for future in futures]
    assert len({event_id for ids in id_lists for event_id in ids}) == 10 * (4 * 5000 + 3 * 100)


def ids_of_forked_child() -> list[str]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, " ".join(new_ids(100)).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        ids = pipe.read().split()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(ids) == 100
    return ids


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_processes_of_multiprocessing_make_different_ids(method: str) -> None:
    """With each start method. A fork server has imported the module, and its children inherit its state."""
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["pillarbox.event"])
    try:
        with ProcessPoolExecutor(4, mp_context=context) as pool:
            id_lists = [new_ids(1000), *pool.map(new_ids, [1000] * 8), new_ids(1000)]
    finally:
        if method == "forkserver":
            forkserver._forkserver._stop()  # type: ignore[attr-defined]
    assert len({event_id for ids in id_lists for event_id in ids}) == 10_000


@pytest.mark.parametrize("field", [name for name in FIELDS if name != "occurred_at_micros"])
def test_the_error_names_a_field_of_the_wrong_type(field: str) -> None:
    """It is raised where the event is created."""
    with pytest.raises(InvalidEventError) as caught:
        event(1, **{field: 5})
    assert caught.value.field == field


@pytest.mark.parametrize("value", [1.5, "1", None, True, 2**63, -(2**63) - 1])
def test_a_time_that_is_not_a_64_bit_integer_is_invalid(value: object) -> None:
    """Booleans are not accepted as numbers."""
    with pytest.raises(InvalidEventError, match="occurred_at_micros"):
        event(1, occurred_at_micros=value)


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", '{"a": NaN}', "\x00", '"\\ud800"', "{} {}"])
def test_metadata_that_is_not_json_text_is_invalid(text: str) -> None:
    """The destination would reject it, or even accept it, far from the cause."""
    with pytest.raises(InvalidEventError, match="metadata_json"):
        event(1, metadata_json=text)


@pytest.mark.parametrize("text", ["{}", '{"a":[1,2.5,null]}', "[]", '"é\u2028"', " {} ", Text('{"a":1}')])
def test_metadata_may_be_any_json_text(text: str) -> None:
    """Any JSON value, unchanged."""
    assert event(1, metadata_json=text).metadata_json == text


@pytest.mark.parametrize("field", FIELDS[:8])
def test_a_subclass_of_str_is_encoded_like_str(field: str) -> None:
    """Although msgspec does not support it."""
    encode = Codec(TrackingEvent).encode
    assert encode(event(1, **{field: Text("x")})) == encode(event(1, **{field: "x"}))


def test_other_event_types_may_contain_subclasses_of_str() -> None:
    """At any depth."""
    sample = Sample(Text("a"), extra={"t": [Text("b")]})
    assert Codec(Sample).encode(sample) == b'{"event_id":"a","value":null,"count":0,"extra":{"t":["b"]}}'
    with pytest.raises(TypeError, match="object is unsupported"):
        Codec(Sample).encode(Sample("a", extra={"t": object()}))


def test_an_event_is_frozen() -> None:
    """So it stays valid."""
    with pytest.raises(AttributeError):
        event(1).event_key = "other"  # type: ignore[misc]


def test_any_text_is_accepted_as_a_scope_kind() -> None:
    """Only the destination knows which kinds it accepts."""
    assert event(1, scope_kind="Galaxy").scope_kind == "Galaxy"


def validation_error(make: Any) -> str | None:
    try:
        make()
    except InvalidEventError as error:
        return str(error)
    return None


SURROGATES = ["\ud800", "\udc00", "\ud800a", "\U0001f600\udfff", "aé\udbff"]
VALID_TEXTS = ["", "a", "é", "\u2028", "\U0001f600", "{}", "{", '{"a":1}', '"\u2028"', *ScopeKind]
VALUES = st.sampled_from([*VALID_TEXTS, *SURROGATES, None, 5, 0, -(2**63), 2**63, True, 1.5, b"{}"]) | st.text(max_size=3)


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
def test_the_compiled_check_and_that_of_python_agree(changes: dict[str, Any]) -> None:
    """For events with up to two fields that may be invalid in any way."""
    fields = msgspec.structs.asdict(event(1)) | changes
    python_error = validation_error(lambda: pillarbox.event._check_event(SimpleNamespace(**fields)))  # type: ignore[arg-type]
    assert validation_error(lambda: TrackingEvent(**fields)) == python_error


@pytest.mark.parametrize("field", FIELDS[:9])
@pytest.mark.parametrize("text", SURROGATES)
def test_no_field_may_have_a_lone_surrogate(field: str, text: str) -> None:
    """UTF-8 cannot encode it."""
    with pytest.raises(InvalidEventError) as caught:
        event(1, **{field: text})
    assert caught.value.field == field


class Visit(TrackingEvent, frozen=True, kw_only=True):
    """A subclass of `TrackingEvent` in an application."""

    page: str = "/"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.page.startswith("/"):
            raise InvalidEventError("page", "must begin with /")


def test_a_subclass_of_tracking_event_is_validated() -> None:
    """By our check, and then by its own."""
    fields: dict[str, Any] = {"event_key": "k", "scope_kind": "Site", "scope_id": "s"}
    assert Visit(**fields).page == "/"
    for field, value in (("page", "x"), ("user_id", 5), ("metadata_json", "{")):
        with pytest.raises(InvalidEventError) as caught:
            Visit(**fields | {field: value})
        assert caught.value.field == field


compiled_only = pytest.mark.skipif(not COMPILED, reason="the C extensions are not in use")


class Pair(msgspec.Struct):
    """The smallest type that the compiled check supports."""

    json: Any
    micros: Any

    @property
    def not_a_field(self) -> None:
        """A property, which has no offset in the object."""


@compiled_only
def test_the_compiled_check_leaves_other_cases_to_python() -> None:
    """Other types, invalid events, and calls before it is bound."""
    from pillarbox._speedups import EventCheck

    left_to_python: list[object] = []
    check = EventCheck(left_to_python.append, msgspec.json.decode)
    good, bad, other = Pair("[1]", 1), Pair("[", 1), event(1)
    check(good)
    check.bind(Pair, (), (), "json", "micros")
    for pair in (good, bad, other):
        check(pair)
    assert left_to_python == [good, bad, other]
    for wrong in ((), (good, good)):
        with pytest.raises(TypeError):
            check(*wrong)


@compiled_only
def test_a_keyboard_interrupt_during_a_check_is_raised() -> None:
    """It is not reported as an invalid field."""
    from pillarbox._speedups import EventCheck

    def raise_interrupt(_text: str) -> None:
        raise KeyboardInterrupt

    check = EventCheck(lambda _event: pytest.fail("the check in Python was called"), raise_interrupt)
    check.bind(Pair, ("json",), (), "json", "micros")
    with pytest.raises(KeyboardInterrupt):
        check(Pair("[1]", 1))


class Wide(msgspec.Struct):
    """Its last field is beyond the end of a `Pair`."""

    a: Any
    b: Any
    c: Any


@compiled_only
def test_bind_rejects_names_that_are_not_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the check would read memory outside the event."""
    from pillarbox import _speedups

    monkeypatch.setattr(Pair, "beyond", Wide.__dict__["c"], raising=False)
    wrong: list[Any] = [
        (Pair, ("not_a_field",), (), "json", "micros"),
        (Pair, ("beyond",), (), "json", "micros"),
        (Pair, (), (), "json", "none"),
        (Pair, (5,), (), "json", "micros"),
    ]
    for arguments in wrong:
        check = _speedups.EventCheck(pytest.fail, repr)
        with pytest.raises((TypeError, AttributeError)):
            check.bind(*arguments)
    check.bind(Pair, (), (), "json", "micros")
    for bound in (check, pillarbox.event._post_init):
        with pytest.raises(ValueError, match="bound already"):
            bound.bind(Pair, (), (), "json", "micros")
    for middle in ("-7", "-7000-800\0-", "-7éééé-"):
        with pytest.raises(ValueError, match="11 characters"):
            _speedups.reseed(middle, 1)


@compiled_only
def test_creating_and_checking_events_leaks_no_references() -> None:
    """A leak would show in the reference counts."""
    text, metadata = "a string of this test", '{"a": 1}'

    def create_events(count: int) -> None:
        for number in range(count):
            event(number, event_key=text, metadata_json=metadata)
            validation_error(lambda: event(1, event_key=text, metadata_json="{"))
            validation_error(lambda: event(1, scope_id=5, event_key=text))
            Visit(event_key=text, scope_kind="Site", scope_id=text)

    create_events(1000)
    gc.collect()
    references = [sys.getrefcount(value) for value in (text, metadata, None.__class__, pillarbox.event._post_init)]
    create_events(5000)
    gc.collect()
    assert references == [sys.getrefcount(value) for value in (text, metadata, None.__class__, pillarbox.event._post_init)]


def test_the_environment_can_disable_the_compiled_check() -> None:
    """With PILLARBOX_PURE_PYTHON."""
    code = "from pillarbox import event; assert not event.COMPILED and event.TrackingEvent.__post_init__ is event._check_event"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PILLARBOX_PURE_PYTHON": "1"}, timeout=60)


class Sample(msgspec.Struct):
    """An event type of an application."""

    event_id: str
    value: float | None = None
    count: int = 0
    extra: dict[str, Any] = {}


@pytest.mark.parametrize(
    "bad",
    [
        Sample("a", value=math.nan),
        Sample("a", value=-math.inf),
        Sample("a", count=2**64),
        Sample("a", extra={"deep": [{"n": math.nan}]}),
        Sample("a", extra={"n": -(2**63) - 1}),
        Sample("a", value="1"),  # type: ignore[arg-type]
        Sample(5),  # type: ignore[arg-type]
        Sample("\ud800"),
    ],
)
def test_other_event_types_are_validated_when_they_are_encoded(bad: Sample) -> None:
    """Msgspec would write null for NaN, and checks no types when it encodes."""
    with pytest.raises((InvalidEventError, msgspec.ValidationError, UnicodeEncodeError)):
        Codec(Sample).encode(bad)


def test_other_event_types_are_encoded_unchanged() -> None:
    """64-bit integers, None and long strings of digits."""
    good = Sample("1" * 30, value=None, count=2**64 - 1, extra={"n": -(2**63), "t": "null"})
    assert msgspec.json.decode(Codec(Sample).encode(good), type=Sample) == good


def test_the_error_names_the_field() -> None:
    """Also if the error of the encoder does not."""
    codec = Codec(Sample)
    bad = Sample("\ud800")
    with pytest.raises(UnicodeEncodeError) as caught:
        codec.encode(bad)
    assert codec.describe_error(bad, caught.value).startswith("event_id: ")


@pytest.mark.parametrize("kind", [int, dict, msgspec.defstruct("NoId", ["name"])])
def test_an_event_type_needs_an_event_id(kind: Any) -> None:
    """The destination detects duplicates by it."""
    with pytest.raises(UsageError):
        Codec(kind)
