"""A small HTTP server for one page. No client can make it hold more than a few descriptors or wait for long.

One thread serves all connections. A request must be complete within `_REQUEST_MAX_S` and its head within `_HEAD_BYTES_MAX`;
beyond `_CONNECTIONS_MAX` connections the one that has been open for longest is closed, so that clients that send slowly or
nothing cannot keep a scraper out, nor take descriptors from delivery. Every connection carries one request.

On a loopback address the header `Host` must name this machine: a web page that resolves its own name to 127.0.0.1 (DNS
rebinding) could otherwise read the metrics through a browser on this machine.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

from pillarbox.clock import SystemClock
from pillarbox.store.state_log import StateLog
from pillarbox.system.sockets import SHUT_WR, Socket, gethostname, selectors, socket_pair

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("pillarbox")

_PATH: Final = "/metrics"
_REQUEST_MAX_S: Final = 5.0  # for a whole request, and then for its response
_HEAD_BYTES_MAX: Final = 8192  # bytes of the request line and the headers
_CONNECTIONS_MAX: Final = 8  # open connections; a scraper needs one
_ACCEPT_PAUSE_S: Final = 1.0  # pause after an accept that failed for lack of descriptors
_READ_BYTES: Final = 4096
_LOCAL_NAMES: Final = ("localhost", "localhost.localdomain", "ip6-localhost")


class Response(NamedTuple):
    """A response; `Content-Length` and `Connection` are added when it is sent."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes

    def to_bytes(self) -> bytes:
        """The response as it is sent."""
        own = [("Content-Length", str(len(self.body))), ("Connection", "close"), ("Server", "pillarbox")]
        lines = "".join(f"{name}: {value}\r\n" for name, value in [*self.headers, *own])
        return f"HTTP/1.1 {self.status}\r\n{lines}\r\n".encode("latin-1") + self.body


def _error(status: str, text: str, *headers: tuple[str, str]) -> Response:
    plain = [("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff"), *headers]
    return Response(status, plain, f"{text}\n".encode())


class _Connection:
    """One connection: first its request is read, then its response is written."""

    def __init__(self, client: Socket, deadline: float) -> None:
        self.client = client
        self.deadline = deadline
        self.received = bytearray()
        self.unsent = memoryview(b"")


class ScrapeServer:
    """Serves one page on a listening socket, from `serve` until `stop`.

    Args:
        listener: The socket; it belongs to the server from now on.
        host: The name or address in the setting, by which clients may call this machine.
        render: Makes the page for the query and the headers of a request; header names are in lower case.
    """

    def __init__(self, listener: Socket, host: str, render: Callable[[str, dict[str, str]], Response]) -> None:
        self._listener = listener
        self._names = {*_LOCAL_NAMES, host.lower().rstrip("."), gethostname().lower()}
        self._render = render
        self._clock = SystemClock()
        self._defect_log = StateLog(self._clock)
        self._selector = selectors.DefaultSelector()
        self._connections: dict[Socket, _Connection] = {}  # the oldest first
        self._accept_again_at: float | None = None  # monotonic; None while it accepts
        self._wakeup, self._wakeup_writer = socket_pair()
        for end in (listener, self._wakeup, self._wakeup_writer):
            end.setblocking(False)  # noqa: FBT003 - the socket module's own signature
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)

    def stop(self) -> None:
        """Make `serve` return. Safe from another thread."""
        with contextlib.suppress(OSError):  # the pipe is full or closed: `serve` returns anyway
            self._wakeup_writer.send(b"x")

    def serve(self) -> None:
        """Serve until `stop`; then close everything."""
        try:
            while True:
                for key, _ in self._selector.select(self._seconds_until_due()):
                    if key.fileobj is self._wakeup:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif (known := self._connections.get(key.fileobj)) is not None:
                        self._advance(known)
        finally:
            for connection in list(self._connections.values()):
                self._close(connection)
            self._selector.close()
            for end in (self._listener, self._wakeup, self._wakeup_writer):
                end.close()

    def _seconds_until_due(self) -> float | None:
        """Close the connections that are late; return when the next one will be, None if there is none."""
        now = self._clock.monotonic()
        for connection in [one for one in self._connections.values() if one.deadline <= now]:
            self._close(connection)
        if self._accept_again_at is not None and self._accept_again_at <= now:
            self._accept_again_at = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        times = [one.deadline for one in self._connections.values()]
        times += [] if self._accept_again_at is None else [self._accept_again_at]
        return max(0.0, min(times) - now) if times else None

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # the client has gone
            return
        except OSError:  # no descriptor is left, and delivery needs the next ones more than a scraper does
            self._selector.unregister(self._listener)
            self._accept_again_at = self._clock.monotonic() + _ACCEPT_PAUSE_S
            return
        client.setblocking(False)  # noqa: FBT003 - the socket module's own signature
        connection = _Connection(client, self._clock.monotonic() + _REQUEST_MAX_S)
        self._connections[client] = connection
        self._selector.register(client, selectors.EVENT_READ)
        self._advance(connection)  # a scraper sends its request at once, so that it is served before it could be closed
        while len(self._connections) > _CONNECTIONS_MAX:
            self._close(next(iter(self._connections.values())))

    def _close(self, connection: _Connection) -> None:
        if self._connections.pop(connection.client, None) is not None:
            self._selector.unregister(connection.client)
            connection.client.close()

    def _advance(self, connection: _Connection) -> None:
        """Read or write as much as is possible without waiting."""
        try:
            if not connection.unsent:
                self._receive(connection)
            while connection.unsent:
                connection.unsent = connection.unsent[connection.client.send(connection.unsent) :]
                if not connection.unsent:
                    connection.client.shutdown(SHUT_WR)
                    self._close(connection)
        except BlockingIOError:
            pass
        except OSError:  # the client has disconnected
            self._close(connection)

    def _receive(self, connection: _Connection) -> None:
        while b"\r\n\r\n" not in connection.received:
            if len(connection.received) > _HEAD_BYTES_MAX:
                self._respond(connection, _error("431 Request Header Fields Too Large", "the request is too long"))
                return
            data = connection.client.recv(_READ_BYTES)
            if not data:
                self._close(connection)
                return
            connection.received += data
        head = bytes(connection.received).partition(b"\r\n\r\n")[0].decode("latin-1")
        self._respond(connection, self._answer(head, connection.client))

    def _respond(self, connection: _Connection, response: Response) -> None:
        connection.unsent = memoryview(response.to_bytes())
        connection.deadline = self._clock.monotonic() + _REQUEST_MAX_S
        self._selector.modify(connection.client, selectors.EVENT_WRITE)

    def _answer(self, head: str, client: Socket) -> Response:
        request_line, *lines = head.split("\r\n")
        words = request_line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _error("400 Bad Request", "the request is not HTTP/1.1")
        method, target, version = words
        pairs = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        headers = dict(pairs)
        if sum(name == "host" for name, _ in pairs) > 1 or ("host" not in headers and version != "HTTP/1.0"):
            return _error("400 Bad Request", "the request needs one header Host")
        if "host" in headers and not self._is_own_name(headers["host"], client):
            advice = "start pillarbox deliver with --metrics NAME:PORT to allow another name"
            return _error("421 Misdirected Request", f"the header Host does not name this machine: {advice}")
        try:
            parts = urlsplit(target)
        except ValueError:
            return _error("400 Bad Request", "the request's target is not a URL")
        if parts.path != _PATH:
            return _error("404 the metrics are at /metrics", "the metrics are at /metrics")
        if method != "GET":
            return _error("405 Method Not Allowed", "use GET", ("Allow", "GET"))
        try:
            return self._render(parts.query, headers)
        except Exception as error:
            if self._defect_log.is_new_problem(f"{type(error).__name__}: {error}"):
                log.exception("the metrics could not be collected")
            return _error("500 Internal Server Error", "the metrics could not be collected")

    def _is_own_name(self, host: str, client: Socket) -> bool:
        """Whether a request may name this machine so; if the server listens on another address than loopback, any name may."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            local = ipaddress.ip_address(client.getsockname()[0].partition("%")[0])
        except ValueError:
            return False
        if not name or any(character in host for character in "/@?#\\ "):
            return False
        mapped = getattr(local, "ipv4_mapped", None)
        if not (mapped or local).is_loopback or name in self._names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return False
        return True
