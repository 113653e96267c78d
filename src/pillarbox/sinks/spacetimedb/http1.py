"""HTTP/1.1 over one connection: h11 speaks it, asyncio carries it. One request at a time, and nothing is tried again here.

Not a client that pools, for a lane must know its connection, and because such a client takes longer for a call than the server.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import certifi
import h11

if TYPE_CHECKING:
    from collections.abc import Sequence

_CLOSED_EARLY: Final = "the server hung up without an answer"
RESPONSE_BYTES_MAX: Final = 16 * 2**20  # of one answer; more is none of SpacetimeDB's
_HAPPY_EYEBALLS_DELAY_S: Final = 0.25  # before another address of the host is tried beside one that does not answer (RFC 8305)


class ConnectionBrokenError(Exception):
    """There is no connection any more, or none that can be used; the message says why."""


class Http1Response(NamedTuple):
    """What came back; names of headers are in small letters."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


async def connect(host: str, port: int, timeout_s: float, *, secure: bool) -> Http1Connection:
    """A new connection; raises `OSError`, of which `TimeoutError` is one."""
    loop = asyncio.get_running_loop()
    context = _ssl_context() if secure else None
    async with asyncio.timeout(timeout_s):
        _, connection = await loop.create_connection(
            Http1Connection, host, port, ssl=context, happy_eyeballs_delay=_HAPPY_EYEBALLS_DELAY_S
        )
    return connection


def _ssl_context() -> ssl.SSLContext:
    """Whom to believe that the server is who it says: the system's authorities, and those of certifi."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


class Http1Connection(asyncio.Protocol):
    """One connection; once something has gone wrong with it, it is closed."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT)
        self._loop = asyncio.get_running_loop()
        self._closed = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._response: asyncio.Future[Http1Response] | None = None  # of the request that is under way
        self._head: h11.Response | None = None
        self._body: list[bytes] = []
        self._body_bytes_left = 0  # for more of it, in bytes
        self._timeout_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be asked over it any more."""
        return self._transport is None or self._transport.is_closing()

    async def request(
        self, method: str, target: str, headers: list[tuple[str, str]], content: bytes, timeout_s: float
    ) -> Http1Response:
        """Send a request and wait for what comes back; raises `ConnectionBrokenError`, and `TimeoutError`.

        The latter where the request is not sent in so long, and where so long nothing of the answer comes. `headers` have the
        content's length where there is any. Given up, the connection is closed: nobody knows what comes.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionBrokenError("closed before anything was sent")
        self._head = None
        self._body.clear()
        self._body_bytes_left = RESPONSE_BYTES_MAX
        self._response = self._loop.create_future()
        self._timeout_s = timeout_s
        self._restart_timer()
        try:
            self._transport.write(self._serialize(method, target, headers, content))
            return await self._response
        except h11.LocalProtocolError as error:
            self.close()
            raise ConnectionBrokenError(str(error)) from None
        except BaseException:
            self.close()
            raise
        finally:
            self._response = None
            if self._timer is not None:
                self._timer.cancel()

    def _serialize(self, method: str, target: str, headers: list[tuple[str, str]], content: bytes) -> bytes:
        send = self._http.send
        parts = [send(h11.Request(method=method, target=target, headers=headers))]
        if content:
            parts.append(send(h11.Data(data=content)))
        parts.append(send(h11.EndOfMessage()))
        return b"".join(filter(None, parts))

    def close(self) -> None:
        """Hang up at once."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Wait until it is, after `close`."""
        if self._transport is not None:
            await asyncio.shield(self._closed)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(0)  # `resume_writing` means that all is sent

    def resume_writing(self) -> None:
        """All of the request is sent."""
        self._restart_timer()

    def data_received(self, data: bytes) -> None:
        """A part of an answer, or all of it."""
        self._receive_data(data)

    def eof_received(self) -> None:
        """The server has hung up: an answer whose length it has not named ends with that."""
        if self._head is None:
            self._fail_request(ConnectionBrokenError(_CLOSED_EARLY))
        self._receive_data(b"")

    def connection_lost(self, error: Exception | None) -> None:
        """It is no more."""
        self._fail_request(ConnectionBrokenError(str(error) if error else _CLOSED_EARLY))
        self._closed.set_result(None)

    def _receive_data(self, data: bytes) -> None:
        try:
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Response):
                    self._head = event
                elif isinstance(event, h11.Data):
                    self._body.append(bytes(event.data))
                    self._body_bytes_left -= len(event.data)
                    if self._body_bytes_left < 0:
                        raise h11.RemoteProtocolError(f"the answer has more than {RESPONSE_BYTES_MAX} bytes")  # noqa: TRY301 - one ending
                elif not isinstance(event, h11.InformationalResponse):
                    break
        except h11.RemoteProtocolError as error:
            self._fail_request(ConnectionBrokenError(str(error)))
            self.close()
            return
        if isinstance(event, h11.EndOfMessage):
            self._complete_response()
        else:
            self._restart_timer()

    def _complete_response(self) -> None:
        # What came behind the answer is none to the next request.
        if (
            self._http.our_state is self._http.their_state is h11.DONE
            and not self._unsent_bytes()
            and not self._http.trailing_data[0]
        ):
            self._http.start_next_cycle()
        else:
            self.close()
        if self._response is not None and not self._response.done() and self._head is not None:
            self._response.set_result(Http1Response(self._head.status_code, self._head.headers, b"".join(self._body)))

    def _unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    # How long nothing may move.

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._response is not None and not self._response.done():
            self._timer = self._loop.call_later(self._timeout_s, self._fail_request, TimeoutError())

    def _fail_request(self, error: Exception) -> None:
        if self._response is not None and not self._response.done():
            self._response.set_exception(error)
