"""A backlog to an endpoint of our own on loopback, in another process: by `http.client` and by us."""

from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import socket
from typing import TYPE_CHECKING

import msgspec

from bench import backlog, sample
from bench.plan import Contestant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.plan import Figures, RoundPaths

BARE, OURS = "http.client, decoding", "pillarbox, http"
BACKLOG = "http"
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def files(quick: bool) -> int:
    """How many sealed files there are to deliver."""
    return 40 if quick else 800


def answer(listener: socket.socket) -> None:
    """Read body after body and say 200 to each, for one connection after the other."""
    buffer = memoryview(bytearray(2**20))
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            while head := _head(connection):
                before, _, rest = head.partition(b"\r\n\r\n")
                length = next(line for line in before.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                left = int(length.partition(b":")[2]) - len(rest)
                while left > 0:
                    left -= connection.recv_into(buffer, min(left, len(buffer)))
                connection.sendall(_ANSWER)


def _head(connection: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        more = connection.recv(65536)
        if not more:
            return b""
        head += more
    return head


@contextlib.contextmanager
def serving() -> Iterator[int]:
    """The port of an endpoint in a process of its own, for as long as this lasts."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        process = multiprocessing.get_context("fork").Process(target=answer, args=(listener,), daemon=True)
        process.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            process.kill()
            process.join()


def bare(folder: RoundPaths) -> Figures:
    """Over one connection, each body made while the one before is on its way; no file is removed."""

    def deliver() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        decode = msgspec.json.Decoder(backlog.Envelope).decode
        under_way = False
        for lines in backlog.lines(folder.shared / BACKLOG):
            body = b"\n".join([decode(line).event for line in lines]) + b"\n"
            if under_way:
                connection.getresponse().read()
            connection.request("POST", "/events", body, {"Content-Type": "application/x-ndjson"})
            under_way = True
        connection.getresponse().read()
        connection.close()

    with serving() as port:
        return backlog.measured(files(folder.quick) * sample.BATCH, deliver)


def ours(folder: RoundPaths) -> Figures:
    """By an outbox with its defaults."""
    with serving() as port:
        return backlog.by_an_outbox(folder, BACKLOG, files(folder.quick) * sample.BATCH, f"http://127.0.0.1:{port}/events")


CONTESTANTS = (Contestant(BARE, bare), Contestant(OURS, ours, ours=True))
