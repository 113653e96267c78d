"""What a destination is to Pillarbox: the protocol, the batch that it gets, and the answers that it gives."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

YIELD_EVERY_RECORDS: Final = 50  # records; see `Batch`
Survives = Literal["process", "power"]


class UnconfirmedError(Exception):
    """What was accepted may be lost: it must be sent again. The message says why."""


class SinkCapabilities(NamedTuple):
    """What a sink says of itself."""

    deduplicates_by: Literal["event_id", "batch_id", "nothing"]
    survives: Survives  # what an event that it has accepted (and confirmed) lives through at the destination
    needs_confirmation: bool = False  # whether what it has accepted must be confirmed before the file may go
    unconfirmed_max: int = 1  # how many batches may be delivered and not yet confirmed
    concurrent: bool = False  # whether several calls of `deliver` may be under way at once
    combines_files: bool = False  # whether a batch may hold several files' records; only where it deduplicates by event
    records_max: int | None = None  # of one batch; a larger one is halved before it is sent
    bytes_max: int | None = None  # the same, of the records' JSON


def _no_yield() -> None:
    pass


class Batch:
    """Records of one sealed file, or of a part of one, as raw JSON; `id` is stable across attempts.

    A sink that works through them calls `yield_gil` every `YIELD_EVERY_RECORDS` records: callers of `enqueue` may be waiting.
    """

    __slots__ = ("first_index", "id", "payloads", "prepared", "yield_gil")

    def __init__(
        self, batch_id: str, payloads: Sequence[bytes], first_index: int = 0, yield_gil: Callable[[], None] = _no_yield
    ) -> None:
        self.id = batch_id
        self.payloads = payloads
        self.first_index = first_index
        self.yield_gil = yield_gil
        self.prepared: Any = None  # what the sink's `prepare` leaves for its `deliver`

    def __len__(self) -> int:
        return len(self.payloads)

    def halves(self) -> tuple[Batch, Batch]:
        """The two fixed halves of a batch of at least two records, with ids that say which records they hold."""
        middle = (len(self) + 1) // 2
        return self._part(0, middle), self._part(middle, len(self))

    def split_around(self, rejected: Iterable[int]) -> list[Batch]:
        """The runs of records that are left when those at the indexes in `rejected` are taken out."""
        cuts = [-1, *sorted(rejected), len(self)]
        return [self._part(a + 1, b) for a, b in itertools.pairwise(cuts) if a + 1 < b]

    def _part(self, start: int, stop: int) -> Batch:
        base = self.id.partition(":")[0]
        first = self.first_index + start
        return Batch(f"{base}:{first}-{self.first_index + stop - 1}", self.payloads[start:stop], first, self.yield_gil)


class Rejection(NamedTuple):
    """Why a destination refuses a record or batch for good; `code` is short and stable, `reason` is for people."""

    code: str
    reason: str


class Delivered(msgspec.Struct, frozen=True):
    """All accepted; `duplicates` of them were there already."""

    accepted: int
    duplicates: int = 0


class Retry(msgspec.Struct, frozen=True):
    """Not now; try again, not before `after_s` seconds where the destination names them."""

    reason: str
    after_s: float | None = None


class Rejected(msgspec.Struct, frozen=True):
    """The batch as a whole is refused for good; nothing of it was accepted."""

    rejection: Rejection


class PartialFailure(msgspec.Struct, frozen=True):
    """The records at these indexes of the batch are refused for good; the others were taken, or must be sent again."""

    rejected: dict[int, Rejection]
    accepted: int | None = None  # None: nothing of the call was kept
    duplicates: int = 0


class Misconfigured(msgspec.Struct, frozen=True):
    """The set-up is at fault, not the events: nothing can be delivered until somebody mends it."""

    reason: str


DeliveryResult = Delivered | Retry | Rejected | PartialFailure | Misconfigured


class CheckResult(NamedTuple):
    """One line of `pillarbox check`; `ok` is False where it must be mended first."""

    ok: bool
    message: str


@runtime_checkable
class Sink(Protocol):
    """One destination. All methods run on the deliverer's event loop, one `open` before all others."""

    capabilities: SinkCapabilities

    async def open(self) -> None:
        """Connect as far as is cheap; raises `SinkUnusableError` for what only a person can mend."""

    def prepare(self, batch: Batch) -> None:
        """Do what can be done for a batch while the one before it is on its way; may do nothing."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Send one batch. An exception counts as `Retry`."""

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """How many of these delivered batches, from the first, are sure to survive; the others are asked for again.

        May wait for a while. Raises `UnconfirmedError` where they must be sent again, `SinkUnusableError` where the set-up is
        at fault. Called only where `capabilities.needs_confirmation`.
        """

    async def check(self) -> Iterable[CheckResult]:
        """Look whether the destination fits, without sending an event."""

    async def close(self) -> None:
        """Let go of everything."""


class DecodedRecords(NamedTuple):
    """The events of a batch that are of the event type, in order, the index of each, and the refusals of the others."""

    events: list[Any]
    indexes: Sequence[int]
    rejected: dict[int, Rejection]


def decode_records(batch: Batch, decoder: msgspec.json.Decoder[Any]) -> DecodedRecords:
    """Decode records on demand."""
    events: list[Any] = []
    rejected: dict[int, Rejection] = {}
    decode_event = decoder.decode
    for start in range(0, len(batch), YIELD_EVERY_RECORDS):
        batch.yield_gil()
        part = batch.payloads[start : start + YIELD_EVERY_RECORDS]
        try:
            events += list(map(decode_event, part))
        except (msgspec.DecodeError, RecursionError):
            _decode_singly(enumerate(part, start), decode_event, events, rejected)
    indexes = range(len(batch))
    return DecodedRecords(events, [index for index in indexes if index not in rejected] if rejected else indexes, rejected)


def _decode_singly(
    payloads: Iterable[tuple[int, bytes]],
    decode_event: Callable[[bytes], Any],
    events: list[Any],
    rejected: dict[int, Rejection],
) -> None:
    for index, payload in payloads:
        try:
            events.append(decode_event(payload))
        except (msgspec.DecodeError, RecursionError) as error:
            rejected[index] = Rejection("wrong_type", str(error))
