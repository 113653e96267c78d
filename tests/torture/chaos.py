"""Draws the answers of a destination at random from a seed. Most calls are accepted."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

ACCEPT, LOST, BUSY, AWAY, HANG, CLOSE, GARBAGE, SLOW = "accept", "lost", "429", "503", "hang", "close", "garbage", "slow"
REFUSED, NAMED, KEPT, LARGE = "refused", "refused by index", "kept but for some", "413"
WRONG = "set up wrongly"
KILLED, RAISE, AGAIN = "killed", "raise", "known already"
HANDING_OVER = "killed while handing over"  # counted with the answers

# Weights, about a hundred in all. `hang` costs the sink its whole timeout, and `set up wrongly` stops it for a while: both are
# rare.
EVERY_CALL: Final = {WRONG: 0.01, ACCEPT: 86, LOST: 3, BUSY: 2, AWAY: 2, HANG: 0.4, CLOSE: 1.5, GARBAGE: 1.5, SLOW: 2}
_OUTAGES: Final = 0.001  # share of the calls that start an outage, in which nothing is accepted
_OUTAGE_S: Final = 1.0  # at most
_AFTER: Final = (None, *[0] * 20, 1)  # seconds, in Retry-After, which allows only whole numbers


class Chaos:
    """Draws answers with these weights. While the file `down` exists, the answer is always the same."""

    def __init__(self, seed: str, down: Path, weights: Mapping[str, float] = EVERY_CALL) -> None:
        self.chance = random.Random(seed)
        self._down = down
        self._names = list(weights)
        self._weights = list(weights.values())
        self._away_until = 0.0

    def draw(self) -> str:
        """The next answer. During an outage it is always the same."""
        now = time.monotonic()
        if self.chance.random() < _OUTAGES:
            self._away_until = now + _OUTAGE_S * self.chance.random()
        if now < self._away_until or self._down.exists():
            return AWAY
        return self.chance.choices(self._names, self._weights)[0]

    def after(self) -> dict[str, str]:
        """The Retry-After header, or none."""
        seconds = self.chance.choice(_AFTER)
        return {} if seconds is None else {"Retry_After": str(seconds)}

    def garbage(self) -> bytes:
        """Bytes that are not an HTTP response, because they contain a NUL. Some start like one."""
        start = self.chance.choice((b"", b"HTTP/1.1 ", b"HTTP/1.1 200 So\r\nContent-Le"))
        return start + b"\0" + self.chance.randbytes(40) + b"\r\n\r\n"

    def pieces(self, data: bytes) -> list[bytes]:
        """The bytes in small pieces, for a slow answer."""
        size = self.chance.choice((7, 40))
        return [data[start : start + size] for start in range(0, len(data), size)]


def manner(batch: str) -> str:
    """How a destination that recognizes repeated batch ids rejects a poisoned batch. It depends only on the id."""
    return (REFUSED, NAMED, KEPT)[zlib.crc32(batch.partition(":")[0].encode()) % 3]
