"""What a destination is to Pillarbox: the protocol, the batch that it gets, and the answers that it gives."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

GIVE_WAY_EVERY: Final = 50  # records; see `Batch`
Survives = Literal["process", "power"]


class Unconfirmed(Exception):  # noqa: N818 - reads as the sentence it is
    """What was accepted may be lost: it must be sent again. The message says why."""


class Traits(NamedTuple):
    """What a sink says of itself."""

    deduplicates_by: Literal["event_id", "batch_id", "nothing"]
    survives: Survives  # what an event that it has accepted (and confirmed) lives through at the destination
    confirms: bool = False  # whether what it has accepted must be confirmed before the file may go
    window: int = 1  # how many batches may be delivered and not yet confirmed
    concurrent: bool = False  # whether several calls of `deliver` may be under way at once
    combines: bool = False  # whether a batch may hold several files' records; only where it deduplicates by event
    records_max: int | None = None  # of one batch; a larger one is halved before it is sent
    bytes_max: int | None = None  # the same, of the records' JSON


def _nobody_waits() -> None:
    pass


class Batch:
    """Records of one sealed file, or of a part of one, as raw JSON; `id` is stable across attempts.

    A sink that works through them calls `give_way` every `GIVE_WAY_EVERY` records: callers of `enqueue` may be waiting.
    """

    __slots__ = ("first", "give_way", "id", "payloads", "prepared")

    def __init__(
        self, batch_id: str, payloads: Sequence[bytes], first: int = 0, give_way: Callable[[], None] = _nobody_waits
    ) -> None:
        self.id = batch_id
        self.payloads = payloads
        self.first = first
        self.give_way = give_way
        self.prepared: Any = None  # what the sink's `prepare` leaves for its `deliver`

    def __len__(self) -> int:
        return len(self.payloads)

    def halves(self) -> tuple[Batch, Batch]:
        """The two fixed halves of a batch of at least two records, with ids that say which records they hold."""
        middle = (len(self) + 1) // 2
        return self._part(0, middle), self._part(middle, len(self))

    def between(self, refused: Iterable[int]) -> list[Batch]:
        """The runs of records that are left when those at the indexes in `refused` are taken out."""
        cuts = [-1, *sorted(refused), len(self)]
        return [self._part(a + 1, b) for a, b in itertools.pairwise(cuts) if a + 1 < b]

    def _part(self, start: int, stop: int) -> Batch:
        base = self.id.partition(":")[0]
        first = self.first + start
        return Batch(f"{base}:{first}-{self.first + stop - 1}", self.payloads[start:stop], first, self.give_way)


class Refusal(NamedTuple):
    """Why a destination refuses a record or batch for good; `code` is short and stable, `reason` is for people."""

    code: str
    reason: str


class Delivered(msgspec.Struct, frozen=True):
    """All accepted; `duplicates` of them were there already."""

    accepted: int
    duplicates: int = 0


class Retry(msgspec.Struct, frozen=True):
    """Not now; try again, not before `after` seconds where the destination names them."""

    reason: str
    after: float | None = None


class Refused(msgspec.Struct, frozen=True):
    """The batch as a whole is refused for good; nothing of it was accepted."""

    refusal: Refusal


class Partly(msgspec.Struct, frozen=True):
    """The records at these indexes of the batch are refused for good; the others were taken, or must be sent again."""

    refused: dict[int, Refusal]
    accepted: int | None = None  # None: nothing of the call was kept
    duplicates: int = 0


class Misconfigured(msgspec.Struct, frozen=True):
    """The set-up is at fault, not the events: nothing can be delivered until somebody mends it."""

    reason: str


Answer = Delivered | Retry | Refused | Partly | Misconfigured


class Finding(NamedTuple):
    """One line of `pillarbox check`; `ok` is False where it must be mended first."""

    ok: bool
    text: str


@runtime_checkable
class Sink(Protocol):
    """One destination. All methods run on the deliverer's event loop, one `open` before all others."""

    traits: Traits

    async def open(self) -> None:
        """Connect as far as is cheap; raises `SinkUnusable` for what only a person can mend."""

    def prepare(self, batch: Batch) -> None:
        """Do what can be done for a batch while the one before it is on its way; may do nothing."""

    async def deliver(self, batch: Batch) -> Answer:
        """Send one batch. An exception counts as `Retry`."""

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """How many of these delivered batches, from the first, are sure to survive; the others are asked for again.

        May wait for a while. Raises `Unconfirmed` where they must be sent again, `SinkUnusable` where the set-up is at fault.
        Called only where `traits.confirms`.
        """

    async def check(self) -> Iterable[Finding]:
        """Look whether the destination fits, without sending an event."""

    async def close(self) -> None:
        """Let go of everything."""


class Decoded(NamedTuple):
    """The events of a batch that are of the event type, in order, the index of each, and the refusals of the others."""

    events: list[Any]
    indexes: Sequence[int]
    refused: dict[int, Refusal]


def decode(batch: Batch, decoder: msgspec.json.Decoder[Any]) -> Decoded:
    """Decode records on demand."""
    events: list[Any] = []
    refused: dict[int, Refusal] = {}
    decode_one = decoder.decode
    for start in range(0, len(batch), GIVE_WAY_EVERY):
        batch.give_way()
        part = batch.payloads[start : start + GIVE_WAY_EVERY]
        try:
            events += list(map(decode_one, part))
        except (msgspec.DecodeError, RecursionError):
            _decode_singly(enumerate(part, start), decode_one, events, refused)
    indexes = range(len(batch))
    return Decoded(events, [index for index in indexes if index not in refused] if refused else indexes, refused)


def _decode_singly(
    payloads: Iterable[tuple[int, bytes]], decode_one: Callable[[bytes], Any], events: list[Any], refused: dict[int, Refusal]
) -> None:
    for index, payload in payloads:
        try:
            events.append(decode_one(payload))
        except (msgspec.DecodeError, RecursionError) as error:
            refused[index] = Refusal("wrong_type", str(error))
