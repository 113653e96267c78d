"""A backlog delivered into SpacetimeDB: by `http.client` and by Pillarbox, with the same confirmation."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bench import backlog, sample
from bench.definitions import Contestant, UnavailableError
from pillarbox.sinks.spacetimedb import publish

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bench.definitions import Figures, RoundPaths

SIZES = {sample.BATCH: 400_000, 5_000: 300_000, 100: 50_000}  # events per call -> number of events
CONFIRM_WAIT_S = 1.0  # seconds; the sink's default for servers 1.x
TOOL = Path(__file__).parents[1] / "tools" / "spacetimedb-server"
_SCOPES = {kind: msgspec.Raw(b'{"%d":[]}' % at) for at, kind in enumerate(("Site", "Module", "User", "Profile"))}


def plain_name(batch: int) -> str:
    """The name of the plain client with so many events per call."""
    return f"http.client, decoding, {batch:,} a call"


def pillarbox_name(batch: int) -> str:
    """The name of Pillarbox with so many events per call."""
    return f"pillarbox, spacetimedb, {batch:,} a call"


def backlog_name(batch: int) -> str:
    """The name of the folder with the batch files."""
    return f"spacetimedb-{batch}"


def event_count(batch: int, quick: bool) -> int:
    """The number of events to deliver."""
    return SIZES[batch] // 20 if quick else SIZES[batch]


def server_binary() -> str:
    """The path of the server that the tests use; building one here would take too long."""
    built = os.environ.get("PILLARBOX_TEST_SPACETIMEDB")
    if built:
        return built
    completed = subprocess.run([TOOL, "--if-built"], check=False, capture_output=True, text=True)
    if completed.returncode:
        raise UnavailableError("there is no SpacetimeDB server: tools/spacetimedb-server builds one")
    return completed.stdout.strip()


class BenchServer:
    """A server with an empty table."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.token = json.loads(self.request("POST", "/v1/identity"))["token"]
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/wasm"}
        self.request("PUT", "/v1/database/bench", publish.read_wasm("tracking_event_v1.wasm"), headers)

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """Make a request; returns the body of the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        if response.status != 200:
            raise SystemExit(f"the server responded {response.status} to {method} {path}: {text.decode()}")
        return text

    def rows(self) -> int:
        """The number of rows in the table."""
        headers = {"Authorization": f"Bearer {self.token}"}
        response = self.request("POST", "/v1/database/bench/sql", b"SELECT COUNT(*) AS n FROM tracking_event", headers)
        return int(json.loads(response)[0]["rows"][0][0])


@contextlib.contextmanager
def running_server(folder: Path, expected: int) -> Iterator[BenchServer]:
    """Run a server for one round; at the end, it must have the expected number of events."""
    folder.mkdir()
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = int(free_socket.getsockname()[1])
    command = [server_binary(), "start", "--listen-addr", f"127.0.0.1:{port}", "--data-dir", str(folder / "data")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--jwt-key-dir", str(folder / "keys")], stdout=log, stderr=log)
    try:
        server = None
        for _ in range(1000):
            with contextlib.suppress(OSError):
                server = BenchServer(port)
                break
            time.sleep(0.02)
        if server is None:
            raise SystemExit("the server did not start within 20 s")
        yield server
        if server.rows() != expected:
            raise SystemExit(f"{server.rows()} of {expected} events arrived")
    finally:
        process.kill()  # its data is deleted anyway, and a shutdown takes more than 20 s
        process.wait()


def request_bodies(directory: Path) -> Iterator[bytes]:
    """The request body for the events of each file."""
    decode, encode = msgspec.json.Decoder(backlog.Line).decode, msgspec.json.Encoder().encode
    for lines in backlog.lines(directory):
        rows = []
        for line in lines:
            event = decode(line).event
            user, owner, profile, key = event.user_id, event.owner_user_id, event.profile_id, event.module_key
            rows.append(
                (
                    event.event_id,
                    event.event_key,
                    _SCOPES[event.scope_kind],
                    event.scope_id,
                    None if user is None else (0, user),
                    None if owner is None else (0, owner),
                    None if profile is None else (0, profile),
                    None if key is None else (0, key),
                    event.metadata_json,
                    event.occurred_at_micros,
                )
            )
        yield encode([rows])


def post_bodies(server: BenchServer, request_bodies: Iterable[bytes]) -> None:
    """Post all bodies over one connection, each made while the previous request is in flight; then confirm them with a ping."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.token}"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    in_flight = False

    def read_response() -> None:
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise SystemExit(f"the server responded {response.status}")

    for body in request_bodies:
        if in_flight:
            read_response()
        connection.request("POST", "/v1/database/bench/call/record_tracking_events", body, headers)
        in_flight = True
    read_response()
    time.sleep(CONFIRM_WAIT_S)
    connection.request("GET", "/v1/ping")
    read_response()
    connection.close()


def deliver_prepared(folder: RoundPaths, batch: int) -> Figures:
    """Bodies that were made before: nothing is read or decoded."""
    calls, count = list(request_bodies(folder.shared / backlog_name(batch))), event_count(batch, folder.quick)
    with running_server(folder.own / "server", count) as server:
        return backlog.measure_delivery(count, lambda: post_bodies(server, calls))


def deliver_plain(folder: RoundPaths, batch: int) -> Figures:
    """Read, decode and encode each file between the calls. No file is deleted."""
    directory, count = folder.shared / backlog_name(batch), event_count(batch, folder.quick)
    with running_server(folder.own / "server", count) as server:
        return backlog.measure_delivery(count, lambda: post_bodies(server, request_bodies(directory)))


def deliver_pillarbox(folder: RoundPaths, batch: int) -> Figures:
    """An outbox with default settings."""
    count = event_count(batch, folder.quick)
    with running_server(folder.own / "server", count) as server:
        url = f"spacetimedb://:{server.token}@127.0.0.1:{server.port}/bench?confirm_wait={CONFIRM_WAIT_S}"
        return backlog.deliver_with_outbox(folder, backlog_name(batch), count, url)


def contestants() -> Iterator[Contestant]:
    """A plain client and Pillarbox for each size, and prepared bodies as an upper bound."""
    yield Contestant(f"http.client, prepared bodies, {sample.BATCH} a call", partial(deliver_prepared, batch=sample.BATCH))
    for batch in SIZES:
        yield Contestant(plain_name(batch), partial(deliver_plain, batch=batch))
        yield Contestant(pillarbox_name(batch), partial(deliver_pillarbox, batch=batch), ours=True)
