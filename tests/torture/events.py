"""The events of a run: which there are, which of them are poisoned, and how. All of it follows from the seed.

An event is `life-number`: the n-th of a life, which is one run of a writer process. A poisoned event is rejected for good by every
destination here. Most are alone and some in a row, so that sometimes all records of a small batch are rejected.
"""

from __future__ import annotations

import re
import zlib
from typing import Final

from pillarbox import TrackingEvent

EVENTS_MAX: Final = 20_000  # of one life; who has stored so many waits to be killed
POISON: Final = ""  # the event key of an event that the destination itself refuses
NOWHERE: Final = "Nowhere"  # the scope kind of one that the SpacetimeDB sink finds no variant for
MARK: Final = (
    b'"poisoned'  # in every poisoned event's JSON, and in no other's, also where a destination gets no more than values
)
EVENT: Final = re.compile(rb'"event_id":"(\d+)-(\d+)","event_key":"(\w*)"')
_ALONE: Final = 3_000  # one in so many is poisoned
_ROW: Final = 12  # so many in a row are,
_ROWS: Final = 3_000  # in one of so many rows


def poisoned(seed: int, life: int, number: int) -> bool:
    """Whether an event is poisoned."""
    row = zlib.crc32(b"%d/%d/%d" % (seed, life, number // _ROW))
    return row % _ROWS == 0 or zlib.crc32(b"%d.%d.%d" % (seed, life, number)) % _ALONE == 0


def make_event(seed: int, life: int, number: int) -> TrackingEvent:
    """The event with this number of this life."""
    bad = poisoned(seed, life, number)
    padding = "x" * (number * 7919 % 97 if number % 64 else number * 7919 % 4093)
    return TrackingEvent(
        event_id=f"{life}-{number}",
        event_key=POISON if bad else "click",
        scope_kind=NOWHERE if bad and number % 5 == 0 else "Site",
        scope_id="site",
        user_id="poisoned" if bad else "user",
        metadata_json=f'{{"n":{number},"text":"{padding}"}}',
        occurred_at_micros=number,
    )
