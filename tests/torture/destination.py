"""An HTTP destination that recognizes repeats by `Idempotency-Key`, stores the accepted events, and answers at random.

A call with a poisoned record is rejected as a whole, or by index, or the rest of it is stored; one that is larger than its
limit is answered with 413. This depends only on the call, so that a batch is always split into the same parts. If one attempt
had the parts `0-16` and `18-99` and the next one `0-49` and `50-99`, no id would be recognized, and every event would be stored
twice. Everything else is random. `/arrived` returns the events that have arrived.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from tests.torture import chaos, wire
from tests.torture.account import CounterRow, Event
from tests.torture.chaos import Chaos
from tests.torture.events import EVENT, POISON

ARRIVED: Final = "/arrived"
FORGET: Final = "/forget"
RECORDS_MAX: Final = 300  # of one call; more is a 413
PIECE_S: Final = 0.002  # between two pieces of a slow answer


class Arrived(msgspec.Struct):
    """How often each event was accepted, and the errors of the sink."""

    events: list[tuple[int, int, int]]  # life, number, count
    wrong: list[str]


class HttpDestination:
    """Serves one port. `hang_s` is longer than the timeout of the sink."""

    def __init__(self, seed: str, down: Path, row: CounterRow, hang_s: float) -> None:
        self._chaos = Chaos(seed, down)
        self._row = row
        self._hang_s = hang_s
        self._arrived: Counter[Event] = Counter()
        self._keys: dict[str, int] = {}  # idempotency key -> checksum of the accepted events
        self._wrong: list[str] = []

    async def serve(self, port: int) -> None:
        """Serve until the process is killed."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, limit=wire.HEAD_BYTES_MAX)
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (request := await wire.read_message(reader)) is not None:
                if not await self._answer(request, writer):
                    break
        except ConnectionError:
            pass  # the delivery worker was killed, or closed the connection
        finally:
            writer.transport.abort()  # unlike `close`, it does not wait for unsent data

    async def _answer(self, request: wire.Message, writer: asyncio.StreamWriter) -> bool:
        """Answer one request. Returns whether the connection stays open."""
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
        if drawn == chaos.WRONG:
            self._row.add(drawn)
            writer.write(wire.answer(self._chaos.chance.choice((401, 403, 404)), b"misconfigured"))
            await writer.drain()
            return True
        accepts_too = drawn != chaos.HANG or self._chaos.chance.random() < 0.5
        reply = self._take(request, drawn) if accepts_too else b""
        if drawn == chaos.HANG:
            self._row.add(drawn)
            # wait: the destination hangs
            await asyncio.sleep(self._hang_s)
            return False
        if drawn == chaos.LOST:
            return False
        for piece in self._chaos.pieces(reply) if drawn == chaos.SLOW else [reply]:
            writer.write(piece)
            await writer.drain()
            if drawn == chaos.SLOW:
                # wait: the destination is slow
                await asyncio.sleep(PIECE_S)
        return not request.closes

    def _take(self, request: wire.Message, drawn: str) -> bytes:
        """Accept the call, or reject it for good."""
        key = request.headers.get("idempotency-key", "").strip('"')
        body = _plain(request)
        found = [(int(life), int(number), event_key) for life, number, event_key in EVENT.findall(body)]
        if not key or not found:
            self._wrong.append(f"a call without a key or without events: {request.start}, key {key!r}, {body[:200]!r}")
        if len(found) > RECORDS_MAX:
            self._row.add(chaos.LARGE)
            return wire.answer(413, b"too large")
        bad = [index for index, (_, _, event_key) in enumerate(found) if event_key == POISON.encode()]
        manner = chaos.manner(key) if bad else drawn
        if drawn != chaos.HANG:
            self._row.add(manner)
        if manner in (chaos.REFUSED, chaos.NAMED):
            return _answer(
                400, {"refused": _refused(bad)} if manner == chaos.NAMED else {"message": "it contains a poisoned record"}
            )
        kept = [(life, number) for life, number, event_key in found if event_key != POISON.encode()]
        fresh = self._keep(key, kept)
        return _answer(200, {"accepted": fresh, "duplicates": len(kept) - fresh, "refused": _refused(bad)})

    def _keep(self, key: str, events: list[Event]) -> int:
        """Store events. Returns how many of them are new."""
        check = zlib.crc32(repr(events).encode())
        if key not in self._keys:
            self._keys[key] = check
            self._arrived.update(events)
            return len(events)
        self._row.add(chaos.AGAIN)
        if self._keys[key] != check:
            self._wrong.append(f"other events under the same key: {key}")
        return 0

    def _report(self, forget: bool) -> bytes:
        events = [(life, number, count) for (life, number), count in self._arrived.items()]
        report = msgspec.json.encode(Arrived(events, self._wrong))
        if forget:
            self._arrived.clear()
            self._keys.clear()
        return report


def _refused(indexes: list[int]) -> list[dict[str, object]]:
    return [{"index": index, "code": "poisoned", "reason": "always rejected"} for index in indexes]


def _answer(status: int, body: dict[str, object]) -> bytes:
    return wire.answer(status, msgspec.json.encode(body), Content_Type="application/json")


def _plain(request: wire.Message) -> bytes:
    """The decompressed body."""
    packed = request.headers.get("content-encoding", "")
    if packed == "gzip":
        return gzip.decompress(request.body)
    return request.body
