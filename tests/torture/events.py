"""The events of a run. Which of them are poisoned, and how, follows from the seed.

An event is `life-number`: the n-th of a life, which is one run of a writer process. A poisoned event is rejected for good by
every destination here. Most are alone and some in a row, so that sometimes all records of a small batch are rejected.
"""

from __future__ import annotations

import re
import zlib
from typing import Final

from pillarbox import TrackingEvent

EVENTS_MAX: Final = 20_000  # of one life; after that, the process waits to be killed
POISON: Final = ""  # the event key that the destination itself rejects
NOWHERE: Final = "Nowhere"  # a scope kind for which the SpacetimeDB sink has no variant
MARK: Final = b'"poisoned'  # in the JSON of every poisoned event and of no other, even if a destination receives only values
EVENT: Final = re.compile(rb'"event_id":"(\d+)-(\d+)","event_key":"(\w*)"')
_ALONE: Final = 3_000  # one event in this many is poisoned alone
_ROW: Final = 12  # events of a row
_ROWS: Final = 3_000  # one row in this many is poisoned as a whole


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
