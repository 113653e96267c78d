"""How fast a backlog goes into SpacetimeDB, beside a client that posts prepared bodies and waits for the same confirmation."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from bench import sample
from pillarbox import Outbox, TrackingEvent
from pillarbox.sinks.spacetimedb import module

ROUNDS = 3
CONFIRM_WAIT_S = 1.0  # the sink's default for servers 1.x
SERVER = Path(__file__).parents[1] / "tools" / "spacetimedb-server"


class Server:
    """The server that the tests use, on a free port; no answer of it leaves this machine."""

    def __init__(self, place: Path) -> None:
        binary = subprocess.run([SERVER], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        folders = ["--data-dir", str(place / "data"), "--jwt-key-dir", str(place / "keys")]
        with (place / "log").open("wb") as log:
            command = [binary, "start", "--listen-addr", f"127.0.0.1:{self.port}", *folders]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(1000):
            try:
                self.token = json.loads(self.ask("POST", "/v1/identity"))["token"]
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise SystemExit("the server does not start")

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
        """The body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse().read()
        connection.close()
        return answer

    def publish(self, database: str) -> None:
        """An empty table."""
        wasm = module.wasm("tracking_event_v1.wasm")
        self.ask("PUT", f"/v1/database/{database}", wasm, Authorization=f"Bearer {self.token}", Content_Type="application/wasm")

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)


def bodies(backlog: Path) -> list[bytes]:
    """What the bare client posts: every batch, ready."""
    options = ("user_id", "owner_user_id", "profile_id", "module_key")
    found = []
    for file in sorted(backlog.iterdir()):
        rows = []
        for line in file.read_bytes().splitlines():
            event = json.loads(line)["event"]
            event["scope_kind"] = {"0": []}
            event |= {name: None if event[name] is None else [0, event[name]] for name in options}
            rows.append([event[name] for name in TrackingEvent.__struct_fields__])
        found.append(msgspec.json.encode([rows]))
    return found


def bare(server: Server, database: str, prepared: list[bytes]) -> float:
    """Seconds to post all, wait and ping, over one connection."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.token}"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    began = time.perf_counter()
    for body in prepared:
        connection.request("POST", f"/v1/database/{database}/call/record_tracking_events", body, headers)
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise SystemExit(f"the server answered {response.status}")
    time.sleep(CONFIRM_WAIT_S)
    connection.request("GET", "/v1/ping")
    connection.getresponse().read()
    took = time.perf_counter() - began
    connection.close()
    return took


def ours(server: Server, database: str, backlog: Path) -> tuple[float, float]:
    """Seconds, and seconds of this process's processor, to deliver a copy of the backlog."""
    directory = backlog.with_name("outbox")
    shutil.copytree(backlog, directory)
    url = f"spacetimedb://:{server.token}@127.0.0.1:{server.port}/{database}?confirm_wait={CONFIRM_WAIT_S}"
    began, cpu = time.perf_counter(), sum(os.times()[:2])
    with Outbox(str(directory), sink=url, max_bytes=2**40) as outbox:
        if not outbox.flush(600):
            raise SystemExit(f"the backlog was not delivered in ten minutes: {outbox.stats()}")
        took = time.perf_counter() - began
    used = sum(os.times()[:2]) - cpu
    shutil.rmtree(directory)
    return took, used


def measure(place: Path, quick: bool) -> None:
    """Print events a second of both, for three sizes of a call."""
    if shutil.which("cargo") is None and not os.environ.get("PILLARBOX_TEST_SPACETIMEDB"):
        print("\nspacetimedb: left out, for cargo is needed to build the server", file=sys.stderr)
        return
    (place / "server").mkdir()
    server = Server(place / "server")
    try:
        for batch, events in ((100, 60_000), (500, 600_000), (5_000, 600_000)):
            _measure_one(server, place, batch, events // 10 if quick else events)
    finally:
        server.stop()


def _measure_one(server: Server, place: Path, batch: int, events: int) -> None:
    backlog = place / f"backlog-{batch}"
    sample.sealed_files(backlog, events // batch, batch)
    prepared = bodies(backlog)
    print(f"\ndrain into SpacetimeDB: {ROUNDS} rounds of {events:,} events, {batch:,} a call, in turn; confirmation included")
    took: dict[str, list[float]] = {"bare": [], "ours": []}
    used = 0.0
    for number in range(ROUNDS):
        server.publish(f"bare-{batch}-{number}")
        took["bare"].append(bare(server, f"bare-{batch}-{number}", prepared))
        server.publish(f"ours-{batch}-{number}")
        seconds, used = ours(server, f"ours-{batch}-{number}", backlog)
        took["ours"].append(seconds)
    for name, label in (("bare", "prepared bodies, http.client"), ("ours", "pillarbox")):
        print(f"  {label:28} {events / statistics.median(took[name]):9,.0f} events/s")
    ratio = statistics.median(a / b for a, b in zip(took["bare"], took["ours"], strict=True))
    print(f"  ratio: {ratio:.2f}; goal: at least 0.8 at 500 a call. Processor: {used / events * 1e6:.1f} s a million events")
    shutil.rmtree(backlog)
