"""The interface between delivery and a destination: the `Sink` protocol, the batch it receives and the results it returns."""

from __future__ import annotations

import ipaddress
import itertools
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pillarbox.outcome import Durability

YIELD_EVERY_RECORDS: Final = 50  # how many records a sink may process between two calls of `Batch.yield_gil`


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, so that what is sent to it crosses no network."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class UnconfirmedError(Exception):
    """Accepted batches may be lost and must be sent again. The message says why."""


class SinkCapabilities(NamedTuple):
    """What a sink can do and what its destination guarantees; delivery adapts to it."""

    deduplicates_by: Literal["event_id", "batch_id", "nothing"]
    survives: Durability  # what an event survives at the destination once it is accepted (and confirmed, where needed)
    needs_confirmation: bool = False  # whether accepted batches must be confirmed before their files are deleted
    unconfirmed_max: int = 1  # batches that may be accepted and not yet confirmed
    concurrent: bool = False  # whether several calls of `deliver` may run at the same time
    combines_files: bool = False  # whether one batch may hold the records of several files; only with event_id deduplication
    records_max: int | None = None  # records in one batch; a larger batch is halved before it is sent
    bytes_max: int | None = None  # bytes of the records' JSON in one batch; a larger batch is halved before it is sent
    is_shared: bool = True  # whether other clients use the destination; if so, delivery continues slowly after a failure


def _no_yield() -> None:
    pass


class Batch:
    """Records of one batch file, or of a part of one, as raw JSON. `id` is the same at every attempt.

    A sink that processes the records in Python calls `yield_gil` every `YIELD_EVERY_RECORDS` records, because callers of
    `enqueue` may be waiting for the interpreter.
    """

    __slots__ = ("first_index", "id", "payloads", "prepared", "yield_gil")

    def __init__(
        self, batch_id: str, payloads: Sequence[bytes], first_index: int = 0, yield_gil: Callable[[], None] = _no_yield
    ) -> None:
        self.id = batch_id
        self.payloads = payloads
        self.first_index = first_index
        self.yield_gil = yield_gil
        self.prepared: Any = None  # for the sink: set by its `prepare`, used by its `deliver`

    def __len__(self) -> int:
        return len(self.payloads)

    def halves(self) -> tuple[Batch, Batch]:
        """Split a batch of at least two records at its fixed middle; the ids of the halves name their records."""
        middle = (len(self) + 1) // 2
        return self._part(0, middle), self._part(middle, len(self))

    def split_around(self, rejected: Iterable[int]) -> list[Batch]:
        """Return the runs of records between the rejected indexes."""
        cuts = [-1, *sorted(rejected), len(self)]
        return [self._part(a + 1, b) for a, b in itertools.pairwise(cuts) if a + 1 < b]

    def _part(self, start: int, stop: int) -> Batch:
        base = self.id.partition(":")[0]
        first = self.first_index + start
        return Batch(f"{base}:{first}-{self.first_index + stop - 1}", self.payloads[start:stop], first, self.yield_gil)


class Rejection(NamedTuple):
    """Why a destination rejects a record or a batch for good; `code` is short and stable, `reason` is for people."""

    code: str
    reason: str


class Delivered(msgspec.Struct, frozen=True):
    """The destination accepted all records; it already had `duplicates` of them."""

    accepted: int
    duplicates: int = 0


class Retry(msgspec.Struct, frozen=True):
    """The destination cannot accept the batch now. Try again, after `after_s` seconds where the destination names a time."""

    reason: str
    after_s: float | None = None


class Rejected(msgspec.Struct, frozen=True):
    """The destination rejected the whole batch for good and accepted none of its records."""

    rejection: Rejection


class PartialFailure(msgspec.Struct, frozen=True):
    """The destination rejected the records at these indexes of the batch for good.

    It accepted the `accepted` other records. If `accepted` is None, it stored nothing, and the others must be sent again.
    """

    rejected: dict[int, Rejection]
    accepted: int | None = None
    duplicates: int = 0


class Misconfigured(msgspec.Struct, frozen=True):
    """The configuration is wrong, not the events. Delivery stops until a person fixes it; `reason` says how."""

    reason: str


DeliveryResult = Delivered | Retry | Rejected | PartialFailure | Misconfigured


class CheckResult(NamedTuple):
    """One line of `pillarbox check`; `ok` is False for a problem that prevents delivery."""

    ok: bool  # the check passed
    message: str  # what was checked; if not `ok`, also what to do


@runtime_checkable
class Sink(Protocol):
    """One destination. Delivery calls all methods on one event loop, and `open` before the others."""

    capabilities: SinkCapabilities

    async def open(self) -> None:
        """Connect, as far as that is cheap. Called again after it failed.

        Raises:
            SinkUnusableError: the configuration is wrong and a person must fix it. Any other exception is retried.
        """

    def prepare(self, batch: Batch) -> None:
        """Encode a batch while the previous one is being sent, and keep the result in `batch.prepared`. Optional."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Send one batch. An exception counts as `Retry`."""

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """Return how many of these accepted batches, counted from the first, are durable at the destination.

        Called only where `capabilities.needs_confirmation`. May wait. Batches that are not confirmed are passed again.

        Raises:
            UnconfirmedError: the batches may be lost and must be sent again.
            SinkUnusableError: the configuration is wrong and a person must fix it.
        """

    async def check(self) -> Iterable[CheckResult]:
        """Check that the destination is reachable and accepts the event type, without sending an event."""

    async def close(self) -> None:
        """Close all connections and files."""


class DecodedRecords(NamedTuple):
    """The decoded events of a batch in order, the batch index of each, and the rejections of records of another type."""

    events: list[Any]
    indexes: Sequence[int]
    rejected: dict[int, Rejection]


def decode_records(batch: Batch, decoder: msgspec.json.Decoder[Any]) -> DecodedRecords:
    """Decode the records of a batch; a record that the decoder does not accept is rejected with code `wrong_type`."""
    events: list[Any] = []
    rejected: dict[int, Rejection] = {}
    decode_event = decoder.decode
    for start in range(0, len(batch), YIELD_EVERY_RECORDS):
        batch.yield_gil()
        chunk = batch.payloads[start : start + YIELD_EVERY_RECORDS]
        try:
            events += list(map(decode_event, chunk))
        except (msgspec.DecodeError, RecursionError):
            _decode_singly(enumerate(chunk, start), decode_event, events, rejected)
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
