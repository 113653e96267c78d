"""Enqueue while the server is killed with -9 and restarted at random, and compare its table with what was acknowledged."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

import pillarbox

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "var" / "spacetimedb"
MORE = 100_000
KILLS = 10


class Server:
    """A standalone server on a free port of this machine."""

    def __init__(self) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        place = ["--data-dir", str(PLACE / "data"), "--jwt-key-dir", str(PLACE / "keys")]
        command = [os.environ["PILLARBOX_EXAMPLE_SERVER"], "start", "--listen-addr", f"127.0.0.1:{self.port}", *place]
        with (PLACE / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(3000):
            try:
                if self.ask("GET", "/v1/ping") is not None:
                    return
            except OSError:
                time.sleep(0.02)
        raise SystemExit(f"the server does not start; see {PLACE / 'server.log'}")

    def kill(self) -> None:
        """As a crash does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def ask(self, method: str, path: str, body: str | None = None, token: str = "") -> bytes:
        """The body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request(method, path, body, headers)
            return connection.getresponse().read()
        finally:
            connection.close()


def events() -> list[pillarbox.TrackingEvent]:
    """The 127 of the sample, and 100,000 more."""
    lines = (ROOT / "examples" / "data" / "events.ndjson").read_bytes().splitlines()
    sample = [msgspec.json.decode(line, type=pillarbox.TrackingEvent) for line in lines]
    more = [
        pillarbox.TrackingEvent(
            event_key="move", scope_kind="Profile", scope_id=f"player-{n % 97}", metadata_json=f'{{"n":{n}}}'
        )
        for n in range(MORE)
    ]
    return sample + more


def crash_at_random(server: Server, kills: list[int]) -> None:
    """Ten times, at moments that nobody has chosen."""
    moments = random.Random()  # noqa: S311 - no secret
    for number in range(1, KILLS + 1):
        time.sleep(moments.uniform(0.1, 1.2))
        server.kill()
        time.sleep(moments.uniform(0.0, 0.3))
        server.start()
        kills.append(number)
        print(f"  kill -9, and started again: {number} of {KILLS}", flush=True)


def main() -> None:
    """Publish, enqueue, crash, compare."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    server = Server()
    try:
        acknowledged, outbox = deliver_through_crashes(server)
        compare(server, acknowledged, outbox)
    finally:
        server.kill()


def deliver_through_crashes(server: Server) -> tuple[set[str], pillarbox.Stats]:
    """The ids for which `Enqueued` was answered, once all of them are settled."""
    token = PLACE / "owner.token"
    command = [sys.executable, "-m", "pillarbox", "spacetimedb", "publish", "--server", server.url]
    subprocess.run([*command, "--database", "game-events", "--token-file", str(token)], check=True)
    url = f"spacetimedb://127.0.0.1:{server.port}/game-events?token_file={token}"
    kills: list[int] = []
    acknowledged: set[str] = set()
    crashes = threading.Thread(target=crash_at_random, args=(server, kills))
    print(f"\nEnqueueing {MORE + 127:,} events while the server is killed {KILLS} times:", flush=True)
    with pillarbox.Outbox(str(PLACE / "outbox"), sink=url) as outbox:
        crashes.start()
        for number, event in enumerate(events()):
            if outbox.enqueue(event):
                acknowledged.add(event.event_id)
            if number % 1000 == 0:
                time.sleep(0.05)  # an application has other things to do
        crashes.join()
        if len(kills) < KILLS:
            raise SystemExit("the server did not come back; see the lines above")
        print("  waiting for the rest", flush=True)
        if not outbox.flush(timeout=300):
            raise SystemExit(f"not everything was settled in five minutes: {outbox.stats()}")
        server.kill()  # what is settled by now must be there afterwards
        server.start()
        return acknowledged, outbox.stats()


def compare(server: Server, acknowledged: set[str], stats: pillarbox.Stats) -> None:
    """What the table has, against what was acknowledged and deleted here."""
    token = (PLACE / "owner.token").read_text().strip()
    answer = server.ask("POST", "/v1/database/game-events/sql", "SELECT event_id FROM tracking_event", token)
    found = [row[0] for row in json.loads(answer)[0]["rows"]]
    left = sorted(file.name for file in (PLACE / "outbox").glob("*.ndjson"))
    print(f"\nacknowledged   {len(acknowledged):,}")
    print(f"in the table   {len(found):,}, of them different {len(set(found)):,}")
    print(f"missing        {len(acknowledged - set(found))}")
    print(f"delivered      {stats.delivered:,}, dead letters {stats.dead}, attempts that failed {stats.failed_flushes}")
    if set(found) != acknowledged or len(found) != len(acknowledged) or left or stats.dead:
        raise SystemExit(f"That is not what was promised. Left here: {left}")
    print("All there, none twice, and nothing was deleted here that is missing there.")


if __name__ == "__main__":
    main()
