"""An HTTP destination that knows repeats by `Idempotency-Key`, keeps what it has accepted, and answers at random.

Refused for good are calls that hold a poisoned record, by its index or as a whole, and what is larger than its limit; this
follows from the call alone, so that a batch is cut in the same parts whenever it is sent. Everything else is chance. The
referee asks it at `/arrived`.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections import Counter
from typing import Final

import msgspec

from tests.torture import chaos, wire
from tests.torture.account import Event, Row
from tests.torture.chaos import Chaos
from tests.torture.events import EVENT, POISON

ARRIVED: Final = "/arrived"
FORGET: Final = "/forget"
RECORDS_MAX: Final = 300  # of one call; more is a 413
PIECE_S: Final = 0.002  # between two pieces of a slow answer


class Arrived(msgspec.Struct):
    """What the referee is told: each event and how often it was accepted, and what should not have happened."""

    events: list[tuple[int, int, int]]  # life, number, count
    wrong: list[str]


class Destination:
    """Serves one port; `hang_s` is longer than a sink waits."""

    def __init__(self, seed: str, row: Row, hang_s: float) -> None:
        self._chaos = Chaos(seed)
        self._row = row
        self._hang_s = hang_s
        self._arrived: Counter[Event] = Counter()
        self._keys: dict[str, int] = {}  # with a checksum of the events that were accepted under it
        self._wrong: list[str] = []

    async def serve(self, port: int) -> None:
        """Until killed."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, limit=wire.HEAD_BYTES_MAX)
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (request := await wire.read_message(reader)) is not None:
                if not await self._answer(request, writer):
                    break
        except ConnectionError:
            pass  # the deliverer was killed, or has given up
        finally:
            writer.transport.abort()  # unlike `close`, it leaves nobody waiting for what is unsent

    async def _answer(self, request: wire.Message, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        _, path, _ = request.start.split(" ", 2)
        if path in (ARRIVED, FORGET):
            writer.write(wire.answer(200, self._report(path == FORGET)))
            await writer.drain()
            return True
        drawn = self._chaos.draw()
        if drawn in (chaos.CLOSE, chaos.GARBAGE):
            self._row.add(drawn)
            if drawn == chaos.GARBAGE:
                writer.write(self._chaos.garbage())
                await writer.drain()
            return False
        if drawn in (chaos.BUSY, chaos.AWAY):
            self._row.add(drawn)
            writer.write(wire.answer(int(drawn), b"not now", **self._chaos.after()))
            await writer.drain()
            return not request.closes
        accepts_too = drawn != chaos.HANG or self._chaos.chance.random() < 0.5
        reply = self._take(request, drawn) if accepts_too else b""
        if drawn == chaos.HANG:
            self._row.add(drawn)
            await asyncio.sleep(self._hang_s)
            return False
        if drawn == chaos.LOST:
            return False
        for piece in self._chaos.pieces(reply) if drawn == chaos.SLOW else [reply]:
            writer.write(piece)
            await writer.drain()
            if drawn == chaos.SLOW:
                await asyncio.sleep(PIECE_S)
        return not request.closes

    def _take(self, request: wire.Message, drawn: str) -> bytes:
        """Accept the call, or refuse it for good."""
        key = request.headers.get("idempotency-key", "").strip('"')
        body = _plain(request)
        found = [(int(life), int(number), event_key) for life, number, event_key in EVENT.findall(body)]
        if not key or not found:
            self._wrong.append(f"a call without a key or without events: {request.start}, key {key!r}, {body[:200]!r}")
        if len(found) > RECORDS_MAX:
            self._row.add(chaos.LARGE)
            return wire.answer(413, b"too large")
        bad = [index for index, (_, _, event_key) in enumerate(found) if event_key == POISON.encode()]
        if bad:
            by_index = chaos.names_index(key)
            self._row.add(chaos.NAMED if by_index else chaos.REFUSED)
            return refusal(bad if by_index else [])
        if drawn != chaos.HANG:
            self._row.add(drawn)
        events = [(life, number) for life, number, _ in found]
        check = zlib.crc32(repr(events).encode())
        if key in self._keys:
            self._row.add(chaos.AGAIN)
            if self._keys[key] != check:
                self._wrong.append(f"{chaos.CHANGED}: {key}")
        else:
            self._keys[key] = check
            self._arrived.update(events)
        return wire.answer(200, b'{"accepted":%d}' % len(events), Content_Type="application/json")

    def _report(self, forget: bool) -> bytes:
        events = [(life, number, count) for (life, number), count in self._arrived.items()]
        report = msgspec.json.encode(Arrived(events, self._wrong))
        if forget:
            self._arrived.clear()
            self._keys.clear()
        return report


def refusal(indexes: list[int]) -> bytes:
    """A 400 that names the records that it is about, or none."""
    errors = [{"index": index, "code": "poisoned", "reason": "this one never"} for index in indexes]
    body: dict[str, object] = {"errors": errors} if indexes else {"message": "there is a record in it that is never taken"}
    return wire.answer(400, msgspec.json.encode(body), Content_Type="application/json")


def _plain(request: wire.Message) -> bytes:
    """The body as it was before it was packed."""
    packed = request.headers.get("content-encoding", "")
    if packed == "gzip":
        return gzip.decompress(request.body)
    return request.body
