"""The connection pool. Each connection remembers the transport that carried its last response.

A server that was restarted must not confirm what its predecessor answered, so `PooledConnection.last_used` holds the very
`Http1Connection` that carried the last response. A connection that was closed is replaced at the next request.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pillarbox.redaction import excerpt
from pillarbox.sinks.spacetimedb.http1 import ConnectionBrokenError, Http1Connection, connect
from pillarbox.sinks.spacetimedb.responses import SpacetimeDbResponse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.sinks.spacetimedb.url import SpacetimeDbSettings

_EXCERPT_CHARS_MAX: Final = 200
_PORTS: Final = {"http": 80, "https": 443}


class TransportError(Exception):
    """A request got no response. The message says why."""


class UntrustedCertificateError(TransportError):
    """The server's certificate is not trusted; a person must change something."""


class PooledConnection:
    """One reusable connection; `lock` allows one request at a time."""

    def __init__(self, settings: SpacetimeDbSettings) -> None:
        self.lock = asyncio.Lock()
        self.last_used: Any = None
        self._server = settings.server
        self._timeout_s = settings.timeout_s
        parts = urlsplit(settings.server)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        self._headers = [("Host", parts.netloc)]
        if settings.token:
            self._headers += settings.token.auth_header().items()
        self._redact = settings.redactor()
        self._connection: Http1Connection | None = None

    async def request(
        self, method: str, path: str, content: bytes | None = None, content_type: str = "application/json"
    ) -> SpacetimeDbResponse:
        """Send one request; connects first where necessary. Raises `TransportError`."""
        headers = self._headers
        if content is not None:
            headers = [*headers, ("Content-Type", content_type), ("Content-Length", str(len(content)))]
        connection = await self._connect()
        try:
            response = await connection.request(method, path, headers, content or b"", self._timeout_s)
        except TimeoutError:
            raise TransportError(
                f"{self._server} did not respond in {self._timeout_s:g} s; timeout= in the sink's URL sets another limit"
            ) from None
        except ConnectionBrokenError as error:
            raise TransportError(
                f"the connection to {self._server} broke ({excerpt(str(error), _EXCERPT_CHARS_MAX, self._redact)})"
            ) from None
        self.last_used = connection
        values = dict(response.headers)
        has_execution_time = b"spacetime-execution-duration-micros" in values
        kind, after, date = (values.get(name, b"").decode("latin-1") for name in (b"content-type", b"retry-after", b"date"))
        return SpacetimeDbResponse(response.status, kind, after, response.body, has_execution_time, self._redact, date)

    async def _connect(self) -> Http1Connection:
        if self._connection is None or self._connection.is_closed:
            try:
                self._connection = await connect(self._host, self._port, self._timeout_s, secure=self._secure)
            except ssl.SSLCertVerificationError as error:
                problem = excerpt(error.verify_message, _EXCERPT_CHARS_MAX, self._redact)
                raise UntrustedCertificateError(
                    f"the certificate of {self._server} is not trusted ({problem}): replace it, or name a file with the "
                    "authority that issued it in the environment variable SSL_CERT_FILE"
                ) from None
            except OSError as error:
                text = str(error) or type(error).__name__
                advice = "check that the server is running, and the host and port in the URL"
                raise TransportError(f"cannot connect to {self._server} ({text}): {advice}") from error
        return self._connection

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            await self._connection.wait_closed()


class ConnectionPool:
    """A fixed number of connections; requests use the one that has been idle for longest."""

    def __init__(self, settings: SpacetimeDbSettings) -> None:
        self.connections = [PooledConnection(settings) for _ in range(settings.connections)]
        self._next = 0

    def pick(self) -> PooledConnection:
        """Return an idle connection, or the next in turn where all are in use."""
        for step in range(len(self.connections)):
            connection = self.connections[(self._next + step) % len(self.connections)]
            if not connection.lock.locked():
                break
        else:
            connection = self.connections[self._next]
        self._next = (self.connections.index(connection) + 1) % len(self.connections)
        return connection

    async def close(self) -> None:
        """Close all connections."""
        for connection in self.connections:
            await connection.close()


def group_by_connection(calls: Iterable[tuple[PooledConnection, Any]]) -> dict[PooledConnection, set[Any]]:
    """Group the transports that carried responses by their pooled connection."""
    transports: dict[PooledConnection, set[Any]] = {}
    for connection, transport in calls:
        transports.setdefault(connection, set()).add(transport)
    return transports
