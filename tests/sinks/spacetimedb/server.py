"""A real SpacetimeDB standalone server 1.2.0 that tests start, kill and restart."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from pillarbox import TrackingEvent
from pillarbox.codec import Codec
from pillarbox.sinks import make_sink
from pillarbox.sinks.base import Batch, CheckResult, DeliveryResult, UnconfirmedError
from pillarbox.sinks.spacetimedb.responses import SpacetimeDbResponse

ROOT = Path(__file__).parents[3]
START_MAX_S = 60  # a server that does not respond within this time has failed


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        return int(free_socket.getsockname()[1])


def server_binary() -> str:
    """Return the path of the server, which `tools/spacetimedb-server` builds where necessary."""
    built = os.environ.get("PILLARBOX_TEST_SPACETIMEDB")
    return (
        built
        or subprocess.run([ROOT / "tools/spacetimedb-server"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    )


class SpacetimeDbServer:
    """One server on a free port, with its data in a directory."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self.token: str = json.loads(self.request("POST", "/v1/identity")[1])["token"]

    def start(self) -> None:
        """Start, and wait until it responds."""
        self.folder.mkdir(exist_ok=True)
        command = [server_binary(), "start", "--listen-addr", f"127.0.0.1:{self.port}", "--data-dir", str(self.folder / "data")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--jwt-key-dir", str(self.folder / "keys")], stdout=log, stderr=log, cwd=self.folder
            )
        pause = threading.Event()
        for _ in range(START_MAX_S * 50):
            with contextlib.suppress(OSError):
                if self.request("GET", "/v1/ping")[0] == 200:
                    return
            if self._process.poll() is not None:
                break
            pause.wait(0.02)  # the time between two attempts to reach the server
        raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def kill(self) -> None:
        """Kill with SIGKILL, as in a crash."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Send a request; return status and body."""
        reply = self.request_response(method, path, body, **headers)
        return reply.status, reply.body

    def request_response(self, method: str, path: str, body: bytes | None = None, **headers: str) -> SpacetimeDbResponse:
        """Send a request; return the response as the sink sees it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            timed = response.getheader("spacetime-execution-duration-micros") is not None
            return SpacetimeDbResponse(response.status, response.getheader("content-type", ""), "", response.read(), timed)
        finally:
            connection.close()

    def publish(self, database: str, wasm: bytes) -> None:
        """Publish a module as the identity of `token`."""
        status, body = self.request(
            "PUT", f"/v1/database/{database}", wasm, Authorization=f"Bearer {self.token}", Content_Type="application/wasm"
        )
        assert status == 200, body

    def call(self, database: str, function: str, body: bytes, **headers: str) -> SpacetimeDbResponse:
        """Call a function with a body; empty headers are left out."""
        set_headers = {"Content_Type": "application/json", "Authorization": f"Bearer {self.token}"} | headers
        set_headers = {name: value for name, value in set_headers.items() if value}
        return self.request_response("POST", f"/v1/database/{database}/call/{function}", body, **set_headers)

    def rows(self, database: str, query: str) -> list[list[Any]]:
        """Run a query as the owner; return its rows."""
        status, body = self.request(
            "POST", f"/v1/database/{database}/sql", query.encode(), Authorization=f"Bearer {self.token}"
        )
        assert status == 200, body
        return list(json.loads(body)[0]["rows"])

    def stored_event_ids(self, database: str) -> list[str]:
        """Return the ids of the events in the table."""
        return [row[0] for row in self.rows(database, "SELECT event_id FROM tracking_event")]

    def sink_url(self, database: str, **options: object) -> str:
        """Return the sink's URL for a database, with the owner's token."""
        query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in options.items())
        return f"spacetimedb://:{self.token}@127.0.0.1:{self.port}/{database}?{query}"


def make_batch(*events: msgspec.Struct, batch_id: str = "sealed-a") -> Batch:
    """Encode events as a batch."""
    return Batch(batch_id, [Codec(type(one)).encode(one) for one in events])


def deliver_batches(
    url: str,
    *batches: Batch,
    event_type: type[msgspec.Struct] = TrackingEvent,
    before_confirm: Callable[[], None] = lambda: None,
) -> tuple[list[DeliveryResult], bool]:
    """Deliver batches, call `before_confirm`, and confirm; return the results and whether all were confirmed."""

    async def run() -> tuple[list[DeliveryResult], bool]:
        sink = make_sink(url, event_type)
        try:
            results = [await sink.deliver(one) for one in batches]
            await asyncio.to_thread(before_confirm)
            left = list(batches)
            try:
                while left:
                    left = left[await sink.confirm(left) :]
            except UnconfirmedError:
                return results, False
            return results, True
        finally:
            await sink.close()

    return asyncio.run(run())


def run_check(url: str, event_type: type[msgspec.Struct] = TrackingEvent) -> list[CheckResult]:
    """Return the results of the sink's `check`."""

    async def run() -> Iterable[CheckResult]:
        sink = make_sink(url, event_type)
        try:
            return await sink.check()
        finally:
            await sink.close()

    return list(asyncio.run(run()))
