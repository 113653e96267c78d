"""The part of HTTP/1.1 that the destination and the proxy need: whole messages, with their bytes."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

HEAD_BYTES_MAX: Final = 64 * 1024


class Message(NamedTuple):
    """A request or a response: its first line, its headers (names in lower case), its body, and all of its bytes."""

    start: str
    headers: dict[str, str]
    body: bytes
    raw: bytes

    @property
    def closes(self) -> bool:
        """Whether the connection is closed after this message."""
        return self.headers.get("connection", "").lower() == "close"


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """The next message. None if the other end closed the connection, even in the middle of a message."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        start, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        if "chunked" in headers.get("transfer-encoding", ""):
            body, raw = await _chunks(reader)
        else:
            body = raw = await reader.readexactly(int(headers.get("content-length", "0")))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return Message(start, headers, body, head + raw)


async def _chunks(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    parts, raw = [], []
    size = 1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        data = await reader.readexactly(size + 2)
        parts.append(data[:-2])
        raw += [line, data]
    return b"".join(parts), b"".join(raw)


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """A response as bytes. Its reason phrase is not used."""
    all_headers = {"Content-Length": str(len(body))} | {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
    return f"HTTP/1.1 {status} So\r\n{head}\r\n".encode() + body
