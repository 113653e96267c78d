"""HTTP/1.1 over one asyncio connection, parsed by h11. One request at a time; nothing is retried here.

It replaces a pooling HTTP client for two reasons: the sink must know which connection carried a response, and such a client
takes longer for a call than the server does.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import certifi
import h11

if TYPE_CHECKING:
    from collections.abc import Sequence

_CLOSED_EARLY: Final = "the server closed it without a response"
RESPONSE_BYTES_MAX: Final = 16 * 2**20  # bytes of one response; SpacetimeDB sends no larger ones
_HAPPY_EYEBALLS_DELAY_S: Final = 0.25  # delay before the host's next address is tried too (RFC 8305)


class ConnectionBrokenError(Exception):
    """The connection is closed or cannot be used any more. The message says why."""


class Http1Response(NamedTuple):
    """A response; the header names are in lower case."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


async def connect(host: str, port: int, timeout_s: float, *, secure: bool) -> Http1Connection:
    """Open a connection; raises `OSError`, including `TimeoutError`."""
    loop = asyncio.get_running_loop()
    context = _ssl_context() if secure else None
    async with asyncio.timeout(timeout_s):
        _, connection = await loop.create_connection(
            Http1Connection, host, port, ssl=context, happy_eyeballs_delay=_HAPPY_EYEBALLS_DELAY_S
        )
    return connection


def _ssl_context() -> ssl.SSLContext:
    """Return the TLS configuration, which trusts the certificate authorities of the system and of certifi."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


class Http1Connection(asyncio.Protocol):
    """One connection. It closes itself after any error."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT)
        self._loop = asyncio.get_running_loop()
        self._closed = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._response: asyncio.Future[Http1Response] | None = None  # result of the request in flight
        self._head: h11.Response | None = None
        self._body: list[bytes] = []
        self._body_bytes_left = 0  # bytes left until `RESPONSE_BYTES_MAX`
        self._timeout_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_closed(self) -> bool:
        """Whether no further request can be sent."""
        return self._transport is None or self._transport.is_closing()

    async def request(
        self, method: str, target: str, headers: list[tuple[str, str]], content: bytes, timeout_s: float
    ) -> Http1Response:
        """Send a request and wait for the response. If the wait fails or is cancelled, the connection closes.

        Args:
            method: the method.
            target: the path and query.
            headers: all headers, including Content-Length where there is content.
            content: the body.
            timeout_s: how long the connection may make no progress: the request is not sent, or nothing is received.

        Raises:
            ConnectionBrokenError: the connection broke, or the response is not valid HTTP.
            TimeoutError: there was no progress for `timeout_s`.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionBrokenError("closed before the request was sent")
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
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Wait until `close` has taken effect."""
        if self._transport is not None:
            await asyncio.shield(self._closed)

    # The callbacks of asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(0)  # so that `resume_writing` means that everything is sent

    def resume_writing(self) -> None:
        """Restart the timer: the whole request is sent."""
        self._restart_timer()

    def data_received(self, data: bytes) -> None:
        """Process a part of a response."""
        self._receive_data(data)

    def eof_received(self) -> None:
        """Process the end of the stream, which ends a response without a length."""
        if self._head is None:
            self._fail_request(ConnectionBrokenError(_CLOSED_EARLY))
        self._receive_data(b"")

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the request in flight."""
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
                        raise h11.RemoteProtocolError(f"the response has more than {RESPONSE_BYTES_MAX} bytes")  # noqa: TRY301 - handled below like other protocol errors
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
        # Bytes that follow the response cannot answer the next request, so the connection is not reused.
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

    # The timer limits how long there may be no progress.

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._response is not None and not self._response.done():
            self._timer = self._loop.call_later(self._timeout_s, self._fail_request, TimeoutError())

    def _fail_request(self, error: Exception) -> None:
        if self._response is not None and not self._response.done():
            self._response.set_exception(error)
