"""Connections that know themselves: a server that is another one by now must not confirm what its predecessor has answered.

Each lane is one HTTP connection. Its `socket` is the very connection that the last answer came over; a client that reconnects
silently gets another one.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import httpcore

from pillarbox.sinks.spacetimedb.answers import Reply

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.sinks.spacetimedb.target import Target

_BROKEN = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)


class _NoTokens(logging.Filter):
    """Keeps out of the log what the HTTP library writes at DEBUG: the server's answers repeat the caller's token."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "spacetime-identity-token" not in record.getMessage()


logging.getLogger("httpcore.http11").addFilter(_NoTokens())


class TransportError(Exception):
    """No answer came back; the message says why."""


class Lane:
    """One connection, one call at a time."""

    def __init__(self, target: Target) -> None:
        self.lock = asyncio.Lock()
        self.socket: Any = None
        self._server = target.server
        self._headers: dict[bytes | str, bytes | str] = target.token.header() if target.token else {}
        self._timeouts = dict.fromkeys(("connect", "read", "write", "pool"), target.timeout_s)
        self._pool = httpcore.AsyncConnectionPool(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)

    async def call(self, method: str, path: str, content: bytes | None = None, content_type: str = "application/json") -> Reply:
        """One request; raises `TransportError`."""
        headers = dict(self._headers)
        if content is not None:
            headers["Content-Type"] = content_type
        try:
            response = await self._pool.request(
                method, f"{self._server}{path}", headers=headers, content=content, extensions={"timeout": self._timeouts}
            )
        except _BROKEN as error:
            raise TransportError(_in_words(error, self._server)) from error
        self.socket = response.extensions.get("network_stream")
        found = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        timed = b"spacetime-execution-duration-micros" in found
        return Reply(response.status, found.get(b"content-type", ""), found.get(b"retry-after", ""), response.content, timed)

    async def close(self) -> None:
        """Hang up."""
        await self._pool.aclose()


class Lanes:
    """The pool: calls go over the lane that has been idle for longest."""

    def __init__(self, target: Target) -> None:
        self.all = [Lane(target) for _ in range(target.connections)]
        self._next = 0

    def idle(self) -> Lane:
        """A lane that nobody uses, or else the next."""
        for step in range(len(self.all)):
            lane = self.all[(self._next + step) % len(self.all)]
            if not lane.lock.locked():
                break
        else:
            lane = self.all[self._next]
        self._next = (self.all.index(lane) + 1) % len(self.all)
        return lane

    async def close(self) -> None:
        """Hang up everywhere."""
        for lane in self.all:
            await lane.close()


def used(marks: Iterable[tuple[Lane, Any]]) -> dict[Lane, set[Any]]:
    """The sockets that were used, by lane."""
    found: dict[Lane, set[Any]] = {}
    for lane, socket in marks:
        found.setdefault(lane, set()).add(socket)
    return found


def _in_words(error: Exception, server: str) -> str:
    """What went wrong on the way, and what to look at."""
    text = str(error) or type(error).__name__
    if isinstance(error, httpcore.ConnectTimeout | httpcore.ConnectError):
        return f"{server} cannot be reached ({text}): is the server running, and are host and port right?"
    if isinstance(error, httpcore.TimeoutException):
        return f"{server} did not answer in time ({text}); timeout= in the sink's URL allows it more"
    return f"the connection to {server} broke ({text})"
