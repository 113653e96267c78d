"""Behaviour that only servers 2.x have, against a fake server that replays recorded responses; see `fake_server.py`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillarbox import Outbox, ScopeKind
from pillarbox.sinks.base import Delivered, Misconfigured, PartialFailure, Rejected
from pillarbox.sinks.spacetimedb import publish
from tests.conftest import event
from tests.sinks.spacetimedb.fake_server import FUNCTION, FakeServer28
from tests.sinks.spacetimedb.server import SpacetimeDbServer, deliver_batches, make_batch, run_check

COUNTED = f"{FUNCTION}_counted"


@pytest.fixture
def fake_server(shared_server: SpacetimeDbServer) -> Iterator[FakeServer28]:
    """A fake 2.x server with the schema that the real server has for our module."""
    status, schema = shared_server.request("GET", "/v1/database/events/schema?version=9")
    assert status == 200
    server = FakeServer28(json.loads(schema))
    try:
        yield server
    finally:
        server.stop()


def test_one_query_confirms_all_batches_of_a_connection(fake_server: FakeServer28) -> None:
    """Without waiting."""
    url = fake_server.sink_url(connections=1, confirm_wait=3600)
    results, confirmed = deliver_batches(url, *(make_batch(event(n), batch_id=f"sealed-{n}") for n in range(5)))
    assert (results, confirmed, fake_server.confirm_count) == ([Delivered(1)] * 5, True, 1)


def test_variants_in_camel_case_match(fake_server: FakeServer28) -> None:
    """Variants are sent by position."""
    assert all(check.ok for check in run_check(fake_server.sink_url()))
    results, _ = deliver_batches(
        fake_server.sink_url(), make_batch(*(event(n, event_id=kind, scope_kind=kind) for n, kind in enumerate(ScopeKind)))
    )
    assert results == [Delivered(4)]
    assert [fake_server.stored_rows[kind][2] for kind in ScopeKind] == [{str(n): []} for n in range(4)]


@pytest.mark.parametrize("function", [COUNTED, "count_only"])
def test_a_procedures_count_gives_the_duplicates(fake_server: FakeServer28, function: str) -> None:
    """As a number or in a Result."""
    url = fake_server.sink_url(function=function)
    assert deliver_batches(url, make_batch(event(1), event(2)))[0] == [Delivered(2, 0)]
    assert deliver_batches(url, make_batch(event(2), event(3), event(4)))[0] == [Delivered(3, 1)]


def test_an_error_in_a_procedures_result_rejects_the_named_event(fake_server: FakeServer28) -> None:
    """Although the status is 200."""
    (result,) = deliver_batches(fake_server.sink_url(function=COUNTED), make_batch(event(1), event(2, event_id="")))[0]
    assert isinstance(result, PartialFailure)
    assert {index: rejection.reason for index, rejection in result.rejected.items()} == {1: "event_id: must not be empty"}


@pytest.mark.parametrize("function", [FUNCTION, COUNTED])
def test_a_panic_rejects_the_batch(fake_server: FakeServer28, function: str) -> None:
    """The status is 530 from a reducer and 500 from a procedure."""
    (result,) = deliver_batches(fake_server.sink_url(function=function), make_batch(event(1, event_key="panic")))[0]
    assert isinstance(result, Rejected)


def test_an_unknown_function_database_or_token_is_a_misconfiguration(fake_server: FakeServer28) -> None:
    """With the messages of 2.x."""
    for url in (fake_server.sink_url(function="nope"), fake_server.sink_url(token="another"), fake_server.sink_url("nowhere")):  # noqa: S106
        (result,) = deliver_batches(url, make_batch(event(1)))[0]
        assert isinstance(result, Misconfigured), url


def test_check_shows_the_version_and_how_batches_are_confirmed(fake_server: FakeServer28) -> None:
    """It also shows the kind of function."""
    text = " ".join(check.message for check in run_check(fake_server.sink_url(function=COUNTED)))
    assert "SpacetimeDB 2.8.3" in text
    assert "a query confirms" in text
    assert f"procedure {COUNTED}" in text


def test_a_whole_backlog_is_delivered(fake_server: FakeServer28, tmp_path: Path) -> None:
    """Many batches, each confirmed, none called twice."""
    with Outbox(str(tmp_path / "box"), sink=fake_server.sink_url(function=COUNTED), batch_size=10) as outbox:
        assert all(outbox.enqueue(event(n)) for n in range(1000))
        assert outbox.flush(60)
        assert (outbox.stats().delivered, outbox.stats().duplicates) == (1000, 0)
    assert len(fake_server.stored_rows) == 1000
    assert fake_server.confirm_count >= 1


def test_publish_uploads_the_module_for_2x(fake_server: FakeServer28) -> None:
    """By the version that the server reports."""

    async def run() -> publish.PublishResult:
        _, token = await publish.new_identity(f"http://127.0.0.1:{fake_server.port}")
        return await publish.publish(f"http://127.0.0.1:{fake_server.port}", "fresh", token)

    assert asyncio.run(run()).action == "created"
    assert fake_server.published_modules == {"fresh": publish.read_wasm("tracking_event_v2.wasm")}


def test_a_batch_is_sent_again_if_the_query_fails(fake_server: FakeServer28, tmp_path: Path) -> None:
    """The state names the reason."""
    fake_server.confirm_response = (503, b"not now", "text/plain")
    with Outbox(str(tmp_path / "box"), sink=fake_server.sink_url()) as outbox:
        outbox.enqueue(event(1))
        assert not outbox.flush(0.5)
        assert "the server responded to the confirming query with 503: not now" in outbox.stats().last_error
        assert outbox.stats().pending_files == 1
        fake_server.confirm_response = (200, b"[]", "application/json")
        assert outbox.flush(60)
    assert fake_server.call_count > 1


def test_a_forbidden_query_stops_delivery_and_fails_check(fake_server: FakeServer28, tmp_path: Path) -> None:
    """No file is deleted for a batch that cannot be confirmed."""
    fake_server.confirm_response = (403, b"no queries here", "text/plain")
    assert [check.message for check in run_check(fake_server.sink_url()) if not check.ok] == [
        "the server responded to the confirming query with 403: no queries here; allow it"
    ]
    with Outbox(str(tmp_path / "box"), sink=fake_server.sink_url()) as outbox:
        outbox.enqueue(event(1))
        assert not outbox.flush(0.5)
        assert outbox.stats().state.name == "stopped"
        assert outbox.stats().pending_files == 1


def test_a_query_on_another_connection_confirms_nothing(fake_server: FakeServer28) -> None:
    """Another server process may respond there."""
    port = fake_server.port

    def restart() -> None:
        fake_server.stop()
        fake_server.start(port)

    assert deliver_batches(fake_server.sink_url(), make_batch(event(1)), before_confirm=restart) == ([Delivered(1)], False)
