"""The connection pool. Each connection remembers the transport that carried its last response.

A server that was restarted must not confirm what its predecessor answered, so `PooledConnection.last_used` holds the very
`Http1Connection` that carried the last response. A connection that was closed is replaced at the next request.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pillarbox.sinks.spacetimedb.http1 import ConnectionBrokenError, Http1Connection, connect
from pillarbox.sinks.spacetimedb.responses import SpacetimeDbResponse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.sinks.spacetimedb.url import SpacetimeDbSettings

_PORTS: Final = {"http": 80, "https": 443}


class TransportError(Exception):
    """No answer came back; the message says why."""


class PooledConnection:
    """One connection, one call at a time."""

    def __init__(self, target: SpacetimeDbSettings) -> None:
        self.lock = asyncio.Lock()
        self.last_used: Any = None
        self._server = target.server
        self._timeout_s = target.timeout_s
        parts = urlsplit(target.server)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        self._headers = [("Host", parts.netloc)]
        if target.token:
            self._headers += target.token.auth_header().items()
        self._connection: Http1Connection | None = None

    async def request(
        self, method: str, path: str, content: bytes | None = None, content_type: str = "application/json"
    ) -> SpacetimeDbResponse:
        """One request; raises `TransportError`."""
        headers = self._headers
        if content is not None:
            headers = [*headers, ("Content-Type", content_type), ("Content-Length", str(len(content)))]
        connection = await self._connect()
        try:
            response = await connection.request(method, path, headers, content or b"", self._timeout_s)
        except TimeoutError:
            raise TransportError(f"{self._server} did not answer in time; timeout= in the sink's URL allows it more") from None
        except ConnectionBrokenError as error:
            raise TransportError(f"the connection to {self._server} broke ({error})") from None
        self.last_used = connection
        found = dict(response.headers)
        timed = b"spacetime-execution-duration-micros" in found
        kind, after = (found.get(name, b"").decode("latin-1") for name in (b"content-type", b"retry-after"))
        return SpacetimeDbResponse(response.status, kind, after, response.body, timed)

    async def _connect(self) -> Http1Connection:
        if self._connection is None or self._connection.is_closed:
            try:
                self._connection = await connect(self._host, self._port, self._timeout_s, secure=self._secure)
            except OSError as error:
                text = str(error) or type(error).__name__
                advice = "is the server running, and are host and port right?"
                raise TransportError(f"{self._server} cannot be reached ({text}): {advice}") from error
        return self._connection

    async def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
            await self._connection.wait_closed()


class ConnectionPool:
    """The pool: calls go over the lane that has been idle for longest."""

    def __init__(self, target: SpacetimeDbSettings) -> None:
        self.connections = [PooledConnection(target) for _ in range(target.connections)]
        self._next = 0

    def pick(self) -> PooledConnection:
        """A lane that nobody uses, or else the next."""
        for step in range(len(self.connections)):
            lane = self.connections[(self._next + step) % len(self.connections)]
            if not lane.lock.locked():
                break
        else:
            lane = self.connections[self._next]
        self._next = (self.connections.index(lane) + 1) % len(self.connections)
        return lane

    async def close(self) -> None:
        """Hang up everywhere."""
        for lane in self.connections:
            await lane.close()


def group_by_connection(marks: Iterable[tuple[PooledConnection, Any]]) -> dict[PooledConnection, set[Any]]:
    """The sockets that were used, by lane."""
    found: dict[PooledConnection, set[Any]] = {}
    for lane, socket in marks:
        found.setdefault(lane, set()).add(socket)
    return found
