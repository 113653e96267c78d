"""A real HTTP/1.1 server on loopback that records what it is sent and answers as it is told."""

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
    """What arrived."""

    method: str
    target: str
    headers: dict[str, str]
    sent: bytes  # the body as it came over the wire

    @property
    def key(self) -> str:
        return self.headers["idempotency-key"]

    @property
    def body(self) -> bytes:
        return _UNPACK[self.headers.get("content-encoding", "")](self.sent)

    @property
    def events(self) -> list[Any]:
        """The events, whatever the format, without their envelopes."""
        if self.headers["content-type"] == "application/x-ndjson":
            assert self.body.endswith(b"\n")
            return [json.loads(line) for line in self.body.splitlines()]
        found = json.loads(self.body)
        return [one["data"] for one in found] if "cloudevents" in self.headers["content-type"] else found


class Say(NamedTuple):
    """An answer, and what goes wrong with it."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed
    raw: bytes | None = None  # instead of all the above
    cut: int | None = None  # bytes of the answer after which the connection is cut
    gap_s: float = 0.0  # after each byte

    def bytes(self) -> bytes:
        if self.raw is not None:
            return self.raw
        heads = {"Content-Length": str(len(self.body))} | self.headers
        lines = "".join(f"{name}: {value}\r\n" for name, value in heads.items())
        return f"HTTP/1.1 {self.status} Said\r\n{lines}\r\n".encode() + self.body


HANG = Say(raw=b"", cut=0)  # takes the call and never answers

Answering = Callable[[Request], Say]


def always(say: Say) -> Answering:
    return lambda _: say


def in_turn(*says: Say) -> Answering:
    """One after the other; the last one for ever."""
    left = list(says)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


@dataclass
class Server:
    """Runs in a thread with a loop of its own, from `with` to its end."""

    answer: Answering = field(default_factory=lambda: always(Say()))
    tls: ssl.SSLContext | None = None
    body_max: int = 2**26  # bytes; a larger one is answered with 413 before it was read, and the connection closed
    greeting: bytes = b""  # said before anything is asked
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most_open: int = 0
    port: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._tasks: set[asyncio.Task[None]] = set()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(60)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    def url(self, path: str = "/events", user: str = "") -> str:
        return f"{'https' if self.tls else 'http'}://{user}{'localhost' if self.tls else '127.0.0.1'}:{self.port}{path}"

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls, limit=2**26)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        writer.write(self.greeting)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
                while await self._one(reader, writer):
                    pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        size = int(headers.get("content-length", "0"))
        if size > self.body_max:
            self.requests.append(Request(method, target, headers, b""))
            await _write(writer, Say(413, headers={"Connection": "close"}))
            writer.write_eof()
            while await reader.read(2**16):  # as proxies do: to close at once would take the answer away with the connection
                pass
            return False
        request = Request(method, target, headers, await reader.readexactly(size))
        self.requests.append(request)
        say = self.answer(request)
        if say == HANG:
            await reader.read()  # until the caller has had enough
            return False
        return await _write(writer, say)


async def _write(writer: asyncio.StreamWriter, say: Say) -> bool:
    data = say.bytes() if say.cut is None else say.bytes()[: say.cut]
    for part in [data[at : at + 1] for at in range(len(data))] if say.gap_s else [data]:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(say.gap_s)
    return say.cut is None and say.raw is None


@functools.cache
def _taken() -> socket.socket:
    """Bound for good, and nobody listens: nor can another have its port, or a caller by chance be connected to itself."""
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    return found


def nobody() -> str:
    """The address of a port that nobody listens on."""
    return f"http://127.0.0.1:{_taken().getsockname()[1]}/events"


def run(work: Awaitable[_T]) -> _T:
    """Run to the end, within a minute."""

    async def bounded() -> _T:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(bounded())
