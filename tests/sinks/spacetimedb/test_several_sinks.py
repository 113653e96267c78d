"""A real SpacetimeDB server as one of several sinks."""

from __future__ import annotations

from pathlib import Path

from pillarbox import Outbox
from tests.conftest import wait_until
from tests.delivery.fanout_setup import balanced_totals, batch_files, enqueue_files, event_ids, stored_event_ids
from tests.sinks.spacetimedb.server import SpacetimeDbServer


def test_a_killed_server_delays_no_other_sink_and_misses_no_event(own_server: SpacetimeDbServer, tmp_path: Path) -> None:
    """Both sinks have every event once, and the SQLite sink does not wait for the server."""
    box = tmp_path / "box"
    sinks = {"live": own_server.sink_url("events"), "warehouse": f"sqlite:///{tmp_path}/w.db"}
    with Outbox(str(box), sinks=sinks, flush_interval=0.05, backoff_max=0.1) as outbox:
        enqueue_files(outbox, 5)
        assert outbox.flush(60)
        own_server.kill()
        enqueue_files(outbox, 5, first=50)
        wait_until(lambda: outbox.stats().sinks["warehouse"].delivered == 100)
        wait_until(lambda: outbox.stats().sinks["live"].state.name == "waiting")
        assert len(batch_files(box / "sink-live")) == 5
        own_server.start()
        assert outbox.flush(60)
    assert sorted(own_server.stored_event_ids("events")) == stored_event_ids(tmp_path / "w.db") == event_ids(100)
    balanced_totals(box)
