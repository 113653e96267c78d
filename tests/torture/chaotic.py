"""The real SQLite sink with random answers: `chaotic:///path.db?seed=7&down=FILE` is `sqlite:///path.db`, and answers at random.

It is found by an entry point (`register`), like other sinks, so that `pillarbox deliver` can use it as well.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

import msgspec

from pillarbox.sinks.base import Batch, CheckResult, DeliveryResult, Misconfigured, Rejected, Rejection, Retry
from pillarbox.sinks.sqlite import SqliteSink
from tests.torture import chaos
from tests.torture.account import CounterRow
from tests.torture.chaos import Chaos
from tests.torture.events import MARK

WEIGHTS: Final = {
    chaos.WRONG: 0.01,
    chaos.ACCEPT: 85,
    chaos.LOST: 3,  # accepted, and then reported as failed
    chaos.RAISE: 2,  # accepted or not, and then an exception
    chaos.BUSY: 2,
    chaos.AWAY: 2,
    chaos.HANG: 0.4,
    chaos.SLOW: 2,
    chaos.KILLED: 0.4,  # the delivery worker is killed right after the acceptance
}
_AFTER: Final = (0.0, 0.01, 0.05, 0.3)
_ENTRY_POINT: Final = "[pillarbox.sinks]\nchaotic = tests.torture.chaotic:ChaoticSqliteSink\n"

row: CounterRow | None = None  # where this process counts; set after the fork
hang_s = 1.0


class ChaoticSqliteSink:
    """Wraps a SQLite sink, and answers at random."""

    def __init__(self, url: str, event_type: type[msgspec.Struct]) -> None:
        parts = urlsplit(url)
        self._sink = SqliteSink(f"sqlite://{parts.path}", event_type)
        (seed,), (down,) = map(parse_qs(parts.query).__getitem__, ("seed", "down"))
        self._chaos = Chaos(f"{seed}/{os.getpid()}", Path(down), WEIGHTS)
        self.capabilities = self._sink.capabilities

    async def open(self) -> None:
        await self._sink.open()

    def prepare(self, batch: Batch) -> None:
        self._sink.prepare(batch)

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Deliver, fail or reject, as drawn."""
        drawn, chance = self._chaos.draw(), self._chaos.chance
        poisoned = any(MARK in payload for payload in batch.payloads)
        if poisoned and drawn in (chaos.ACCEPT, chaos.SLOW):
            drawn = chaos.REFUSED if chaos.manner(batch.id) == chaos.REFUSED else chaos.NAMED  # rejected here, or by the table
        _count(drawn)
        match drawn:
            case chaos.BUSY:
                return Retry("busy", chance.choice(_AFTER))
            case chaos.AWAY:
                return Retry("unavailable")
            case chaos.WRONG:
                return Misconfigured("the table was renamed for a moment")
            case chaos.REFUSED:
                return Rejected(Rejection("poisoned", "it contains a record that is always rejected"))
            case chaos.RAISE if chance.random() < 0.5:
                raise ConnectionResetError("cut before the call")
            case chaos.HANG if chance.random() < 0.5:
                # wait: the destination hangs
                await asyncio.sleep(hang_s)
        answer = await self._sink.deliver(batch)
        match drawn:
            case chaos.KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            case chaos.LOST:
                return Retry("the answer was lost")
            case chaos.RAISE:
                raise ConnectionResetError("cut after the call")
            case chaos.HANG:
                # wait: the destination hangs
                await asyncio.sleep(hang_s)
            case chaos.SLOW:
                # wait: the destination is slow
                await asyncio.sleep(chance.random() * 0.05)
        return answer

    async def confirm(self, batches: Sequence[Batch]) -> int:
        return await self._sink.confirm(batches)

    async def check(self) -> Iterable[CheckResult]:
        return await self._sink.check()

    async def close(self) -> None:
        await self._sink.close()


def _count(drawn: str) -> None:
    if row is not None:
        row.add(drawn)


def register(folder: Path) -> None:
    """Register the entry point for this process and its forked children."""
    workdir = folder / "torture-1.dist-info"
    workdir.mkdir(parents=True)
    (workdir / "METADATA").write_text("Metadata-Version: 2.1\nName: torture\nVersion: 1\n")
    (workdir / "entry_points.txt").write_text(_ENTRY_POINT)
    sys.path.append(str(folder))
