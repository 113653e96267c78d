"""What a destination answers next: by chance, from a seed, mostly yes."""

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
HANDING_OVER = "killed while handing over"  # by itself, no answer

# Out of a hundred or so. `hang` costs the sink its whole time limit, and `set up wrongly` has it stop for a while: both are rare.
EVERY_CALL: Final = {WRONG: 0.01, ACCEPT: 86, LOST: 3, BUSY: 2, AWAY: 2, HANG: 0.4, CLOSE: 1.5, GARBAGE: 1.5, SLOW: 2}
_OUTAGES: Final = 0.001  # of the calls begin one: from then on nothing is accepted
_OUTAGE_S: Final = 1.0  # at most
_AFTER: Final = (None, *[0] * 20, 1)  # seconds, in Retry-After; whole ones are all that HTTP knows


class Chaos:
    """Draws answers with these weights; as long as the file `down` is there, always the same."""

    def __init__(self, seed: str, down: Path, weights: Mapping[str, float] = EVERY_CALL) -> None:
        self.chance = random.Random(seed)
        self._down = down
        self._names = list(weights)
        self._weights = list(weights.values())
        self._away_until = 0.0

    def draw(self) -> str:
        """The next answer; now and then the same one for a while, to everybody."""
        now = time.monotonic()
        if self.chance.random() < _OUTAGES:
            self._away_until = now + _OUTAGE_S * self.chance.random()
        if now < self._away_until or self._down.exists():
            return AWAY
        return self.chance.choices(self._names, self._weights)[0]

    def after(self) -> dict[str, str]:
        """The header that says when to come again, or none."""
        seconds = self.chance.choice(_AFTER)
        return {} if seconds is None else {"Retry_After": str(seconds)}

    def garbage(self) -> bytes:
        """Bytes that are no answer, whatever the dice say: no header holds a NUL. Some begin like one."""
        start = self.chance.choice((b"", b"HTTP/1.1 ", b"HTTP/1.1 200 So\r\nContent-Le"))
        return start + b"\0" + self.chance.randbytes(40) + b"\r\n\r\n"

    def pieces(self, data: bytes) -> list[bytes]:
        """The bytes in small pieces, to be sent slowly."""
        size = self.chance.choice((7, 40))
        return [data[start : start + size] for start in range(0, len(data), size)]


def manner(batch: str) -> str:
    """How a destination that knows repeats by the batch's id answers a poisoned batch: by its own id, the same each time."""
    return (REFUSED, NAMED, KEPT)[zlib.crc32(batch.partition(":")[0].encode()) % 3]
