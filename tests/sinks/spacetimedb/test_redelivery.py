"""A server that is killed right after its answers, and what it forgot sent again. A real one."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from pillarbox import Outbox, TrackingEvent
from pillarbox.sinks import make_sink
from pillarbox.sinks.base import Batch, CheckResult, DeliveryResult
from tests.cli.test_commands import run
from tests.conftest import event
from tests.sinks.spacetimedb.server import SpacetimeDbServer

EVENTS = 500
ROUNDS = 2


class Credulous:
    """Takes the server's answer for a promise, as our own sink does not; then the server is killed."""

    def __init__(self, server: SpacetimeDbServer) -> None:
        self._sink = make_sink(server.sink_url("events"), TrackingEvent)
        self._server = server
        self.capabilities = self._sink.capabilities._replace(needs_confirmation=False, combines_files=False, concurrent=False)

    async def open(self) -> None:
        await self._sink.open()

    def prepare(self, batch: Batch) -> None:
        self._sink.prepare(batch)

    async def deliver(self, batch: Batch) -> DeliveryResult:
        answer = await self._sink.deliver(batch)
        self._server.kill()
        return answer

    async def confirm(self, batches: Sequence[Batch]) -> int:
        return len(batches)

    async def check(self) -> Iterable[CheckResult]:
        return await self._sink.check()

    async def close(self) -> None:
        await self._sink.close()


def deliver_confirmed(server: SpacetimeDbServer, folder: Path) -> None:
    """Deliver the first events as our own sink does it, which waits a second until it believes in an answer."""
    with Outbox(str(folder / "box"), sink=server.sink_url("events"), batch_size=100, keep_delivered="24h") as outbox:
        assert all(outbox.enqueue(event(number)) for number in range(EVENTS))
        assert outbox.flush(60)


@pytest.mark.parametrize("loses", [False, True])
def test_what_a_killed_server_forgot_after_its_answers_is_sent_again_and_there_once(
    own_server: SpacetimeDbServer, tmp_path: Path, *, loses: bool
) -> None:
    """Answered with 200, settled, and gone: `pillarbox resend` brings it back, and nothing is there twice.

    What a kill takes with it is a matter of milliseconds, and may be nothing; with `loses`, the disk has none of it either.
    """
    data, copy = own_server.folder / "data", tmp_path / "copy"
    deliver_confirmed(own_server, tmp_path)  # at the latest then the database itself survives a kill
    for number in range(1, ROUNDS + 1):
        own_server.kill()
        shutil.copytree(data, copy, dirs_exist_ok=True)
        own_server.start()
        with Outbox(str(tmp_path / "box"), batch_size=EVENTS) as outbox:
            assert all(outbox.enqueue(event(number * EVENTS + one)) for one in range(EVENTS))
        with Outbox(str(tmp_path / "box"), Credulous(own_server), keep_delivered="24h") as outbox:
            assert outbox.flush(60)
            assert (outbox.stats().delivered, outbox.stats().dead) == (EVENTS, 0)
        if loses:
            shutil.rmtree(data)
            copy.rename(data)
        own_server.start()
        found = own_server.stored_event_ids("events")
        assert len(found) == len(set(found))
        if loses:
            assert len(found) == EVENTS
    done = run("resend", "-d", "box", "--since", "2h", "--yes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Outbox(str(tmp_path / "box"), sink=own_server.sink_url("events", confirm_wait=0.1)) as outbox:
        assert outbox.flush(60)
        assert (outbox.stats().delivered, outbox.stats().dead) == ((ROUNDS + 1) * EVENTS, 0)
    assert sorted(own_server.stored_event_ids("events")) == [f"e-{number:06d}" for number in range((ROUNDS + 1) * EVENTS)]
    assert run("verify", "-d", "box", cwd=tmp_path).returncode == 0


def test_what_our_own_sink_has_confirmed_is_not_forgotten(own_server: SpacetimeDbServer, tmp_path: Path) -> None:
    """Killed right after the last file is settled: nothing of it is missing, and sent again nothing is there twice."""
    deliver_confirmed(own_server, tmp_path)
    own_server.kill()
    own_server.start()
    assert len(own_server.stored_event_ids("events")) == EVENTS
    assert run("resend", "-d", "box", "--all", "--yes", cwd=tmp_path).returncode == 0
    with Outbox(str(tmp_path / "box"), sink=own_server.sink_url("events", confirm_wait=0.1)) as outbox:
        assert outbox.flush(60)
        assert outbox.stats().delivered == EVENTS
    found = own_server.stored_event_ids("events")
    assert len(found) == len(set(found)) == EVENTS
