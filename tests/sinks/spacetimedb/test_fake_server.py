"""What only servers 2.x do, against a stand-in that answers as one was recorded to; see `stand_in.py`."""

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
def stand_in(shared_server: SpacetimeDbServer) -> Iterator[FakeServer28]:
    """With the real server's description of our module."""
    status, schema = shared_server.request("GET", "/v1/database/events/schema?version=9")
    assert status == 200
    server = FakeServer28(json.loads(schema))
    try:
        yield server
    finally:
        server.stop()


def test_a_query_confirms_all_batches_in_flight_at_once(stand_in: FakeServer28) -> None:
    """One query for a connection, and no waiting."""
    url = stand_in.sink_url(connections=1, confirm_wait=3600)
    answers, sure = deliver_batches(url, *(make_batch(event(n), batch_id=f"sealed-{n}") for n in range(5)))
    assert (answers, sure, stand_in.confirm_count) == ([Delivered(1)] * 5, True, 1)


def test_variants_in_camel_case_fit(stand_in: FakeServer28) -> None:
    """They go by position, so that neither spelling is sent."""
    assert all(finding.ok for finding in run_check(stand_in.sink_url()))
    answers, _ = deliver_batches(
        stand_in.sink_url(), make_batch(*(event(n, event_id=kind, scope_kind=kind) for n, kind in enumerate(ScopeKind)))
    )
    assert answers == [Delivered(4)]
    assert [stand_in.stored_rows[kind][2] for kind in ScopeKind] == [{str(n): []} for n in range(4)]


@pytest.mark.parametrize("function", [COUNTED, "count_only"])
def test_a_procedures_count_tells_the_duplicates(stand_in: FakeServer28, function: str) -> None:
    """Whether it comes as a number or as a Result."""
    url = stand_in.sink_url(function=function)
    assert deliver_batches(url, make_batch(event(1), event(2)))[0] == [Delivered(2, 0)]
    assert deliver_batches(url, make_batch(event(2), event(3), event(4)))[0] == [Delivered(3, 1)]


def test_an_error_in_a_procedures_result_is_a_refusal_although_the_status_is_200(stand_in: FakeServer28) -> None:
    """And names the event."""
    (answer,) = deliver_batches(stand_in.sink_url(function=COUNTED), make_batch(event(1), event(2, event_id="")))[0]
    assert isinstance(answer, PartialFailure)
    assert {index: refusal.reason for index, refusal in answer.rejected.items()} == {1: "event_id: must not be empty"}


@pytest.mark.parametrize("function", [FUNCTION, COUNTED])
def test_a_panic_refuses_the_call(stand_in: FakeServer28, function: str) -> None:
    """530 from a reducer, 500 from a procedure."""
    (answer,) = deliver_batches(stand_in.sink_url(function=function), make_batch(event(1, event_key="panic")))[0]
    assert isinstance(answer, Rejected)


def test_an_unknown_function_or_token_is_the_set_ups_fault(stand_in: FakeServer28) -> None:
    """With the texts of 2.x."""
    for url in (stand_in.sink_url(function="nope"), stand_in.sink_url(token="another"), stand_in.sink_url("nowhere")):  # noqa: S106
        (answer,) = deliver_batches(url, make_batch(event(1)))[0]
        assert isinstance(answer, Misconfigured), url


def test_the_version_is_shown_by_check(stand_in: FakeServer28) -> None:
    """And how it confirms."""
    text = " ".join(finding.message for finding in run_check(stand_in.sink_url(function=COUNTED)))
    assert "SpacetimeDB 2.8.3" in text
    assert "a query confirms" in text
    assert f"procedure {COUNTED}" in text


def test_a_whole_outbox_drains_into_it(stand_in: FakeServer28, tmp_path: Path) -> None:
    """Many batches, each confirmed, none called twice."""
    with Outbox(str(tmp_path / "box"), sink=stand_in.sink_url(function=COUNTED), batch_size=10) as outbox:
        assert all(outbox.enqueue(event(n)) for n in range(1000))
        assert outbox.flush(60)
        assert (outbox.stats().delivered, outbox.stats().duplicates) == (1000, 0)
    assert len(stand_in.stored_rows) == 1000
    assert stand_in.confirm_count >= 1


def test_publish_takes_the_module_for_2x(stand_in: FakeServer28) -> None:
    """By the version that the server says."""

    async def run() -> publish.PublishResult:
        _, token = await publish.new_identity(f"http://127.0.0.1:{stand_in.port}")
        return await publish.publish(f"http://127.0.0.1:{stand_in.port}", "fresh", token)

    assert asyncio.run(run()).action == "made"
    assert stand_in.published_modules == {"fresh": publish.read_wasm("tracking_event_v2.wasm")}


def test_a_batch_is_sent_again_where_the_query_fails(stand_in: FakeServer28, tmp_path: Path) -> None:
    """And the reason is told."""
    stand_in.confirm_response = (503, b"not now", "text/plain")
    with Outbox(str(tmp_path / "box"), sink=stand_in.sink_url()) as outbox:
        outbox.enqueue(event(1))
        assert not outbox.flush(0.5)
        assert "the confirming query was answered with 503: not now" in outbox.stats().last_error
        assert outbox.stats().pending_files == 1
        stand_in.confirm_response = (200, b"[]", "application/json")
        assert outbox.flush(60)
    assert stand_in.call_count > 1


def test_a_query_that_is_not_allowed_stops_delivery_and_is_found_by_check(stand_in: FakeServer28, tmp_path: Path) -> None:
    """Nothing is removed for a batch that cannot be confirmed."""
    stand_in.confirm_response = (403, b"no queries here", "text/plain")
    assert [finding.message for finding in run_check(stand_in.sink_url()) if not finding.ok] == [
        "the confirming query was answered with 403: no queries here; let it pass"
    ]
    with Outbox(str(tmp_path / "box"), sink=stand_in.sink_url()) as outbox:
        outbox.enqueue(event(1))
        assert not outbox.flush(0.5)
        assert outbox.stats().state.name == "stopped"
        assert outbox.stats().pending_files == 1


def test_a_query_on_another_connection_confirms_nothing(stand_in: FakeServer28) -> None:
    """The server that answers it may be another one."""
    port = stand_in.port

    def restart() -> None:
        stand_in.stop()
        stand_in.start(port)

    assert deliver_batches(stand_in.sink_url(), make_batch(event(1)), before_confirm=restart) == ([Delivered(1)], False)
