"""Random faults in front of a real SpacetimeDB: lost connections, delays, and other answers, before or after the server's.

Each connection has its own connection to the server, and both end together, because the sink takes an open connection as a sign
that the server is running.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from tests.torture import chaos, wire
from tests.torture.account import CounterRow
from tests.torture.chaos import Chaos
from tests.torture.events import MARK

CALL_BYTES_MAX = 45_000  # above it the proxy answers 413
PIECE_S = 0.002  # between two pieces of a slow answer
_CALL = "/call/"
_QUIETER = 0.3  # share of the other requests (schema, ping) that may get another answer than the server's
_STRETCH_S = 0.5  # for this long it rejects whole calls with a poisoned record, like the server but without an index
_TIMED = {"spacetime_execution_duration_micros": "17"}


class Proxy:
    """Serves one port and forwards to another."""

    def __init__(self, seed: str, down: Path, row: CounterRow, hang_s: float, server: int) -> None:
        self._chaos = Chaos(seed, down)
        self._row = row
        self._hang_s = hang_s
        self._server = server

    async def serve(self, port: int) -> None:
        """Serve until the process is killed."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, limit=wire.HEAD_BYTES_MAX)
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server, limit=wire.HEAD_BYTES_MAX)
            try:
                while (request := await wire.read_message(reader)) is not None:
                    if not await self._pass_on(request, writer, from_server, to_server):
                        break
            finally:
                to_server.transport.abort()
        writer.transport.abort()

    async def _pass_on(
        self,
        request: wire.Message,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        """Forward one request. Returns whether the connection stays open."""
        is_call = _CALL in request.start
        drawn = self._chaos.draw()
        if not is_call and self._chaos.chance.random() > _QUIETER:
            drawn = chaos.ACCEPT
        reply = b""
        if drawn in (chaos.BUSY, chaos.AWAY):
            reply = wire.answer(int(drawn), b"not now", Content_Type="text/plain", **self._chaos.after())
        elif drawn == chaos.WRONG:
            reply = wire.answer(403, b"misconfigured", Content_Type="text/plain")
        elif drawn == chaos.GARBAGE:
            reply = self._chaos.garbage()
        elif is_call:
            drawn, reply = self._refuse(request.body, drawn)
        asks = not reply and (drawn in (chaos.ACCEPT, chaos.SLOW, chaos.LOST, chaos.NAMED) or self._chaos.chance.random() < 0.5)
        if is_call:
            self._row.add(drawn)
        if asks:
            to_server.write(request.raw)
            await to_server.drain()
            answer = await wire.read_message(from_server)
            reply = answer.raw if answer is not None else b""
        if drawn == chaos.HANG:
            # wait: the proxy hangs
            await asyncio.sleep(self._hang_s)
        if not reply or drawn in (chaos.HANG, chaos.CLOSE, chaos.LOST):
            return False
        for piece in self._chaos.pieces(reply) if drawn == chaos.SLOW and is_call else [reply]:
            writer.write(piece)
            await writer.drain()
            if drawn == chaos.SLOW:
                # wait: the proxy is slow
                await asyncio.sleep(PIECE_S)
        return drawn != chaos.GARBAGE

    def _refuse(self, body: bytes, drawn: str) -> tuple[str, bytes]:
        """The answer of the proxy, in place of the server's, to a call that the server rejects or could reject."""
        if len(body) > CALL_BYTES_MAX:
            return chaos.LARGE, wire.answer(413, b"length limit exceeded", Content_Type="text/plain")
        if MARK not in body or drawn not in (chaos.ACCEPT, chaos.SLOW):
            return drawn, b""
        # For a while, and not for single calls: long enough to split a batch down to the poisoned record.
        if int(asyncio.get_running_loop().time() / _STRETCH_S) % 2:
            return chaos.REFUSED, wire.answer(
                530, b"it contains a record that is always rejected", Content_Type="text/plain", **_TIMED
            )
        return chaos.NAMED, b""
