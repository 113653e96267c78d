"""Several sinks of one outbox, with real files, servers and databases: each gets every event, and none waits for another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pillarbox import Outbox
from pillarbox.clock import SystemClock
from pillarbox.delivery.build import build_local_runner, build_sinks
from pillarbox.delivery.fanout import FanOutRunner
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.settings import resolve
from pillarbox.sinks.base import Misconfigured, Retry
from pillarbox.store.ledger import LedgerWriter
from pillarbox.testing import RecordingSink
from tests.conftest import event, wait_until
from tests.delivery.fanout_setup import (
    BUSY_RESPONSE,
    balanced_totals,
    batch_files,
    enqueue_events,
    enqueue_files,
    event_ids,
    open_directory,
    received_counts,
    reject_poison,
    stored_event_ids,
)
from tests.sinks.http_server import HANG, Server, always, closed_port_url


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "box"


def database(box: Path, name: str) -> str:
    """The URL of an SQLite database beside the outbox."""
    return f"sqlite:///{box.parent}/{name}.db"


def two(box: Path) -> dict[str, str]:
    return {"live": database(box, "live"), "warehouse": database(box, "warehouse")}


def test_each_sink_gets_everything_and_no_file_is_left(box: Path) -> None:
    """Two databases and several files. Nothing stays pending, and the counts balance."""
    with Outbox(str(box), sinks=two(box), batch_size=50) as outbox:
        enqueue_events(outbox, 1000)
        assert outbox.flush(60)
        stats = outbox.stats()
        assert (stats.pending_files, stats.pending_bytes, stats.delivered) == (0, 0, 2000)
        assert {name: sink.delivered for name, sink in stats.sinks.items()} == {"live": 1000, "warehouse": 1000}
    assert stored_event_ids(box.parent / "live.db") == stored_event_ids(box.parent / "warehouse.db") == event_ids(1000)
    assert not [name for folder in (box, box / "sink-live", box / "sink-warehouse") for name in batch_files(folder)]
    rows = balanced_totals(box)
    assert (rows[""].accepted, rows[""].shared, rows[""].pending_max) == (1000, 1000, 0)
    assert {name: rows[name].delivered for name in ("live", "warehouse")} == {"live": 1000, "warehouse": 1000}


@pytest.mark.parametrize("how", ["refuses connections", "answers 503", "never answers"])
def test_a_sink_that_is_down_does_not_delay_the_others(box: Path, how: str) -> None:
    """The state names it. Its pending batches count once, and it gets every event once when it is back."""
    with Server(always(BUSY_RESPONSE if how == "answers 503" else HANG)) as server:
        url = closed_port_url() if how == "refuses connections" else server.url("#timeout=0.5")
        sinks = {"live": url, "warehouse": database(box, "warehouse")}
        with Outbox(str(box), sinks=sinks, batch_size=10, backoff_max=0.05) as outbox:
            enqueue_files(outbox, 20)
            wait_until(lambda: outbox.stats().sinks["warehouse"].delivered == 200)
            wait_until(lambda: outbox.stats().sinks["live"].state.name == "waiting")
            stats = outbox.stats()
            assert stats.sinks["warehouse"].state.name in ("idle", "draining")
            assert stats.state.name == "waiting"
            assert stats.state.reason.startswith("live: ")
            assert stats.last_error.startswith("live: ")
            assert (stats.sinks["live"].delivered, stats.sinks["warehouse"].failed_flushes) == (0, 0)
            assert stats.sinks["live"].failed_flushes > 0
            assert not outbox.flush(0.3)
            files = [box / "sink-live" / name for name in batch_files(box / "sink-live")]
            assert len(files) == 20
            size = sum(file.stat().st_size for file in files)
            wait_until(lambda: (outbox.stats().pending_files, outbox.stats().pending_bytes) == (20, size))
    assert stored_event_ids(box.parent / "warehouse.db") == event_ids(200)
    assert not batch_files(box / "sink-warehouse")
    with Server() as server, Outbox(str(box), sinks=sinks | {"live": server.url()}) as outbox:
        assert outbox.flush(60)
        assert received_counts(server.requests) == dict.fromkeys(event_ids(200), 1)
        assert outbox.stats().sinks["warehouse"].delivered == 0  # nothing was delivered twice
    assert not batch_files(box / "sink-live")
    balanced_totals(box)


def test_each_sink_has_its_own_dead_letters(box: Path) -> None:
    """A record that one sink rejects is delivered to the other. The dead letters are in the queue and the ledger of the first."""
    with Server(reject_poison) as server:
        sinks = {"live": server.url(), "warehouse": database(box, "warehouse")}
        with Outbox(str(box), sinks=sinks, batch_size=10) as outbox:
            for number in range(50):
                enqueue_events(outbox, 1, number, event_key="poison" if number % 10 == 3 else "click")
            assert outbox.flush(60)
            stats = outbox.stats()
            assert (stats.dead, stats.sinks["live"].dead, stats.sinks["warehouse"].dead) == (5, 5, 0)
            assert (stats.sinks["live"].delivered, stats.sinks["warehouse"].delivered) == (45, 50)
    assert stored_event_ids(box.parent / "warehouse.db") == event_ids(50)
    assert {file.parent.name for file in box.rglob("dead-*")} == {"sink-live"}
    rows = balanced_totals(box)
    assert (rows["live"].dead, rows["live"].delivered, rows["warehouse"].dead) == (5, 45, 0)


def test_a_sink_object_may_be_one_of_several(box: Path) -> None:
    """Beside a sink with a URL."""
    sink = RecordingSink()
    with Outbox(str(box), sinks={"mine": sink, "warehouse": database(box, "warehouse")}, batch_size=10) as outbox:
        enqueue_events(outbox, 30)
        assert outbox.flush(60)
    assert len(sink.payloads) == 30
    assert stored_event_ids(box.parent / "warehouse.db") == event_ids(30)


def test_flush_waits_for_every_sink(box: Path) -> None:
    """Also for a slow one, although the other has every event at once."""
    slow = RecordingSink([Retry("not yet", after_s=0.3)])
    with Outbox(str(box), sinks={"slow": slow, "warehouse": database(box, "warehouse")}) as outbox:
        enqueue_events(outbox, 10)
        assert outbox.flush(60)
        assert len(slow.batches) == 1
        assert outbox.stats().pending_files == 0


def test_a_file_in_several_queues_is_counted_once(box: Path) -> None:
    """So `max_bytes` limits the bytes on disk, and events beyond it are dropped."""
    sinks = {"one": closed_port_url(), "two": closed_port_url(), "three": closed_port_url()}
    with Outbox(str(box), sinks=sinks, max_bytes=20_000, batch_size=20, backoff_max=0.05) as outbox:
        accepted = sum(bool(outbox.enqueue(event(number, scope_id="s" * 100))) for number in range(300))
        assert outbox._sealer.seal_now("manual", 60)
        wait_until(lambda: not batch_files(box))
        size = sum(file.stat().st_size for file in (box / "sink-one").glob("sealed-*"))
        assert outbox.stats().dropped["max_bytes"] == 300 - accepted > 0
        assert 18_000 < size <= 20_000
        # A listing during the fan-out may have missed one.
        wait_until(lambda: outbox.stats().pending_bytes == size)
        assert (
            open_directory(box).disk_usage().pending_files
            == len(batch_files(box / "sink-two"))
            == len(batch_files(box / "sink-three"))
        )
    balanced_totals(box)


class SlowToOpenSink(RecordingSink):
    """A sink that opens when the test allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> None:
        """Wait."""
        self.loop = asyncio.get_running_loop()
        await self.allowed.wait()

    def allow(self) -> None:
        """From any thread."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.allowed.set)


def test_the_runner_is_stopped_once_one_sink_is_stopped_and_the_others_are_idle(box: Path) -> None:
    """Not while another sink has yet to start, however long that takes."""
    slow, broken = SlowToOpenSink(), RecordingSink([Misconfigured("no such table")])
    with Outbox(str(box), sinks={"slow": slow, "broken": broken}) as outbox:
        enqueue_files(outbox, 2)
        fleet = outbox._link.runner
        assert isinstance(fleet, FanOutRunner)
        wait_until(lambda: outbox.stats().sinks["broken"].state.name == "stopped" and slow.loop is not None)
        assert not fleet.is_stopped()
        slow.allow()
        wait_until(fleet.is_stopped)
        assert (len(slow.payloads), len(broken.payloads)) == (20, 0)


def test_a_runner_that_was_not_started_can_be_stopped(box: Path) -> None:
    """For example, if a command is interrupted early."""
    one_and_several: list[dict[str, object]] = [{"sink": "sqlite:///a.db"}, {"sinks": two(box)}]
    for sinks in one_and_several:
        settings = resolve({"directory": str(box)} | sinks, {}, None)
        outbox_dir = open_directory(box)
        outbox_dir.ensure_usable()
        ledger = LedgerWriter(outbox_dir, SystemClock())
        found = build_local_runner(settings, outbox_dir, SystemClock(), ledger, DeliveryCallbacks(), build_sinks(settings, {}))
        assert found.stop(60)
