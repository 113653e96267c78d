"""The entries of the ledger. Pure. The tags and field names are those on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import msgspec

from pillarbox.store import record

if TYPE_CHECKING:
    from collections.abc import Iterable


PurgedKind = Literal["dead", "quarantine"]
EARLIER_WRITERS: Final = "earlier writers"
UNKNOWN_WRITER: Final = "unknown"
REDELIVERY_WRITER: Final = "resent"  # recorded as the writer of redelivered batches
FAN_OUT_WRITER: Final = "handed over"  # recorded as the writer in the ledger of a queue
# the writers under which fanned-out batches may be counted: an entry may be lost
QUEUE_WRITERS: Final = frozenset({FAN_OUT_WRITER, UNKNOWN_WRITER})


class _LedgerEntry(msgspec.Struct, frozen=True, tag_field="entry"):
    at_micros: int


class SealedEntry(_LedgerEntry, frozen=True, tag="sealed"):
    """A writer sealed a segment; `events` is its own count, None if it is not sure."""

    batch: str
    writer: str
    events: int | None
    bytes: int


class AdoptedEntry(_LedgerEntry, frozen=True, tag="adopted"):
    """A segment of a dead writer was sealed, without a count."""

    batch: str
    writer: str


class SettledEntry(_LedgerEntry, frozen=True, tag="settled"):
    """A batch is settled: every record is delivered, dead-lettered or quarantined. `quarantined` counts damaged byte ranges."""

    batch: str
    sink: str
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int = 0  # dead letters that were discarded at their limit
    discarded_spans: int = 0  # damaged byte ranges that were discarded at their limit


class FannedOutEntry(_LedgerEntry, frozen=True, tag="shared"):
    """A batch was fanned out to the queues of these sinks, each of which has its own ledger."""

    batch: str
    sinks: list[str]
    events: int  # good records
    spans: int  # damaged byte ranges


class QueueRenamedEntry(_LedgerEntry, frozen=True, tag="renamed"):
    """The queue of a sink was renamed. If `to` is empty, it was removed, and a later queue of that name is a new one."""

    sink: str
    to: str


class ReturnedEntry(_LedgerEntry, frozen=True, tag="returned"):
    """A batch was returned from a removed queue to the outbox directory. Its earlier `shared` entry no longer counts."""

    batch: str
    events: int | None  # good records; None if its file is damaged


class EvictedEntry(_LedgerEntry, frozen=True, tag="evicted"):
    """A batch was evicted for newer events."""

    batch: str
    events: int


class ReplayedEntry(_LedgerEntry, frozen=True, tag="replayed"):
    """Dead letters of a batch were replayed: they are accepted again, in another batch."""

    batch: str
    events: int


class RepairedEntry(_LedgerEntry, frozen=True, tag="repaired"):
    """Records that were recovered from the quarantine of a batch were accepted again."""

    batch: str
    events: int


class RedeliveredEntry(_LedgerEntry, frozen=True, tag="resent"):
    """A retained batch is redelivered as a new batch: its events are accepted again."""

    batch: str  # the new batch id
    of: str  # the batch id when it was delivered
    events: int


class PurgedEntry(_LedgerEntry, frozen=True, tag="purged"):
    """Dead letters or quarantined byte ranges of a batch were purged."""

    batch: str
    kind: PurgedKind
    events: int


class DroppedEntry(_LedgerEntry, frozen=True, tag="dropped"):
    """Events that one process dropped. They were never accepted, so no other count includes them."""

    writer: str
    reason: str  # a `DropReason`
    events: int  # since this writer's last entry for the reason


class LostEntry(_LedgerEntry, frozen=True, tag="lost"):
    """A number of entries could neither be written nor stay in memory."""

    entries: int


class LedgerRow(msgspec.Struct, kw_only=True):
    """The counts of events of one writer, or of all writers. If a count is a range, the `_max` field is its upper end."""

    writer: str = ""  # UUID of the writer
    accepted: int = 0  # events that `enqueue` stored
    accepted_max: int = 0  # upper end, if `accepted` is a range
    delivered: int = 0  # events that the destination accepted
    pending: int = 0  # events in segments and batches
    pending_max: int = 0  # upper end, if `pending` is a range
    dead: int = 0  # dead letters, also those that were replayed or purged later
    quarantined: int = 0  # damaged byte ranges
    quarantined_max: int = 0  # upper end, if `quarantined` is a range
    evicted: int = 0  # events deleted by `when_full="drop_oldest"`
    shared: int = 0  # events fanned out to the queues of several sinks
    shared_max: int = 0  # upper end, if `shared` is a range
    duplicates: int = 0  # how many of the delivered events the destination already had
    resent: int = 0  # events that were delivered again after a crash

    def add(self, other: LedgerRow) -> None:
        """Add the counts of another row."""
        for field in NUMBERS:
            setattr(self, field, getattr(self, field) + getattr(other, field))

    @property
    def accounted_range(self) -> tuple[int, int]:
        """The range of `accepted` that is consistent with the other counts."""
        fixed = self.delivered + self.dead + self.evicted
        low = fixed + self.pending + self.quarantined + self.shared
        return low, fixed + self.pending_max + self.quarantined_max + self.shared_max


NUMBERS: Final = tuple(field for field in LedgerRow.__struct_fields__ if field != "writer")


class SummaryEntry(_LedgerEntry, frozen=True, tag="sum"):
    """The sum of compacted entries: a row for each writer, and the other totals."""

    rows: list[LedgerRow]
    replayed: int = 0
    repaired: int = 0
    purged_dead: int = 0
    purged_quarantine: int = 0
    lost: int = 0
    wrong: int = 0  # events missing or extra in these batches
    resent: int = 0  # redelivered on request
    shared: dict[str, int] = {}  # events fanned out, by sink
    dropped: dict[str, int] = {}  # events dropped, by reason
    dropped_at: dict[str, int] = {}  # when the last event was dropped, in microseconds since 1970, by reason


BATCH_ENTRIES: Final = (SealedEntry, AdoptedEntry, SettledEntry, RedeliveredEntry, FannedOutEntry, ReturnedEntry, EvictedEntry)
LedgerEntry = (
    SealedEntry
    | AdoptedEntry
    | SettledEntry
    | FannedOutEntry
    | ReturnedEntry
    | QueueRenamedEntry
    | EvictedEntry
    | ReplayedEntry
    | RepairedEntry
    | RedeliveredEntry
    | PurgedEntry
    | DroppedEntry
    | LostEntry
    | SummaryEntry
)


_decode = msgspec.json.Decoder(LedgerEntry).decode


def encode_entries(entries: Iterable[LedgerEntry]) -> bytes:
    """The lines of these entries."""
    return b"".join([record.line(_encode(entry)) for entry in entries])


def _encode(entry: LedgerEntry) -> bytes:
    """The JSON of an entry, even if a text in it cannot be encoded: it must not prevent the others from being written."""
    try:
        return msgspec.json.encode(entry)
    except UnicodeEncodeError:
        fields = {name: getattr(entry, name) for name in entry.__struct_fields__}
        texts = {
            name: text.encode(errors="backslashreplace").decode() for name, text in fields.items() if isinstance(text, str)
        }
        return msgspec.json.encode(msgspec.structs.replace(entry, **texts))


def parse_ledger(data: bytes) -> tuple[list[LedgerEntry], int]:
    """The entries of a ledger, and the number of lines that are damaged or of a later version."""
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
