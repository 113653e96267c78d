"""From `enqueue` to an HTTP server that fails often, and through the CLI: each event arrives once or is a dead letter."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import pillarbox
from pillarbox import TrackingEvent
from pillarbox.codec import Codec
from pillarbox.outcome import Enqueued
from pillarbox.sinks import make_sink
from pillarbox.store.directory import Directory
from tests.conftest import event, wait_until
from tests.delivery.worker_setup import QUICK_CONFIG, drain_worker, make_worker, remaining_files, seal_batch
from tests.sinks.http_server import HANG, CannedResponse, Request, Server
from tests.sinks.test_http import SECRET

OK = {"Content-Type": "application/json"}
PILLARBOX = [sys.executable, "-m", "pillarbox"]


class Destination:
    """A destination that stores each key once and rejects poisoned events, with or without naming them."""

    def __init__(self, seed: int = 0, *, trouble: float = 0.0, names: bool = True, records_max: int = 10**6) -> None:
        self.kept: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.attempts: Counter[str] = Counter()
        self.records_max = records_max
        self._random = random.Random(seed)
        self._trouble = trouble
        self._names = names

    def __call__(self, request: Request) -> CannedResponse:
        if request.method != "POST":
            return CannedResponse(405)
        self.attempts[request.idempotency_key] += 1
        if self._random.random() < self._trouble:
            return self._fail(request)
        return self._accept_or_reject(request)

    def _accept_or_reject(self, request: Request) -> CannedResponse:
        if request.idempotency_key in self.keys:
            return CannedResponse(200)
        ids = [item["event_id"] for item in request.events]
        if len(ids) > self.records_max:
            return CannedResponse(413)
        poisoned = [index for index, item in enumerate(request.events) if item["event_key"] == "poison"]
        if poisoned and self._names:
            return CannedResponse(
                422, json.dumps({"refused": [{"index": index, "reason": "poison"} for index in poisoned]}).encode(), OK
            )
        if poisoned:
            return CannedResponse(400, b"there is poison in it")
        self.keys.add(request.idempotency_key)
        self.kept.update(ids)
        return CannedResponse(202, json.dumps({"accepted": len(ids)}).encode(), OK)

    def _fail(self, request: Request) -> CannedResponse:
        busy = [CannedResponse(status, b"<html>", {"Retry-After": "0"}) for status in (408, 409, 425, 429, 500, 502, 503, 504)]
        kept = [
            self._accept_or_reject(request)._replace(cut_after_bytes=20),
            CannedResponse(raw=b"\x00garbage\r\n\r\n"),
            CannedResponse(raw=b""),
            HANG,
        ]
        return self._random.choice([*busy, *kept])


def fill(box: pillarbox.Outbox, count: int, poisoned: Callable[[int], bool] = lambda _: False) -> None:
    for number in range(count):
        enqueued = event(number, event_key="poison" if poisoned(number) else "click")
        assert isinstance(box.enqueue(enqueued), Enqueued)


@pytest.mark.parametrize("in_flight", [1, 4])
def test_each_event_arrives_once_whatever_the_server_responds(outbox_dir: Directory, in_flight: int) -> None:
    """Busy, cut off, hanging or garbage, with one or several batches in flight: the keys make repeats harmless."""
    destination = Destination(7, trouble=0.4)
    payloads = [Codec(TrackingEvent).encode(event(number)) for number in range(2000)]
    for stamp in range(40):
        seal_batch(outbox_dir, 10**15 + stamp, *payloads[stamp * 50 : stamp * 50 + 50])
    with Server(destination) as server:
        sink = make_sink(server.url("#timeout=0.2&compress=gzip"), TrackingEvent)
        worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(max_in_flight=in_flight))
        drain_worker(worker)
    assert destination.kept == Counter({f"e-{number:06d}": 1 for number in range(2000)})
    assert not [name for name in remaining_files(outbox_dir) if name.startswith(("sealed-", "dead-", "corrupt-"))]
    assert max(destination.attempts.values()) > 1
    assert len(destination.attempts) == 40  # no batch was split, because none was rejected


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("form", ["ndjson", "cloudevents"])
def test_rejected_events_become_dead_letters_and_the_others_arrive(tmp_path: Path, form: str, names: bool) -> None:
    """Whether the server names the events or delivery finds them by halving the batch."""
    destination = Destination(names=names)

    def poisoned(number: int) -> bool:
        return number in {3, 4, 77, 149}

    with Server(destination) as server:
        url = server.url(f"#format={form}")
        with pillarbox.Outbox(str(tmp_path / "box"), sink=url, batch_size=50, flush_interval=0.05) as box:
            fill(box, 200, poisoned)
            assert box.flush(timeout=60)
    assert destination.kept == Counter({f"e-{number:06d}": 1 for number in range(200) if not poisoned(number)})
    dead = "".join(file.read_text() for file in sorted((tmp_path / "box").glob("dead-*")))
    assert len(dead.splitlines()) == 4
    assert dead.count("poison in it" if not names else '"reason":"poison"') == 4


def test_a_batch_that_is_too_large_is_halved(tmp_path: Path) -> None:
    """Before it is sent, by the limits in the URL, and after a 413."""
    for options, most in (("#records_max=20", 20), ("", 30), ("#bytes_max=2000", 100)):
        destination = Destination(records_max=most)
        with Server(destination) as server:
            box = pillarbox.Outbox(str(tmp_path / f"box{most}"), sink=server.url(options), batch_size=100, flush_interval=0.05)
            with box:
                fill(box, 100)
                assert box.flush(timeout=60)
            assert destination.kept.total() == 100
            assert all(
                len(request.events) <= most for request in server.requests if request.idempotency_key in destination.keys
            )
            assert all(len(request.body) <= 2010 for request in server.requests) or "bytes_max" not in options


def test_a_misconfiguration_stops_delivery_and_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state says what to correct, and no event is lost."""
    monkeypatch.setenv("EVENTS_TOKEN", SECRET)
    with Server(lambda request: CannedResponse(401, str(request.headers).encode())) as server:
        url = server.url(f"/?key={SECRET}#token_env=EVENTS_TOKEN", user="")
        with pillarbox.Outbox(str(tmp_path / "box"), sink=url, flush_interval=0.05) as box:
            fill(box, 10)
            wait_until(lambda: box.stats().state.name == "stopped")
            stats = box.stats()
        assert "401" in stats.state.reason
        assert SECRET not in repr(stats)
        assert SECRET not in repr(box)
        assert stats.pending_bytes
    for file in (tmp_path / "box").iterdir():
        assert SECRET not in file.read_text(errors="replace")


def test_a_missing_variable_stops_delivery_and_keeps_the_events(tmp_path: Path) -> None:
    """The application continues."""
    with (
        Server() as server,
        pillarbox.Outbox(str(tmp_path / "box"), sink=server.url("#token_env=NOT_SET_ANYWHERE"), flush_interval=0.05) as box,
    ):
        fill(box, 10)
        wait_until(lambda: box.stats().state.name == "stopped")
        assert "NOT_SET_ANYWHERE" in box.stats().state.reason
        assert box.stats().pending_bytes
        assert server.requests == []


def command(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PILLARBOX, *map(str, arguments)], input=stdin, capture_output=True, timeout=60, check=False)


def test_check_enqueue_and_deliver_work_from_the_command_line(tmp_path: Path) -> None:
    """No secret is in their output."""
    destination = Destination()
    lines = b"".join(
        b'{"event_id":"e-%d","event_key":"k","scope_kind":"Site","scope_id":"s"}\n' % number for number in range(700)
    )
    with Server(destination) as server:
        url = server.url(f"/in?key={SECRET}#compress=zstd", user=f"me:{SECRET}@")
        completed = command("check", url)
        assert completed.returncode == 0, completed.stderr
        assert b"/in?key=...#compress=..." in completed.stdout
        stored = command("enqueue", "-d", tmp_path / "box", stdin=lines)
        assert stored.returncode == 0, stored.stderr
        delivered = command("deliver", "-d", tmp_path / "box", "--sink", url, "--once")
        assert delivered.returncode == 0, delivered.stderr
        assert b"delivered 700" in delivered.stdout
        status = command("status", "-d", tmp_path / "box")
        for output in (completed, stored, delivered, status):
            assert SECRET.encode() not in output.stdout + output.stderr
        assert b"HTTP Request" not in delivered.stderr  # httpx would log the whole URL of each request
    assert destination.kept.total() == 700
    refused = command("check", server.url("#colour=red"))
    assert refused.returncode == 2
    assert b"colour" in refused.stderr
    away = command("check", server.url())
    assert away.returncode == 1
    assert b"cannot connect" in away.stdout
