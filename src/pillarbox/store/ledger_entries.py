"""What the lines of the ledger mean: each entry says what became of a batch. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import msgspec

from pillarbox.store import record

if TYPE_CHECKING:
    from collections.abc import Iterable


PurgedKind = Literal["dead", "quarantine"]
EARLIER_WRITERS: Final = "earlier writers"
UNKNOWN_WRITER: Final = "unknown"
REDELIVERY_WRITER: Final = "resent"  # stands for the writer of what was sent again on request
FAN_OUT_WRITER: Final = "handed over"  # stands for the writer in the account of a queue
QUEUE_WRITERS: Final = frozenset({FAN_OUT_WRITER, UNKNOWN_WRITER})  # whose what was handed over may be: an entry may be lost


class _LedgerEntry(msgspec.Struct, frozen=True, tag_field="entry"):
    at_micros: int


class SealedEntry(_LedgerEntry, frozen=True, tag="sealed"):
    """A writer sealed a file; `events` is its own count, None where it cannot be sure."""

    batch: str
    writer: str
    events: int | None
    bytes: int


class AdoptedEntry(_LedgerEntry, frozen=True, tag="adopted"):
    """Somebody sealed what a dead writer left: nobody counted."""

    batch: str
    writer: str


class SettledEntry(_LedgerEntry, frozen=True, tag="settled"):
    """The destination has all that it takes of a batch; `quarantined` counts spans of damaged bytes."""

    batch: str
    sink: str
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int = 0  # of the dead letters, those that were not kept, for want of room
    discarded_spans: int = 0  # of the spans likewise


class FannedOutEntry(_LedgerEntry, frozen=True, tag="shared"):
    """A batch went into the queues of these sinks, each of which has an account of its own."""

    batch: str
    sinks: list[str]
    events: int  # good records that were found in it
    spans: int  # of damaged bytes


class QueueRenamedEntry(_LedgerEntry, frozen=True, tag="renamed"):
    """The queue of a sink is another's from now on; with `to` empty it is gone, and one of that name is a new one."""

    sink: str
    to: str


class EvictedEntry(_LedgerEntry, frozen=True, tag="evicted"):
    """A batch was given up for newer events."""

    batch: str
    events: int


class ReplayedEntry(_LedgerEntry, frozen=True, tag="replayed"):
    """Dead letters of a batch went in again: they are accepted once more, as a part of another batch."""

    batch: str
    events: int


class RepairedEntry(_LedgerEntry, frozen=True, tag="repaired"):
    """Records that were recovered from a batch's quarantine went in again."""

    batch: str
    events: int


class RedeliveredEntry(_LedgerEntry, frozen=True, tag="resent"):
    """A delivered file waits again on request, as a batch of its own: its events are accepted once more."""

    batch: str  # what it is now
    of: str  # what it was
    events: int


class PurgedEntry(_LedgerEntry, frozen=True, tag="purged"):
    """What was set aside of a batch was given up: dead letters, or spans of damaged bytes."""

    batch: str
    kind: PurgedKind
    events: int


class LostEntry(_LedgerEntry, frozen=True, tag="lost"):
    """So many entries could not be written and did not fit into memory."""

    entries: int


class LedgerRow(msgspec.Struct, kw_only=True):
    """A writer's account, or all of them together; in events. Of a range, `_max` is the upper end."""

    writer: str = ""
    accepted: int = 0
    accepted_max: int = 0
    delivered: int = 0
    pending: int = 0
    pending_max: int = 0
    dead: int = 0
    quarantined: int = 0
    quarantined_max: int = 0
    evicted: int = 0
    shared: int = 0  # handed over to the queues of several sinks
    shared_max: int = 0
    duplicates: int = 0  # of those delivered, what the destination had before
    resent: int = 0  # delivered once more after a kill

    def add(self, other: LedgerRow) -> None:
        """Add another row's numbers to this one's."""
        for field in NUMBERS:
            setattr(self, field, getattr(self, field) + getattr(other, field))

    @property
    def accounted_range(self) -> tuple[int, int]:
        """What the accepted must be equal to: the two ends."""
        fixed = self.delivered + self.dead + self.evicted
        low = fixed + self.pending + self.quarantined + self.shared
        return low, fixed + self.pending_max + self.quarantined_max + self.shared_max


NUMBERS: Final = tuple(field for field in LedgerRow.__struct_fields__ if field != "writer")


class SummaryEntry(_LedgerEntry, frozen=True, tag="sum"):
    """What is over, summed up: a row a writer, and what was mended."""

    rows: list[LedgerRow]
    replayed: int = 0
    repaired: int = 0
    purged_dead: int = 0
    purged_quarantine: int = 0
    lost: int = 0
    wrong: int = 0  # events by which batches that are over did not balance
    resent: int = 0  # on request
    shared: dict[str, int] = {}  # events handed over, by sink


BATCH_ENTRIES: Final = (SealedEntry, AdoptedEntry, SettledEntry, RedeliveredEntry, FannedOutEntry, EvictedEntry)
LedgerEntry = (
    SealedEntry
    | AdoptedEntry
    | SettledEntry
    | FannedOutEntry
    | QueueRenamedEntry
    | EvictedEntry
    | ReplayedEntry
    | RepairedEntry
    | RedeliveredEntry
    | PurgedEntry
    | LostEntry
    | SummaryEntry
)


_decode = msgspec.json.Decoder(LedgerEntry).decode


def encode_entries(entries: Iterable[LedgerEntry]) -> bytes:
    """The lines of these entries."""
    return b"".join([record.line(msgspec.json.encode(entry)) for entry in entries])


def parse_ledger(data: bytes) -> tuple[list[LedgerEntry], int]:
    """What a ledger holds, and how many of its lines are none that this version knows."""
    entries: list[LedgerEntry] = []
    unread = 0
    for line in data.split(b"\n"):
        if not line or line.isspace():
            continue
        try:
            entries.append(_decode(record.payload(line)))
        except (record.DamagedRecordError, msgspec.DecodeError):
            unread += 1
    return entries, unread
