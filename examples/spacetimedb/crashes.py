"""Enqueue while the server is killed with -9 and restarted at random, then compare its table with the accepted events."""

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
WORK_DIR = ROOT / "var" / "spacetimedb"
EVENTS = 100_000
KILLS = 10


class Server:
    """A standalone server on a free port of this machine."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start, and wait until it responds."""
        paths = ["--data-dir", str(WORK_DIR / "data"), "--jwt-key-dir", str(WORK_DIR / "keys")]
        command = [os.environ["PILLARBOX_EXAMPLE_SERVER"], "start", "--listen-addr", f"127.0.0.1:{self.port}", *paths]
        with (WORK_DIR / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(3000):
            try:
                if self.request("GET", "/v1/ping") is not None:
                    return
            except OSError:
                time.sleep(0.02)
        raise SystemExit(f"the server does not start; see {WORK_DIR / 'server.log'}")

    def kill(self) -> None:
        """Kill with SIGKILL, as in a crash."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def request(self, method: str, path: str, body: str | None = None, token: str = "") -> bytes:
        """Return the body of the response to a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request(method, path, body, headers)
            return connection.getresponse().read()
        finally:
            connection.close()


def events() -> list[pillarbox.TrackingEvent]:
    """Return the 127 events of the sample and 100,000 more."""
    lines = (ROOT / "examples" / "data" / "events.ndjson").read_bytes().splitlines()
    sample = [msgspec.json.decode(line, type=pillarbox.TrackingEvent) for line in lines]
    more = [
        pillarbox.TrackingEvent(
            event_key="move", scope_kind="Profile", scope_id=f"player-{n % 97}", metadata_json=f'{{"n":{n}}}'
        )
        for n in range(EVENTS)
    ]
    return sample + more


def crash_at_random(server: Server, kills: list[int]) -> None:
    """Kill and restart the server ten times, at random times."""
    random_source = random.Random()  # noqa: S311 - not a secret
    for number in range(1, KILLS + 1):
        time.sleep(random_source.uniform(0.1, 1.2))
        server.kill()
        time.sleep(random_source.uniform(0.0, 0.3))
        server.start()
        kills.append(number)
        print(f"  killed and restarted: {number} of {KILLS}", flush=True)


def main() -> None:
    """Publish the module, enqueue through crashes, compare."""
    shutil.rmtree(WORK_DIR, ignore_errors=True)
    WORK_DIR.mkdir(parents=True)
    server = Server()
    try:
        accepted, outbox = deliver_through_crashes(server)
        compare(server, accepted, outbox)
    finally:
        server.kill()


def deliver_through_crashes(server: Server) -> tuple[set[str], pillarbox.Stats]:
    """Enqueue all events through the crashes; return the ids of the accepted ones once they are delivered, and the stats."""
    token = WORK_DIR / "owner.token"
    command = [sys.executable, "-m", "pillarbox", "spacetimedb", "publish", "--server", server.url]
    subprocess.run([*command, "--database", "game-events", "--token-file", str(token)], check=True)
    url = f"spacetimedb://127.0.0.1:{server.port}/game-events?token_file={token}"
    kills: list[int] = []
    accepted: set[str] = set()
    crashes = threading.Thread(target=crash_at_random, args=(server, kills))
    print(f"\nEnqueueing {EVENTS + 127:,} events while the server is killed {KILLS} times:", flush=True)
    with pillarbox.Outbox(str(WORK_DIR / "outbox"), sink=url) as outbox:
        crashes.start()
        for number, event in enumerate(events()):
            if outbox.enqueue(event):
                accepted.add(event.event_id)
            if number % 1000 == 0:
                time.sleep(0.05)  # an application does other work in between
        crashes.join()
        if len(kills) < KILLS:
            raise SystemExit("the server did not restart; see the lines above")
        print("  waiting for the remaining events", flush=True)
        if not outbox.flush(timeout=300):
            raise SystemExit(f"not all events were delivered in five minutes: {outbox.stats()}")
        server.kill()  # delivered events must survive this
        server.start()
        return accepted, outbox.stats()


def compare(server: Server, accepted: set[str], stats: pillarbox.Stats) -> None:
    """Compare the table with the accepted events; exit with an error if they differ."""
    token = (WORK_DIR / "owner.token").read_text().strip()
    response = server.request("POST", "/v1/database/game-events/sql", "SELECT event_id FROM tracking_event", token)
    stored = [row[0] for row in json.loads(response)[0]["rows"]]
    remaining_files = sorted(file.name for file in (WORK_DIR / "outbox").glob("*.ndjson"))
    print(f"\naccepted       {len(accepted):,}")
    print(f"in the table   {len(stored):,}, distinct {len(set(stored)):,}")
    print(f"missing        {len(accepted - set(stored))}")
    print(f"delivered      {stats.delivered:,}, dead letters {stats.dead}, failed attempts {stats.failed_flushes}")
    if set(stored) != accepted or len(stored) != len(accepted) or remaining_files or stats.dead:
        raise SystemExit(f"The guarantee does not hold. Files in the outbox: {remaining_files}")
    print("Every accepted event is in the table exactly once.")


if __name__ == "__main__":
    main()
