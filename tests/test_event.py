"""`TrackingEvent` checks itself; other types are checked at the door."""

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
    """As templates and translations have them."""

    __slots__ = ()


MEMBERS = [
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


def test_all_ten_members_are_in_the_json_in_order() -> None:
    """None is written as null."""
    text = Codec(TrackingEvent).encode(event(1))
    assert list(msgspec.json.decode(text)) == MEMBERS
    assert b'"user_id":null' in text


def test_id_and_time_have_defaults() -> None:
    """The id is a UUIDv7 whose time is that of `occurred_at_micros`."""
    made = TrackingEvent(event_key="k", scope_kind=ScopeKind.USER, scope_id="u")
    parsed = uuid.UUID(made.event_id)
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert abs((parsed.int >> 80) - made.occurred_at_micros // 1000) < 1000
    assert b'"scope_kind":"User"' in Codec(TrackingEvent).encode(made)


def test_the_time_of_both_is_that_of_the_wall() -> None:
    """To the millisecond and to the microsecond."""
    for _ in range(100):
        before = time.time_ns()
        made, micros = uuid.UUID(new_event_id()), now_micros()
        after = time.time_ns()
        assert before // 10**6 <= made.int >> 80 <= after // 10**6
        assert before // 10**3 <= micros <= after // 10**3


def test_the_same_is_random_in_ids_that_are_compiled_and_in_python() -> None:
    """What stands in the middle, and a count that begins anywhere."""
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


def test_ids_are_unique_and_sort_by_making() -> None:
    """Within a thread they increase, across threads none is equal; all of them look alike."""
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(some_ids, [20_000] * 8))
    assert all(part == sorted(part) for part in parts)
    ids = {one for part in parts for one in part}
    assert len(ids) == 160_000
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", one) for one in ids)


def some_ids(count: int) -> list[str]:
    return [new_event_id() for _ in range(count)]


def test_children_that_are_forked_while_threads_make_ids_make_others() -> None:
    """Each starts anew, before any code of the application runs in it."""
    parts: list[list[str]] = []
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            ours = [pool.submit(some_ids, 5000) for _ in range(4)]
            parts += [ids_of_a_child() for _ in range(3)]
            parts += [each.result() for each in ours]
    assert len({one for part in parts for one in part}) == 10 * (4 * 5000 + 3 * 100)


def ids_of_a_child() -> list[str]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, " ".join(some_ids(100)).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        made = pipe.read().split()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(made) == 100
    return made


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_processes_of_multiprocessing_make_different_ids(method: str) -> None:
    """However they begin; a fork server has the module already, and each of its children a copy of what is in it."""
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["pillarbox.event"])
    try:
        with ProcessPoolExecutor(4, mp_context=context) as pool:
            parts = [some_ids(1000), *pool.map(some_ids, [1000] * 8), some_ids(1000)]
    finally:
        if method == "forkserver":
            forkserver._forkserver._stop()  # type: ignore[attr-defined]
    assert len({one for part in parts for one in part}) == 10_000


@pytest.mark.parametrize("member", [name for name in MEMBERS if name != "occurred_at_micros"])
def test_a_member_of_the_wrong_type_is_named(member: str) -> None:
    """Where the event is built."""
    with pytest.raises(InvalidEventError) as caught:
        event(1, **{member: 5})
    assert caught.value.field == member


@pytest.mark.parametrize("value", [1.5, "1", None, True, 2**63, -(2**63) - 1])
def test_a_time_that_is_no_64_bit_integer_is_invalid(value: object) -> None:
    """Booleans are no numbers here."""
    with pytest.raises(InvalidEventError, match="occurred_at_micros"):
        event(1, occurred_at_micros=value)


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", '{"a": NaN}', "\x00", '"\\ud800"', "{} {}"])
def test_metadata_that_is_not_json_text_is_invalid(text: str) -> None:
    """It would be refused, or worse accepted, far from here."""
    with pytest.raises(InvalidEventError, match="metadata_json"):
        event(1, metadata_json=text)


@pytest.mark.parametrize("text", ["{}", '{"a":[1,2.5,null]}', "[]", '"é\u2028"', " {} ", Text('{"a":1}')])
def test_metadata_may_be_any_json_text(text: str) -> None:
    """Any JSON value, as it was written."""
    assert event(1, metadata_json=text).metadata_json == text


@pytest.mark.parametrize("member", MEMBERS[:8])
def test_a_subclass_of_text_is_text(member: str) -> None:
    """Though msgspec has no word for it."""
    encode = Codec(TrackingEvent).encode
    assert encode(event(1, **{member: Text("x")})) == encode(event(1, **{member: "x"}))


def test_an_own_type_may_have_a_subclass_of_text_too() -> None:
    """Anywhere."""
    own = Sample(Text("a"), extra={"t": [Text("b")]})
    assert Codec(Sample).encode(own) == b'{"event_id":"a","value":null,"count":0,"extra":{"t":["b"]}}'
    with pytest.raises(TypeError, match="object is unsupported"):
        Codec(Sample).encode(Sample("a", extra={"t": object()}))


def test_an_event_is_frozen() -> None:
    """What was checked stays so."""
    with pytest.raises(AttributeError):
        event(1).event_key = "other"  # type: ignore[misc]


def test_any_text_is_a_scope_kind_here() -> None:
    """Only a destination knows which it takes."""
    assert event(1, scope_kind="Galaxy").scope_kind == "Galaxy"


def refusal(make: Any) -> str | None:
    try:
        make()
    except InvalidEventError as error:
        return str(error)
    return None


SURROGATES = ["\ud800", "\udc00", "\ud800a", "\U0001f600\udfff", "aé\udbff"]
GOOD = ["", "a", "é", "\u2028", "\U0001f600", "{}", "{", '{"a":1}', '"\u2028"', *ScopeKind]
VALUES = st.sampled_from([*GOOD, *SURROGATES, None, 5, 0, -(2**63), 2**63, True, 1.5, b"{}"]) | st.text(max_size=3)


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=2))
def test_the_check_says_the_same_compiled_and_in_python(members: dict[str, Any]) -> None:
    """Of one or two members that may be wrong, whatever an application puts there."""
    whole = msgspec.structs.asdict(event(1)) | members
    plain = refusal(lambda: pillarbox.event._check_event(SimpleNamespace(**whole)))  # type: ignore[arg-type]
    assert refusal(lambda: TrackingEvent(**whole)) == plain


@pytest.mark.parametrize("member", MEMBERS[:9])
@pytest.mark.parametrize("text", SURROGATES)
def test_no_member_may_have_a_lone_surrogate(member: str, text: str) -> None:
    """UTF-8 has no bytes for it."""
    with pytest.raises(InvalidEventError) as caught:
        event(1, **{member: text})
    assert caught.value.field == member


class Visit(TrackingEvent, frozen=True, kw_only=True):
    """An application's own, made of ours."""

    page: str = "/"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.page.startswith("/"):
            raise InvalidEventError("page", "must begin with /")


def test_a_type_made_of_ours_is_checked_too() -> None:
    """With its own check behind ours."""
    members: dict[str, Any] = {"event_key": "k", "scope_kind": "Site", "scope_id": "s"}
    assert Visit(**members).page == "/"
    for member, value in (("page", "x"), ("user_id", 5), ("metadata_json", "{")):
        with pytest.raises(InvalidEventError) as caught:
            Visit(**members | {member: value})
        assert caught.value.field == member


compiled_only = pytest.mark.skipif(not COMPILED, reason="nothing is compiled here")


class Pair(msgspec.Struct):
    """The least that can be checked."""

    json: Any
    micros: Any

    @property
    def no_member(self) -> None:
        """Of the kind that stands somewhere in the event."""


@compiled_only
def test_the_compiled_check_leaves_what_it_does_not_know() -> None:
    """To the one in Python: other types, other ways to be called, before it is bound, and what is wrong."""
    from pillarbox._speedups import EventCheck

    asked: list[object] = []
    check = EventCheck(asked.append, msgspec.json.decode)
    good, bad, other = Pair("[1]", 1), Pair("[", 1), event(1)
    check(good)
    check.bind(Pair, (), (), "json", "micros")
    for one in (good, bad, other):
        check(one)
    assert asked == [good, bad, other]
    for wrong in ((), (good, good)):
        with pytest.raises(TypeError):
            check(*wrong)


@compiled_only
def test_an_interrupt_in_the_middle_of_a_check_is_an_interrupt() -> None:
    """Not a wrong member."""
    from pillarbox._speedups import EventCheck

    def interrupted(_text: str) -> None:
        raise KeyboardInterrupt

    check = EventCheck(lambda _event: pytest.fail("asked"), interrupted)
    check.bind(Pair, ("json",), (), "json", "micros")
    with pytest.raises(KeyboardInterrupt):
        check(Pair("[1]", 1))


class Wide(msgspec.Struct):
    """Its last member stands beyond the end of a `Pair`."""

    a: Any
    b: Any
    c: Any


@compiled_only
def test_what_is_no_member_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is bound wrongly would read beside the event."""
    from pillarbox import _speedups

    monkeypatch.setattr(Pair, "beyond", Wide.__dict__["c"], raising=False)
    wrong: list[Any] = [
        (Pair, ("no_member",), (), "json", "micros"),
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
def test_making_and_checking_leaks_nothing() -> None:
    """What is kept would show in the number of references."""
    text, metadata = "a text of its own", '{"a": 1}'

    def all_ways(count: int) -> None:
        for number in range(count):
            event(number, event_key=text, metadata_json=metadata)
            refusal(lambda: event(1, event_key=text, metadata_json="{"))
            refusal(lambda: event(1, scope_id=5, event_key=text))
            Visit(event_key=text, scope_kind="Site", scope_id=text)

    all_ways(1000)
    gc.collect()
    references = [sys.getrefcount(each) for each in (text, metadata, None.__class__, pillarbox.event._post_init)]
    all_ways(5000)
    gc.collect()
    assert references == [sys.getrefcount(each) for each in (text, metadata, None.__class__, pillarbox.event._post_init)]


def test_what_is_compiled_can_be_declined() -> None:
    """By the environment."""
    code = "from pillarbox import event; assert not event.COMPILED and event.TrackingEvent.__post_init__ is event._check_event"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PILLARBOX_PURE_PYTHON": "1"}, timeout=60)


class Sample(msgspec.Struct):
    """An application's own event type."""

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
def test_an_own_event_type_is_checked_at_the_door(bad: Sample) -> None:
    """Msgspec would write null for NaN, and checks no types when it encodes."""
    with pytest.raises((InvalidEventError, msgspec.ValidationError, UnicodeEncodeError)):
        Codec(Sample).encode(bad)


def test_an_own_event_type_goes_through_unchanged() -> None:
    """Numbers up to 64 bits, None and long digit strings are fine."""
    good = Sample("1" * 30, value=None, count=2**64 - 1, extra={"n": -(2**63), "t": "null"})
    assert msgspec.json.decode(Codec(Sample).encode(good), type=Sample) == good


def test_the_reason_names_the_field() -> None:
    """Where the encoder itself does not."""
    codec = Codec(Sample)
    bad = Sample("\ud800")
    with pytest.raises(UnicodeEncodeError) as caught:
        codec.encode(bad)
    assert codec.describe_error(bad, caught.value).startswith("event_id: ")


@pytest.mark.parametrize("kind", [int, dict, msgspec.defstruct("NoId", ["name"])])
def test_an_event_type_needs_an_event_id(kind: Any) -> None:
    """It is what makes a repeat harmless."""
    with pytest.raises(UsageError):
        Codec(kind)
