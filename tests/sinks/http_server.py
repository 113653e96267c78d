"""An HTTP/1.1 server on loopback that records requests and sends canned responses."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import json
import socket
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_T = TypeVar("_T")
_UNPACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gzip": gzip.decompress, "zstd": zstd.decompress}


@dataclass
class Request:
    """A request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    raw_body: bytes  # the body as received

    @property
    def idempotency_key(self) -> str:
        return self.headers["idempotency-key"]

    @property
    def body(self) -> bytes:
        return _UNPACK[self.headers.get("content-encoding", "")](self.raw_body)

    @property
    def events(self) -> list[Any]:
        """The events in the body, without CloudEvents envelopes."""
        if self.headers["content-type"] == "application/x-ndjson":
            assert self.body.endswith(b"\n")
            return [json.loads(line) for line in self.body.splitlines()]
        items = json.loads(self.body)
        return [item["data"] for item in items] if "cloudevents" in self.headers["content-type"] else items


class CannedResponse(NamedTuple):
    """A response, and the faults to inject into it."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 - never modified
    raw: bytes | None = None  # sent in place of all of the above
    cut_after_bytes: int | None = None  # bytes of the response after which the connection closes
    byte_delay_s: float = 0.0  # after each byte

    def to_bytes(self) -> bytes:
        if self.raw is not None:
            return self.raw
        heads = {"Content-Length": str(len(self.body))} | self.headers
        lines = "".join(f"{name}: {value}\r\n" for name, value in heads.items())
        return f"HTTP/1.1 {self.status} Canned\r\n{lines}\r\n".encode() + self.body


HANG = CannedResponse(raw=b"", cut_after_bytes=0)  # reads the request and never responds

Responder = Callable[[Request], CannedResponse]


def always(response: CannedResponse) -> Responder:
    return lambda _: response


def in_sequence(*responses: CannedResponse) -> Responder:
    """Send the responses in sequence, and then the last one again."""
    remaining = list(responses)
    return lambda _: remaining.pop(0) if len(remaining) > 1 else remaining[0]


@dataclass
class Server:
    """A server that runs in a thread of its own during a `with` block."""

    respond: Responder = field(default_factory=lambda: always(CannedResponse()))
    tls: ssl.SSLContext | None = None
    body_max: int = 2**26  # bytes; a larger body gets a 413 before it is read, and the connection closes
    greeting: bytes = b""  # sent before any request
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    open_connections_max: int = 0
    port: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._tasks: set[asyncio.Task[None]] = set()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(60)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    def url(self, path: str = "/events", user: str = "") -> str:
        return f"{'https' if self.tls else 'http'}://{user}{'localhost' if self.tls else '127.0.0.1'}:{self.port}{path}"

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls, limit=2**26)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        self.open_connections_max = max(self.open_connections_max, self.open_connections)
        writer.write(self.greeting)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
                while await self._serve_request(reader, writer):
                    pass
        finally:
            self.open_connections -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        size = int(headers.get("content-length", "0"))
        if size > self.body_max:
            self.requests.append(Request(method, target, headers, b""))
            await _write_response(writer, CannedResponse(413, headers={"Connection": "close"}))
            writer.write_eof()
            while await reader.read(2**16):  # as proxies do; closing at once would discard the response
                pass
            return False
        request = Request(method, target, headers, await reader.readexactly(size))
        self.requests.append(request)
        response = self.respond(request)
        if response == HANG:
            await reader.read()  # until the client closes the connection
            return False
        return await _write_response(writer, response)


async def _write_response(writer: asyncio.StreamWriter, response: CannedResponse) -> bool:
    data = response.to_bytes() if response.cut_after_bytes is None else response.to_bytes()[: response.cut_after_bytes]
    for part in [data[at : at + 1] for at in range(len(data))] if response.byte_delay_s else [data]:
        writer.write(part)
        await writer.drain()
        # wait: the server sends slowly
        await asyncio.sleep(response.byte_delay_s)
    return response.cut_after_bytes is None and response.raw is None


@functools.cache
def _reserved_socket() -> socket.socket:
    """Return a bound socket that does not listen, so that no other process gets its port and no client connects to itself."""
    reserved = socket.socket()
    reserved.bind(("127.0.0.1", 0))
    return reserved


def closed_port_url() -> str:
    """Return the URL of a port on which nothing listens."""
    return f"http://127.0.0.1:{_reserved_socket().getsockname()[1]}/events"


def run_async(awaitable: Awaitable[_T]) -> _T:
    """Run an awaitable to its end, at most one minute."""

    async def bounded() -> _T:
        return await asyncio.wait_for(awaitable, 60)

    return asyncio.run(bounded())
