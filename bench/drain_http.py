"""A backlog delivered over HTTP to an endpoint on loopback in another process: by `http.client` and by Pillarbox."""

from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import socket
from typing import TYPE_CHECKING

import msgspec

from bench import backlog, sample
from bench.definitions import Contestant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.definitions import Figures, RoundPaths

PLAIN, PILLARBOX = "http.client, decoding", "pillarbox, http"
BACKLOG = "http"
_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def files(quick: bool) -> int:
    """The number of batch files to deliver."""
    return 40 if quick else 800


def serve(listener: socket.socket) -> None:
    """Read each request and respond with 200, for one connection after the other."""
    buffer = memoryview(bytearray(2**20))
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            while head := _read_head(connection):
                fields, _, body_start = head.partition(b"\r\n\r\n")
                length = next(line for line in fields.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                left = int(length.partition(b":")[2]) - len(body_start)
                while left > 0:
                    left -= connection.recv_into(buffer, min(left, len(buffer)))
                connection.sendall(_RESPONSE)


def _read_head(connection: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        chunk = connection.recv(65536)
        if not chunk:
            return b""
        head += chunk
    return head


@contextlib.contextmanager
def running_endpoint() -> Iterator[int]:
    """Run the endpoint in a process of its own; yields its port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        process = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
        process.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            process.kill()
            process.join()


def deliver_plain(folder: RoundPaths) -> Figures:
    """One connection; each body is made while the previous request is in flight. No file is deleted."""

    def deliver() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        decode = msgspec.json.Decoder(backlog.Envelope).decode
        in_flight = False
        for lines in backlog.lines(folder.shared / BACKLOG):
            body = b"\n".join([decode(line).event for line in lines]) + b"\n"
            if in_flight:
                connection.getresponse().read()
            connection.request("POST", "/events", body, {"Content-Type": "application/x-ndjson"})
            in_flight = True
        connection.getresponse().read()
        connection.close()

    with running_endpoint() as port:
        return backlog.measure_delivery(files(folder.quick) * sample.BATCH, deliver)


def deliver_pillarbox(folder: RoundPaths) -> Figures:
    """An outbox with default settings."""
    with running_endpoint() as port:
        return backlog.deliver_with_outbox(
            folder, BACKLOG, files(folder.quick) * sample.BATCH, f"http://127.0.0.1:{port}/events"
        )


CONTESTANTS = (Contestant(PLAIN, deliver_plain), Contestant(PILLARBOX, deliver_pillarbox, ours=True))
