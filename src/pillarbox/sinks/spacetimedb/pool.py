"""Connections that know themselves: a server that is another one by now must not confirm what its predecessor has answered.

Each lane is one HTTP connection, which `wire.py` speaks. Its `socket` is the very connection that the last answer came over; a
lane whose connection was closed makes another one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pillarbox.sinks.spacetimedb.http1 import Connection, WireError, connect
from pillarbox.sinks.spacetimedb.responses import Reply

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.sinks.spacetimedb.url import Target

_PORTS: Final = {"http": 80, "https": 443}


class TransportError(Exception):
    """No answer came back; the message says why."""


class Lane:
    """One connection, one call at a time."""

    def __init__(self, target: Target) -> None:
        self.lock = asyncio.Lock()
        self.socket: Any = None
        self._server = target.server
        self._timeout_s = target.timeout_s
        parts = urlsplit(target.server)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        self._headers = [("Host", parts.netloc)]
        if target.token:
            self._headers += target.token.header().items()
        self._connection: Connection | None = None

    async def call(self, method: str, path: str, content: bytes | None = None, content_type: str = "application/json") -> Reply:
        """One request; raises `TransportError`."""
        headers = self._headers
        if content is not None:
            headers = [*headers, ("Content-Type", content_type), ("Content-Length", str(len(content)))]
        connection = await self._connected()
        try:
            answer = await connection.ask(method, path, headers, content or b"", self._timeout_s)
        except TimeoutError:
            raise TransportError(f"{self._server} did not answer in time; timeout= in the sink's URL allows it more") from None
        except WireError as error:
            raise TransportError(f"the connection to {self._server} broke ({error})") from None
        self.socket = connection
        found = dict(answer.headers)
        timed = b"spacetime-execution-duration-micros" in found
        kind, after = (found.get(name, b"").decode("latin-1") for name in (b"content-type", b"retry-after"))
        return Reply(answer.status, kind, after, answer.body, timed)

    async def _connected(self) -> Connection:
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
            await self._connection.closed()


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
