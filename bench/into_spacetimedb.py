"""A backlog into SpacetimeDB: by `http.client` and by us, with the same confirmation, to a server of the round's own."""

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
from bench.plan import Contestant, UnavailableError
from pillarbox.sinks.spacetimedb import publish

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bench.plan import Figures, RoundPaths

SIZES = {sample.BATCH: 400_000, 5_000: 300_000, 100: 50_000}  # events a call -> events in all; seconds beside the last one
CONFIRM_WAIT_S = 1.0  # the sink's default for servers 1.x
TOOL = Path(__file__).parents[1] / "tools" / "spacetimedb-server"
_SCOPES = {kind: msgspec.Raw(b'{"%d":[]}' % at) for at, kind in enumerate(("Site", "Module", "User", "Profile"))}


def bare_name(batch: int) -> str:
    """The client of its own, with so many events a call."""
    return f"http.client, decoding, {batch:,} a call"


def our_name(batch: int) -> str:
    """Us, with so many events a call."""
    return f"pillarbox, spacetimedb, {batch:,} a call"


def backlog_of(batch: int) -> str:
    """Where its sealed files are."""
    return f"spacetimedb-{batch}"


def events(batch: int, quick: bool) -> int:
    """How many are delivered."""
    return SIZES[batch] // 20 if quick else SIZES[batch]


def binary() -> str:
    """The server that the tests use; it takes too long to build here."""
    built = os.environ.get("PILLARBOX_TEST_SPACETIMEDB")
    if built:
        return built
    found = subprocess.run([TOOL, "--if-built"], check=False, capture_output=True, text=True)
    if found.returncode:
        raise UnavailableError("there is no SpacetimeDB server: tools/spacetimedb-server builds one")
    return found.stdout.strip()


class Server:
    """An empty table on a server at a free port."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.token = json.loads(self.ask("POST", "/v1/identity"))["token"]
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/wasm"}
        self.ask("PUT", "/v1/database/bench", publish.read_wasm("tracking_event_v1.wasm"), headers)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """The body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.status != 200:
            raise SystemExit(f"the server answers {answer.status} to {method} {path}: {text.decode()}")
        return text

    def rows(self) -> int:
        """How many events arrived."""
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = self.ask("POST", "/v1/database/bench/sql", b"SELECT COUNT(*) AS n FROM tracking_event", headers)
        return int(json.loads(answer)[0]["rows"][0][0])


@contextlib.contextmanager
def serving(folder: Path, expected: int) -> Iterator[Server]:
    """A server for as long as this lasts; afterwards it must have so many events."""
    folder.mkdir()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    command = [binary(), "start", "--listen-addr", f"127.0.0.1:{port}", "--data-dir", str(folder / "data")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--jwt-key-dir", str(folder / "keys")], stdout=log, stderr=log)
    try:
        server = None
        for _ in range(1000):
            with contextlib.suppress(OSError):
                server = Server(port)
                break
            time.sleep(0.02)
        if server is None:
            raise SystemExit("the server does not start")
        yield server
        if server.rows() != expected:
            raise SystemExit(f"{server.rows()} events arrived of {expected}")
    finally:
        process.kill()  # its data goes as well; asked to end, it takes more than 20 s
        process.wait()


def bodies(directory: Path) -> Iterator[bytes]:
    """Each file's events as the function takes them."""
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


def post(server: Server, calls: Iterable[bytes]) -> None:
    """All, over one connection, each made while the one before is on its way; then the wait and the ping that confirm."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.token}"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    under_way = False

    def arrive() -> None:
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit(f"the server answered {answer.status}")

    for body in calls:
        if under_way:
            arrive()
        connection.request("POST", "/v1/database/bench/call/record_tracking_events", body, headers)
        under_way = True
    arrive()
    time.sleep(CONFIRM_WAIT_S)
    connection.request("GET", "/v1/ping")
    arrive()
    connection.close()


def prepared(folder: RoundPaths, batch: int) -> Figures:
    """Bodies that are there already: nothing is read or decoded."""
    calls, count = list(bodies(folder.shared / backlog_of(batch))), events(batch, folder.quick)
    with serving(folder.own / "server", count) as server:
        return backlog.measured(count, lambda: post(server, calls))


def bare(folder: RoundPaths, batch: int) -> Figures:
    """Read, decoded and encoded anew between the calls; no file is removed."""
    directory, count = folder.shared / backlog_of(batch), events(batch, folder.quick)
    with serving(folder.own / "server", count) as server:
        return backlog.measured(count, lambda: post(server, bodies(directory)))


def ours(folder: RoundPaths, batch: int) -> Figures:
    """By an outbox with its defaults."""
    count = events(batch, folder.quick)
    with serving(folder.own / "server", count) as server:
        url = f"spacetimedb://:{server.token}@127.0.0.1:{server.port}/bench?confirm_wait={CONFIRM_WAIT_S}"
        return backlog.by_an_outbox(folder, backlog_of(batch), count, url)


def contestants() -> Iterator[Contestant]:
    """Two for each size of a call, and the bound from above."""
    yield Contestant(f"http.client, prepared bodies, {sample.BATCH} a call", partial(prepared, batch=sample.BATCH))
    for batch in SIZES:
        yield Contestant(bare_name(batch), partial(bare, batch=batch))
        yield Contestant(our_name(batch), partial(ours, batch=batch), ours=True)
