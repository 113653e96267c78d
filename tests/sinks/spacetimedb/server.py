"""A real SpacetimeDB standalone 1.2.0, started, killed and started again by the tests."""

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
START_MAX_S = 60  # a server that has not answered by then will not


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def server_binary() -> str:
    """The server, built by the project's own script where it is not there yet."""
    built = os.environ.get("PILLARBOX_TEST_SPACETIMEDB")
    return (
        built
        or subprocess.run([ROOT / "tools/spacetimedb-server"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    )


class SpacetimeDbServer:
    """One server on a free port, with its data in a folder."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self.token: str = json.loads(self.request("POST", "/v1/identity")[1])["token"]

    def start(self) -> None:
        """Start, and wait until it answers."""
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
            pause.wait(0.02)
        raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def kill(self) -> None:
        """As a crash does: nothing is finished or synced."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """(status, body) of a request by a plain HTTP client."""
        reply = self.request_response(method, path, body, **headers)
        return reply.status, reply.body

    def request_response(self, method: str, path: str, body: bytes | None = None, **headers: str) -> SpacetimeDbResponse:
        """The answer to a request, as the sink sees it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            timed = response.getheader("spacetime-execution-duration-micros") is not None
            return SpacetimeDbResponse(response.status, response.getheader("content-type", ""), "", response.read(), timed)
        finally:
            connection.close()

    def publish(self, database: str, wasm: bytes) -> None:
        """Put a module on the server, as the identity of `token`."""
        status, body = self.request(
            "PUT", f"/v1/database/{database}", wasm, Authorization=f"Bearer {self.token}", Content_Type="application/wasm"
        )
        assert status == 200, body

    def call(self, database: str, function: str, body: bytes, **headers: str) -> SpacetimeDbResponse:
        """Call a function with a body as it is; a header that is empty is left out."""
        given = {"Content_Type": "application/json", "Authorization": f"Bearer {self.token}"} | headers
        given = {name: value for name, value in given.items() if value}
        return self.request_response("POST", f"/v1/database/{database}/call/{function}", body, **given)

    def rows(self, database: str, query: str) -> list[list[Any]]:
        """What a query finds, as the owner."""
        status, body = self.request(
            "POST", f"/v1/database/{database}/sql", query.encode(), Authorization=f"Bearer {self.token}"
        )
        assert status == 200, body
        return list(json.loads(body)[0]["rows"])

    def stored_event_ids(self, database: str) -> list[str]:
        """The events in the table."""
        return [row[0] for row in self.rows(database, "SELECT event_id FROM tracking_event")]

    def sink_url(self, database: str, **options: object) -> str:
        """The sink's URL for a database, with the owner's token in it."""
        query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in options.items())
        return f"spacetimedb://:{self.token}@127.0.0.1:{self.port}/{database}?{query}"


def make_batch(*events: msgspec.Struct, batch_id: str = "sealed-a") -> Batch:
    """A batch of events."""
    return Batch(batch_id, [Codec(type(one)).encode(one) for one in events])


def deliver_batches(
    url: str,
    *batches: Batch,
    event_type: type[msgspec.Struct] = TrackingEvent,
    before_confirm: Callable[[], None] = lambda: None,
) -> tuple[list[DeliveryResult], bool]:
    """The answers to some batches, and whether they were confirmed after `before_confirm()`."""

    async def run() -> tuple[list[DeliveryResult], bool]:
        sink = make_sink(url, event_type)
        try:
            answers = [await sink.deliver(one) for one in batches]
            await asyncio.to_thread(before_confirm)
            left = list(batches)
            try:
                while left:
                    left = left[await sink.confirm(left) :]
            except UnconfirmedError:
                return answers, False
            return answers, True
        finally:
            await sink.close()

    return asyncio.run(run())


def run_check(url: str, event_type: type[msgspec.Struct] = TrackingEvent) -> list[CheckResult]:
    """What `pillarbox check` finds."""

    async def run() -> Iterable[CheckResult]:
        sink = make_sink(url, event_type)
        try:
            return await sink.check()
        finally:
            await sink.close()

    return list(asyncio.run(run()))
