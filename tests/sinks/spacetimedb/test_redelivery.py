"""A real server that is killed right after it accepts events, and their redelivery."""

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


class UnconfirmingSink:
    """A sink that needs no confirmation, unlike our own, and kills the server after each response."""

    def __init__(self, server: SpacetimeDbServer) -> None:
        self._sink = make_sink(server.sink_url("events"), TrackingEvent)
        self._server = server
        self.capabilities = self._sink.capabilities._replace(needs_confirmation=False, combines_files=False, concurrent=False)

    async def open(self) -> None:
        await self._sink.open()

    def prepare(self, batch: Batch) -> None:
        self._sink.prepare(batch)

    async def deliver(self, batch: Batch) -> DeliveryResult:
        result = await self._sink.deliver(batch)
        self._server.kill()
        return result

    async def confirm(self, batches: Sequence[Batch]) -> int:
        return len(batches)

    async def check(self) -> Iterable[CheckResult]:
        return await self._sink.check()

    async def close(self) -> None:
        await self._sink.close()


def deliver_confirmed(server: SpacetimeDbServer, folder: Path) -> None:
    """Deliver the first events with our own sink, which confirms them after a second."""
    with Outbox(str(folder / "box"), sink=server.sink_url("events"), batch_size=100, keep_delivered="24h") as outbox:
        assert all(outbox.enqueue(event(number)) for number in range(EVENTS))
        assert outbox.flush(60)


@pytest.mark.parametrize("disk_is_restored", [False, True])
def test_events_that_a_killed_server_lost_are_redelivered_once(
    own_server: SpacetimeDbServer, tmp_path: Path, *, disk_is_restored: bool
) -> None:
    """Events that were accepted with 200 and deleted here are lost there; redelivery restores them without duplicates.

    A kill loses the last milliseconds, possibly nothing; with `disk_is_restored` the server's disk is set back too.
    """
    data, copy = own_server.folder / "data", tmp_path / "copy"
    deliver_confirmed(own_server, tmp_path)  # from then on the database itself survives a kill
    for number in range(1, ROUNDS + 1):
        own_server.kill()
        shutil.copytree(data, copy, dirs_exist_ok=True)
        own_server.start()
        with Outbox(str(tmp_path / "box"), batch_size=EVENTS) as outbox:
            assert all(outbox.enqueue(event(number * EVENTS + one)) for one in range(EVENTS))
        with Outbox(str(tmp_path / "box"), UnconfirmingSink(own_server), keep_delivered="24h") as outbox:
            assert outbox.flush(60)
            assert (outbox.stats().delivered, outbox.stats().dead) == (EVENTS, 0)
        if disk_is_restored:
            shutil.rmtree(data)
            copy.rename(data)
        own_server.start()
        stored = own_server.stored_event_ids("events")
        assert len(stored) == len(set(stored))
        if disk_is_restored:
            assert len(stored) == EVENTS
    completed = run("redeliver", "-d", "box", "--since", "2h", "--yes", cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    with Outbox(str(tmp_path / "box"), sink=own_server.sink_url("events", confirm_wait=0.1)) as outbox:
        assert outbox.flush(60)
        assert (outbox.stats().delivered, outbox.stats().dead) == ((ROUNDS + 1) * EVENTS, 0)
    assert sorted(own_server.stored_event_ids("events")) == [f"e-{number:06d}" for number in range((ROUNDS + 1) * EVENTS)]
    assert run("verify", "-d", "box", cwd=tmp_path).returncode == 0


def test_confirmed_events_survive_a_kill(own_server: SpacetimeDbServer, tmp_path: Path) -> None:
    """Killed right after the last file is settled: no event is missing, and redelivery adds no duplicate."""
    deliver_confirmed(own_server, tmp_path)
    own_server.kill()
    own_server.start()
    assert len(own_server.stored_event_ids("events")) == EVENTS
    assert run("redeliver", "-d", "box", "--all", "--yes", cwd=tmp_path).returncode == 0
    with Outbox(str(tmp_path / "box"), sink=own_server.sink_url("events", confirm_wait=0.1)) as outbox:
        assert outbox.flush(60)
        assert outbox.stats().delivered == EVENTS
    stored = own_server.stored_event_ids("events")
    assert len(stored) == len(set(stored)) == EVENTS
