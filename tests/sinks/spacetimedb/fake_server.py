"""A fake SpacetimeDB server that responds as recorded from a standalone server 2.8.3.

Versions after 1.2.0 cannot be built where these tests run. The fake has one database, `events`, with our module. It returns the
schema of the real 1.2.0 server, changed as 2.x does: variants in camelCase, procedures, a count as JSON, the text of a 404, and
a query that waits for durability.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "the-token-of-the-fake-server"  # noqa: S105 - not a real token
FUNCTION = "record_tracking_events"
BODY_MAX = 2_097_152


class FakeServer28:
    """Serves on a free port until `stop`; `stored_rows` has the called rows, and `confirm_count` counts the queries."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = _as_2x(schema)
        self.stored_rows: dict[str, list[Any]] = {}
        self.published_modules: dict[str, bytes] = {}
        self.confirm_count = 0
        self.confirm_response = (
            200,
            b'[{"schema":{"elements":[]},"rows":[[1]]}]',
            "application/json",
        )  # the response to the query
        self.call_count = 0
        self.start(0)

    def start(self, port: int) -> None:
        """Serve on this port."""
        outer = self
        self._open: set[socket.socket] = set()

        class BoundHandler(_Handler):
            fake_server = outer

            def setup(self) -> None:
                outer._open.add(self.request)
                super().setup()

        self._server = ThreadingHTTPServer(("127.0.0.1", port), BoundHandler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Stop, and close all connections."""
        self._server.shutdown()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def sink_url(self, database: str = "events", token: str = TOKEN, **options: object) -> str:
        """Return the sink's URL."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"spacetimedb://:{token}@127.0.0.1:{self.port}/{database}?{query}"


def _as_2x(schema: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(schema))
    for kind in changed["typespace"]["types"]:
        for variant in kind.get("Sum", {}).get("variants", []):
            name = variant["name"]["some"]
            variant["name"]["some"] = name[0].lower() + name[1:]
    (reducer,) = changed["reducers"]
    result = {"Sum": {"variants": [_named("ok", {"U32": []}), _named("err", {"String": []})]}}
    for name, returns in ((f"{FUNCTION}_counted", result), ("count_only", {"U32": []})):
        changed["misc_exports"].append({"Procedure": {"name": name, "params": reducer["params"], "return_type": returns}})
    return changed


def _named(name: str, kind: dict[str, Any]) -> dict[str, Any]:
    return {"name": {"some": name}, "algebraic_type": kind}


class _Handler(BaseHTTPRequestHandler):
    fake_server: FakeServer28
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Log nothing."""

    def _respond(self, status: int, body: bytes = b"", kind: str = "text/plain; charset=utf-8", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Respond to ping, version and schema requests."""
        match self.path.partition("?")[0]:
            case "/v1/ping":
                self._respond(200)
            case "/v1/health":
                self._respond(200, b'{"version":"2.8.3"}', "application/json")
            case "/v1/database/events/schema":
                self._respond(200, json.dumps(self.fake_server.schema).encode(), "application/json")
            case _:
                self._respond(404, b"No such database.")

    def do_PUT(self) -> None:
        """Accept a module."""
        database = self.path.rpartition("/")[2]
        self.fake_server.published_modules[database] = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        success = {"domain": database, "database_identity": "c200aa", "op": "created"}
        self._respond(200, json.dumps({"Success": success}).encode(), "application/json")

    def do_POST(self) -> None:
        """Respond to calls, queries and new identities."""
        length = int(self.headers.get("Content-Length", "0"))
        body = self.rfile.read(length)
        if length > BODY_MAX:
            self._respond(413, b"Failed to buffer the request body: length limit exceeded")
        elif self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
            self._respond(401, b"TokenError(Error(InvalidToken))")
        elif self.path == "/v1/database/events/sql":
            self.fake_server.confirm_count += 1
            self._respond(*self.fake_server.confirm_response)
        elif self.path.startswith("/v1/database/events/call/"):
            self._call(self.path.rpartition("/")[2], body)
        elif self.path == "/v1/identity":
            self._respond(200, json.dumps({"identity": "c200bb", "token": TOKEN}).encode(), "application/json")
        else:
            self._respond(404, b"No such database.")

    def _call(self, function: str, body: bytes) -> None:
        self.fake_server.call_count += 1
        if self.headers.get("Content-Type") != "application/json":
            self._respond(415, b"Expected request with `Content-Type: application/json`")
            return
        if function not in (FUNCTION, f"{FUNCTION}_counted", "count_only"):
            self._respond(404, b"No such procedure")
            return
        (events,) = json.loads(body)
        times: dict[str, Any] = {"spacetime_execution_duration_micros": "1"}
        for index, row in enumerate(events):
            if not row[0]:
                message = f"event[{index}].event_id: must not be empty"
                if function == FUNCTION:
                    self._respond(530, message.encode(), **times)
                else:
                    self._respond(200, json.dumps([1, message]).encode(), "application/json", **times)
                return
            if row[1] == "panic":
                self._respond(530 if function == FUNCTION else 500, b"The instance encountered a fatal error.", **times)
                return
        fresh = [row for row in events if row[0] not in self.fake_server.stored_rows]
        self.fake_server.stored_rows |= {row[0]: row for row in events}
        if function == FUNCTION:
            self._respond(200, spacetime_energy_used="1", **times)
        else:
            value: Any = len(fresh) if function == "count_only" else [0, len(fresh)]
            self._respond(200, json.dumps(value).encode(), "application/json", **times)
