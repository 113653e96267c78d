"""The SpacetimeDB sink against a real standalone server 1.2.0."""

from __future__ import annotations

import asyncio
import enum
import gzip
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from pillarbox import Outbox, ScopeKind, TrackingEvent
from pillarbox.sinks import make_sink
from pillarbox.sinks.base import (
    Batch,
    Delivered,
    DeliveryResult,
    Misconfigured,
    PartialFailure,
    Rejected,
    Retry,
    UnconfirmedError,
)
from pillarbox.sinks.spacetimedb.responses import classify_response
from pillarbox.sinks.spacetimedb.scaffold import scaffold
from pillarbox.sinks.spacetimedb.sink import CALL_BYTES_MAX
from tests.conftest import event, existing_events
from tests.sinks.spacetimedb.server import ROOT, SpacetimeDbServer, deliver_batches, make_batch, run_check

GOOD = b'["%b","k",{"Site":[]},"s",null,null,null,null,"{}",5]'


class Note(msgspec.Struct, frozen=True):
    """Matches `record_notes` of the other module."""

    event_id: str
    text: str
    level: int


def notes(server: SpacetimeDbServer, **options: object) -> str:
    return server.sink_url("other", function="record_notes", **options)


def test_events_of_an_older_writer_arrive_unchanged(shared_server: SpacetimeDbServer, existing: Path, tmp_path: Path) -> None:
    """All 127."""
    with Outbox(str(existing), sink=shared_server.sink_url("events", confirm_wait=0.02)) as outbox:
        assert outbox.flush(60)
        assert outbox.stats().delivered == 127
    names = TrackingEvent.__struct_fields__
    rows = shared_server.rows("events", f"SELECT {', '.join(names)} FROM tracking_event")
    rows_by_id = {row[0]: dict(zip(names, map(plain_value, row), strict=True)) for row in rows}
    for one in existing_events():
        assert rows_by_id[str(one["event_id"])] == one


def plain_value(value: Any) -> Any:
    """Convert a cell of a query's result: options and variants are `[position, value]`."""
    match value:
        case [0, str(text)]:
            return text
        case [1, []]:
            return None
        case [int(position), []]:
            return list(ScopeKind)[position].value
        case _:
            return value


def test_a_variant_without_data_at_position_1_is_not_an_empty_option(shared_server: SpacetimeDbServer) -> None:
    """`plain_value` cannot tell these apart; `Module` is stored as such."""
    url = shared_server.sink_url("events", confirm_wait=0)
    events = [event(index, event_id=f"kind-{kind}", scope_kind=kind) for index, kind in enumerate(ScopeKind)]
    results, confirmed = deliver_batches(url, make_batch(*events))
    assert (results, confirmed) == ([Delivered(4)], True)
    rows = shared_server.rows("events", "SELECT event_id, scope_kind FROM tracking_event")
    kinds = {row[0]: row[1] for row in rows if row[0].startswith("kind-")}
    assert kinds == {f"kind-{kind}": [index, []] for index, kind in enumerate(ScopeKind)}


def test_64_bit_integers_and_any_text_are_stored_exactly(shared_server: SpacetimeDbServer) -> None:
    """The ends of the range, and text that JSON escapes."""
    url = shared_server.sink_url("events", confirm_wait=0)
    events = [
        event(1, event_id="int-least", occurred_at_micros=-(2**63)),
        event(
            1, event_id="int-most", occurred_at_micros=2**63 - 1, metadata_json='{"a":"\\u2028\\"\\n"}', user_id="\x00\u2028🎮"
        ),
    ]
    assert deliver_batches(url, make_batch(*events))[0] == [Delivered(2)]
    query = "SELECT event_id, occurred_at_micros, metadata_json, user_id FROM tracking_event"
    rows_by_id = {row[0]: row[1:] for row in shared_server.rows("events", query)}
    assert rows_by_id["int-least"][0] == -(2**63)
    assert rows_by_id["int-most"] == [2**63 - 1, '{"a":"\\u2028\\"\\n"}', [0, "\x00\u2028🎮"]]


def test_a_batch_that_is_sent_twice_is_stored_once(shared_server: SpacetimeDbServer) -> None:
    """The function skips events that the table has."""
    one = make_batch(event(1, event_id="twice"))
    assert deliver_batches(shared_server.sink_url("events", confirm_wait=0), one, one)[0] == [Delivered(1)] * 2
    assert shared_server.stored_event_ids("events").count("twice") == 1


# The arguments that are sent, and the status with which a real server responds.
ROWS: list[tuple[str, bytes, int, type[Any]]] = [
    ("good", b"[[" + GOOD % b"row" + b"]]", 200, Delivered),
    ("options by name", b'[[["r2","k",{"Site":{}},"s",{"none":[]},{"some":"x"},[0,"y"],[1,[]],"{}",5]]]', 200, Delivered),
    ("variant by position", b'[[["r3","k",{"0":[]},"s",null,null,null,null,"{}",5]]]', 200, Delivered),
    ("missing field", b'[[["a","k",{"Site":[]},"s",null,null,null,null,"{}"]]]', 400, PartialFailure),
    ("extra field", b'[[["a","k",{"Site":[]},"s",null,null,null,null,"{}",5,6]]]', 400, PartialFailure),
    ("misconfiguration type", b'[[["a",7,{"Site":[]},"s",null,null,null,null,"{}",5]]]', 400, PartialFailure),
    ("integer as text", b'[[["a","k",{"Site":[]},"s",null,null,null,null,"{}","5"]]]', 400, PartialFailure),
    ("integer as float", b'[[["a","k",{"Site":[]},"s",null,null,null,null,"{}",5.5]]]', 400, PartialFailure),
    ("bare option", b'[[["a","k",{"Site":[]},"s","x",null,null,null,"{}",5]]]', 400, PartialFailure),
    ("bare variant", b'[[["a","k","Site","s",null,null,null,null,"{}",5]]]', 400, PartialFailure),
    ("unknown variant", b'[[["a","k",{"Nope":[]},"s",null,null,null,null,"{}",5]]]', 400, PartialFailure),
    ("not the list", b"[5]", 400, Misconfigured),
    ("broken JSON", b"[[", 400, Misconfigured),
    ("rejected by the function", b"[[" + GOOD % b"" + b"]]", 530, PartialFailure),
]


@pytest.mark.parametrize(("body", "status", "kind"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_the_servers_response_to_a_body_is_classified(
    shared_server: SpacetimeDbServer, body: bytes, status: int, kind: type[Any]
) -> None:
    """Row by row."""
    response = shared_server.call("events", "record_tracking_events", body)
    assert response.status == status, response.excerpt
    result = classify_response(response, "record_tracking_events", [7], "nothing")
    assert type(result) is kind
    if isinstance(result, PartialFailure):
        assert result.rejected.keys() == {7}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content_Type": "application/json; charset=utf-8"}, 415),
        ({"Content_Type": "text/plain"}, 415),
        ({"Authorization": "Bearer garbage"}, 401),
        ({"Authorization": "Bearer " + "eyJhbGciOiJFUzI1NiJ9." * 2 + "x"}, 401),
        ({"Content_Type": ""}, 400),
        ({"Content_Encoding": "gzip"}, 400),
    ],
)
def test_the_servers_response_to_wrong_headers_is_a_misconfiguration(
    shared_server: SpacetimeDbServer, headers: dict[str, str], status: int
) -> None:
    """Row by row."""
    body = gzip.compress(b"[[]]") if "Content_Encoding" in headers else b"[[]]"
    response = shared_server.call("events", "record_tracking_events", body, **headers)
    assert response.status == status
    assert isinstance(classify_response(response, "f", [0], "nothing"), Misconfigured)


def test_calls_of_2_mib_are_accepted_and_one_byte_more_is_not(shared_server: SpacetimeDbServer) -> None:
    """The sink rejects larger calls itself, so that delivery halves them."""
    empty = b'[[["big","k",{"Site":[]},"s",null,null,null,null,"%b",5]]]'
    body = empty % (b"x" * (CALL_BYTES_MAX - len(empty) + 2))
    assert len(body) == CALL_BYTES_MAX
    assert shared_server.call("events", "record_tracking_events", body).status == 200
    response = shared_server.call("events", "record_tracking_events", body + b" ")
    assert response.status == 413
    assert isinstance(classify_response(response, "f", [0, 1], "nothing"), Rejected)


def test_a_far_larger_call_is_cut_off_or_rejected(shared_server: SpacetimeDbServer) -> None:
    """10 MiB: the server closes the connection, or its 413 can still be read. The sink never sends such a call."""
    try:
        status = shared_server.call("events", "record_tracking_events", b"[" * (10 * 2**20)).status
    except OSError:
        status = 413
    assert status == 413


def test_a_batch_that_is_too_large_is_split_and_an_event_that_is_becomes_a_dead_letter(
    shared_server: SpacetimeDbServer, tmp_path: Path
) -> None:
    """The other events arrive."""
    directory = tmp_path / "box"
    with Outbox(str(directory), batch_bytes=10**8, flush_interval=60) as outbox:
        assert all(outbox.enqueue(event(n, event_id=f"large-{n}", metadata_json=json.dumps("x" * 200_000))) for n in range(30))
    (sealed,) = directory.glob("sealed-*")
    # Larger than an outbox accepts; an older writer may have stored it.
    huge = msgspec.json.encode(event(1, event_id="huge", metadata_json=json.dumps("x" * CALL_BYTES_MAX)))
    sealed.write_bytes(sealed.read_bytes() + b'{"event":' + huge + b"}\n")
    with Outbox(str(directory), sink=shared_server.sink_url("events", confirm_wait=0)) as outbox:
        assert outbox.flush(60)
        assert (outbox.stats().delivered, outbox.stats().dead) == (30, 1)
    (dead,) = directory.glob("dead-*")
    dead_letter = json.loads(dead.read_bytes())
    assert (dead_letter["code"], dead_letter["event"]["event_id"]) == ("too_large", "huge")
    assert {f"large-{n}" for n in range(30)} <= set(shared_server.stored_event_ids("events"))


def test_a_rejected_event_becomes_a_dead_letter_and_the_others_arrive(shared_server: SpacetimeDbServer, tmp_path: Path) -> None:
    """By the index in the error; text that is not a variant is rejected without a call."""
    directory = tmp_path / "box"
    with Outbox(str(directory), sink=shared_server.sink_url("events", confirm_wait=0)) as outbox:
        events = [event(n, event_id=f"mixed-{n}") for n in range(20)]
        events[3] = event(3, event_id="mixed-3", event_key="")
        events[9] = event(9, event_id="mixed-9", scope_kind="Planet")
        events[15] = event(15, event_id="mixed-15", scope_id="")
        assert all(outbox.enqueue_many(events))
        assert outbox.flush(60)
        assert (outbox.stats().delivered, outbox.stats().dead) == (17, 3)
    (dead,) = directory.glob("dead-*")
    dead_letters = [json.loads(line) for line in dead.read_bytes().splitlines()]
    assert [(one["event"]["event_id"], one["code"]) for one in dead_letters] == [
        ("mixed-3", "refused_by_function"),
        ("mixed-9", "unknown_variant"),
        ("mixed-15", "refused_by_function"),
    ]
    assert dead_letters[0]["reason"] == "event_key: must not be empty"
    assert {f"mixed-{n}" for n in range(20)} & set(shared_server.stored_event_ids("events")) == {
        f"mixed-{n}" for n in set(range(20)) - {3, 9, 15}
    }


@pytest.mark.parametrize("text", ["panic", "refuse"])
def test_a_panic_or_an_error_without_an_index_is_found_by_halving(
    shared_server: SpacetimeDbServer, tmp_path: Path, text: str
) -> None:
    """One poisoned event of 64 is the only dead letter."""
    url = notes(shared_server, confirm_wait=0)
    with Outbox(str(tmp_path / "box"), sink=url, event_type=Note) as outbox:
        rows = [Note(f"{text}-{n}", text if n == 41 else "fine", n) for n in range(64)]
        assert all(outbox.enqueue_many(rows))
        assert outbox.flush(60)
        assert (outbox.stats().delivered, outbox.stats().dead) == (63, 1)
    (dead,) = (tmp_path / "box").glob("dead-*")
    assert json.loads(dead.read_bytes())["event"]["event_id"] == f"{text}-41"


def test_a_number_out_of_a_columns_range_rejects_its_event(shared_server: SpacetimeDbServer) -> None:
    """u8, with 255 and 256."""
    results, _ = deliver_batches(
        notes(shared_server, confirm_wait=0), make_batch(Note("u8-255", "t", 255), Note("u8-256", "t", 256)), event_type=Note
    )
    (result,) = results
    assert isinstance(result, PartialFailure)
    assert (result.rejected[1].code, result.accepted) == ("out_of_range", 1)


def misconfiguration(change: Callable[[SpacetimeDbServer], str], *words: str, state: str = "stopped") -> Any:
    return pytest.param(change, words, state, id=" ".join(words[0].split()[:4]))


@pytest.mark.parametrize(
    ("url_of", "words", "state"),
    [
        misconfiguration(lambda server: server.sink_url("nowhere"), "no such database", "publish"),
        misconfiguration(
            lambda server: server.sink_url("events", function="nope"),
            "no function nope",
            "its functions: record_tracking_events",
        ),
        misconfiguration(lambda server: server.sink_url("other", function="other_arguments"), "takes u32, String", "Vec<...>"),
        misconfiguration(
            lambda server: server.sink_url("other", function="lacks_profile"),
            "scope_kind",
            "no variant PROFILE",
            "Site, Module",
        ),
        misconfiguration(lambda server: server.sink_url("other", function="record_notes"), "event_key", "values would be lost"),
        misconfiguration(lambda server: server.sink_url("events").replace(server.token, "not-a-token"), "401", "token"),
        misconfiguration(
            lambda server: server.sink_url("events").replace(f":{server.port}/", ":1/"),
            "cannot connect to",
            "host and port",
            state="waiting",
        ),
        misconfiguration(
            lambda server: server.sink_url("events").replace("127.0.0.1", "no-such-host.invalid"),
            "cannot connect to",
            state="waiting",
        ),
    ],
)
def test_a_misconfiguration_is_reported_everywhere_and_no_event_is_lost(
    shared_server: SpacetimeDbServer,
    tmp_path: Path,
    url_of: Callable[[SpacetimeDbServer], str],
    words: tuple[str, ...],
    state: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In check, state and log; without dead letters and without showing a secret."""
    url = url_of(shared_server)
    (*_, check) = run_check(url)
    assert not check.ok
    with Outbox(str(tmp_path / "box"), sink=url) as outbox:
        assert outbox.enqueue(event(1))
        assert not outbox.flush(0.5)
        stats = outbox.stats()
    assert stats.state.name == state
    for word in words:
        assert word in check.message
        assert word in stats.state.reason
        assert word in caplog.text
    assert shared_server.token not in caplog.text + check.message + repr(outbox) + str(stats)
    assert (stats.dead, stats.pending_files) == (0, 1)


def test_a_token_of_another_server_stops_delivery_and_loses_no_event(
    shared_server: SpacetimeDbServer, own_server: SpacetimeDbServer, tmp_path: Path
) -> None:
    """Until a person corrects it."""
    url = shared_server.sink_url("events").replace(shared_server.token, own_server.token)
    with Outbox(str(tmp_path / "box"), sink=url) as outbox:
        outbox.enqueue(event(1, event_id="foreign-token"))
        assert not outbox.flush(0.5)
        assert outbox.stats().state.name == "stopped"
        assert "401" in outbox.stats().last_error
    with Outbox(str(tmp_path / "box"), sink=shared_server.sink_url("events", confirm_wait=0)) as outbox:
        assert outbox.flush(60)
    assert "foreign-token" in shared_server.stored_event_ids("events")


def test_a_missing_token_is_logged_once(
    shared_server: SpacetimeDbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Delivery works; each call has its own identity."""
    url = f"spacetimedb://127.0.0.1:{shared_server.port}/events?confirm_wait=0"
    with Outbox(str(tmp_path / "box"), sink=url, batch_size=1) as outbox:
        assert all(outbox.enqueue(event(n, event_id=f"no-token-{n}")) for n in range(3))
        assert outbox.flush(60)
    assert len([entry for entry in caplog.records if "no token is set" in entry.message]) == 1


def test_a_server_killed_after_a_200_confirms_nothing(own_server: SpacetimeDbServer) -> None:
    """It runs again when it is asked, but the connection is another one."""

    def crash() -> None:
        own_server.kill()
        own_server.start()

    url = own_server.sink_url("events", confirm_wait=0)
    results, confirmed = deliver_batches(url, make_batch(event(1)), before_confirm=crash)
    assert (results, confirmed) == ([Delivered(1)], False)


def test_batches_that_a_killed_server_accepted_are_sent_again(own_server: SpacetimeDbServer, tmp_path: Path) -> None:
    """Killed three times during a backlog; each event is stored once."""
    with Outbox(str(tmp_path / "box"), batch_size=100) as outbox:
        assert all(outbox.enqueue(event(n)) for n in range(20_000))
    with Outbox(str(tmp_path / "box"), sink=own_server.sink_url("events", confirm_wait=0.1)) as outbox:
        outbox.flush(0.3)
        for _ in range(3):
            own_server.kill()
            own_server.start()
            outbox.flush(0.3)
        assert outbox.flush(60)
        assert outbox.stats().dead == 0
    rows_by_id = own_server.stored_event_ids("events")
    assert len(rows_by_id) == len(set(rows_by_id)) == 20_000


def test_a_module_that_changes_during_delivery_is_used(own_server: SpacetimeDbServer, tmp_path: Path) -> None:
    """The database is deleted and published again with text in place of the enum; no event is rejected."""
    module = scaffolded(TrackingEvent, tmp_path)

    async def run() -> list[DeliveryResult]:
        sink = make_sink(own_server.sink_url("events", confirm_wait=0), TrackingEvent)
        results = [await sink.deliver(make_batch(event(1)))]
        assert own_server.request("DELETE", "/v1/database/events", Authorization=f"Bearer {own_server.token}")[0] == 200
        results.append(await sink.deliver(make_batch(event(2))))
        own_server.publish("events", module)
        results.append(await sink.deliver(make_batch(event(2))))
        await sink.close()
        return results

    first, gone, back = asyncio.run(run())
    assert (first, back) == (Delivered(1), Delivered(1))
    assert isinstance(gone, Misconfigured)
    assert own_server.rows("events", "SELECT event_id, scope_kind FROM tracking_event") == [["e-000002", "Site"]]


def test_a_replaced_module_is_noticed_at_the_first_error(own_server: SpacetimeDbServer, tmp_path: Path) -> None:
    """A call that was prepared for the old one is prepared again."""
    module = scaffolded(TrackingEvent, tmp_path)

    async def run() -> list[DeliveryResult]:
        sink = make_sink(own_server.sink_url("events", confirm_wait=0), TrackingEvent)
        results = [await sink.deliver(make_batch(event(1)))]
        assert own_server.request("DELETE", "/v1/database/events", Authorization=f"Bearer {own_server.token}")[0] == 200
        own_server.publish("events", module)
        one = make_batch(event(2))
        sink.prepare(one)
        results += [await sink.deliver(one), await sink.deliver(one)]
        await sink.close()
        return results

    first, noticed, again = asyncio.run(run())
    assert (first, again) == (Delivered(1), Delivered(1))
    assert noticed == Retry("the module's schema has changed; the sink uses the new schema")


def scaffolded(event_type: type[msgspec.Struct], folder: Path) -> bytes:
    """The module that `scaffold` prints, built."""
    crate = folder / "crate"
    shutil.copytree(ROOT / "tests/data/other-module", crate)
    (crate / "src/lib.rs").write_text(scaffold(event_type, 1))
    subprocess.run([ROOT / "modules/spacetimedb/build", folder, crate], check=True)
    return (folder / "module.wasm").read_bytes()


def test_an_unreachable_server_is_a_retry_that_says_what_to_check(own_server: SpacetimeDbServer) -> None:
    """The server is killed."""
    own_server.kill()
    results, _ = deliver_batches(own_server.sink_url("events"), make_batch(event(1)))
    (result,) = results
    assert isinstance(result, Retry)
    assert "check that the server is running" in result.reason


class Colour(enum.Enum):
    """An event field that becomes a Rust enum."""

    RED = "red"
    DARK_BLUE = "dark-blue"


class Spot(msgspec.Struct, frozen=True):
    """An event field that becomes a Rust struct."""

    x: int
    y: float


class Level(enum.IntEnum):
    """An event field that becomes a number."""

    LOW = 1
    HIGH = 2


class PageView(msgspec.Struct, frozen=True):
    """An event type with every kind of column."""

    event_id: str
    colour: Colour
    spots: list[Spot]
    type: str
    at: datetime
    maybe: Colour | None = None
    tags: list[str] = []
    extra: dict[str, int] = {}
    seen: bool = False
    level: Level = Level.LOW
    kind: Literal["a", "b"] = "a"
    step: Literal[1, 2] = 1
    raw: bytes = b""


def test_a_scaffolded_module_compiles_and_accepts_the_events(own_server: SpacetimeDbServer, tmp_path: Path) -> None:
    """With enums, lists, structs, options, Rust keywords, and JSON text for all other types."""
    own_server.publish("views", scaffolded(PageView, tmp_path))
    url = own_server.sink_url("views", function="record_page_views", confirm_wait=0)
    assert all(check.ok for check in run_check(url, PageView))
    noon = datetime(2026, 11, 24, 12, 0, 0, 5, tzinfo=UTC)
    spots = [Spot(1, 2.5), Spot(-1, 0.0)]
    views = [
        PageView(
            "v-1",
            Colour.RED,
            spots,
            "t",
            noon,
            Colour.DARK_BLUE,
            ["a", "é"],
            {"n": 1},
            bool(1),
            Level.HIGH,
            "b",
            2,
            b"\x00\xff",
        ),
        PageView("v-2", Colour.DARK_BLUE, [], "", noon),
    ]
    assert deliver_batches(url, make_batch(*views), event_type=PageView)[0] == [Delivered(2)]
    micros = int(noon.timestamp()) * 1_000_000 + 5
    rows = sorted(own_server.rows("views", "SELECT * FROM page_view"))
    assert [[cell if cell != [micros] else "noon" for cell in row] for row in rows] == [
        ["v-1", [0, []], [[1, 2.5], [-1, 0.0]], "t", "noon", [0, [1, []]], ["a", "é"], '{"n":1}', True, 2, "b", 2, "00ff"],
        ["v-2", [1, []], [], "", "noon", [1, []], [], "{}", False, 1, "a", 1, ""],
    ]


def test_a_file_that_is_sent_in_parts_is_confirmed(shared_server: SpacetimeDbServer, tmp_path: Path) -> None:
    """The parts are sent at different times, so not all are due for confirmation at once."""
    with Outbox(str(tmp_path / "box"), sink=shared_server.sink_url("events", confirm_wait=0.05)) as outbox:
        rows = [event(n, event_id=f"part-{n}", event_key="" if n % 4 == 0 else "k") for n in range(500)]
        assert all(outbox.enqueue_many(rows))
        assert outbox.flush(60)
        assert (outbox.stats().delivered, outbox.stats().dead, outbox.stats().failed_flushes) == (375, 125, 0)


def test_a_batch_of_rejected_events_makes_no_call(shared_server: SpacetimeDbServer) -> None:
    """No record is left to send."""
    results, confirmed = deliver_batches(
        shared_server.sink_url("events", confirm_wait=0), make_batch(event(1, scope_kind="Planet"))
    )
    assert isinstance(results[0], PartialFailure)
    assert (results[0].accepted, confirmed) == (0, True)
    junk = Batch("sealed-j", [b"5", b'{"event_id":1}'])
    (result,) = deliver_batches(shared_server.sink_url("events", confirm_wait=0), junk)[0]
    assert isinstance(result, PartialFailure)
    assert {rejection.code for rejection in result.rejected.values()} == {"wrong_type"}


def test_batches_accepted_over_closed_connections_are_not_confirmed(shared_server: SpacetimeDbServer) -> None:
    """As after a change of the token: no connection is left to confirm them."""

    async def run() -> None:
        sink = make_sink(shared_server.sink_url("events"), TrackingEvent)
        sent, later = make_batch(event(1, event_id="closed-1")), make_batch(event(2, event_id="closed-2"), batch_id="sealed-b")
        assert isinstance(await sink.deliver(sent), Delivered)
        await sink.close()
        with pytest.raises(UnconfirmedError):
            await sink.confirm([sent])
        assert isinstance(await sink.deliver(sent), Delivered)
        assert isinstance(await sink.deliver(later), Delivered)
        left = [sent, later]
        while left:
            left = left[await sink.confirm(left) :]
        await sink.close()

    asyncio.run(run())


def test_no_secret_is_written(shared_server: SpacetimeDbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither to the heartbeat, nor to dead letters, nor to the log at DEBUG."""
    caplog.set_level(logging.DEBUG)
    directory = tmp_path / "box"
    with Outbox(str(directory), sink=shared_server.sink_url("events", confirm_wait=0)) as outbox:
        outbox.enqueue(event(1, event_id="secret-1", event_key=""))
        outbox.enqueue(event(2, event_id="secret-2"))  # a rejected event alone would be deferred until another is accepted
        assert outbox.flush(60)
        assert outbox.stats().dead == 1
    text = b"".join(file.read_bytes() for file in directory.iterdir())
    assert b"spacetimedb://127.0.0.1" in text
    assert shared_server.token.encode() not in text
    assert not re.search(rb"eyJ[A-Za-z0-9_-]{10}", text)
    assert "asyncio" in {entry.name.partition(".")[0] for entry in caplog.records}
    assert shared_server.token not in caplog.text


def test_a_delivery_logs_no_line_per_call(
    shared_server: SpacetimeDbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither from Pillarbox nor from a library."""
    caplog.set_level(logging.INFO)
    with Outbox(str(tmp_path / "box"), sink=shared_server.sink_url("events", confirm_wait=0), batch_size=1) as outbox:
        for number in range(30):
            outbox.enqueue(event(number, event_id=f"quiet-{number}"))
        assert outbox.flush(60)
    assert len(caplog.records) < 5
