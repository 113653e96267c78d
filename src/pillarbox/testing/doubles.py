"""Test doubles: a clock that tests advance, and a sink that records batches."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from pillarbox.sinks.base import Batch, CheckResult, Delivered, DeliveryResult, SinkCapabilities

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class ManualClock:
    """A `Clock` that stands still until `advance`; `step` changes wall time only, as setting a clock does."""

    def __init__(self, micros: int = 1_700_000_000_000_000, monotonic_s: float = 0.0) -> None:
        self._micros = micros
        self._monotonic = monotonic_s

    def micros(self) -> int:
        """Return the wall time in microseconds since 1970."""
        return self._micros

    def monotonic(self) -> float:
        """Return seconds that only `advance` changes."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Advance both times."""
        self._monotonic += seconds
        self._micros += int(seconds * 1e6)

    def step(self, seconds: float) -> None:
        """Change the wall time only, forward or back."""
        self._micros += int(seconds * 1e6)


class RecordingSink:
    """A `Sink` in memory that keeps the accepted batches in `batches`.

    `deliver` returns the queued `results` first, and then accepts every batch. `confirm` returns the queued `confirmations`
    first, and then confirms every batch. An exception in a queue is raised.

    Args:
        results: the first results of `deliver`.
        needs_confirmation: see `SinkCapabilities`.
        unconfirmed_max: see `SinkCapabilities`.
    """

    def __init__(
        self, results: Iterable[DeliveryResult | Exception] = (), *, needs_confirmation: bool = False, unconfirmed_max: int = 1
    ) -> None:
        self.capabilities = SinkCapabilities(
            deduplicates_by="nothing",
            survives="process",
            needs_confirmation=needs_confirmation,
            unconfirmed_max=unconfirmed_max,
        )
        self.results: deque[DeliveryResult | Exception] = deque(results)
        self.confirmations: deque[int | Exception] = deque()
        self.calls: list[str] = []  # ids of the delivered batches, in order
        self.batches: dict[str, list[bytes]] = {}
        self.open_count = 0

    @property
    def payloads(self) -> list[bytes]:
        """All accepted records, in order of arrival."""
        return [payload for batch in self.batches.values() for payload in batch]

    async def open(self) -> None:
        """Count the calls."""
        self.open_count += 1

    def prepare(self, batch: Batch) -> None:
        """Do nothing."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Return the next queued result, or accept the batch."""
        self.calls.append(batch.id)
        result = self.results.popleft() if self.results else Delivered(len(batch))
        if isinstance(result, Exception):
            raise result
        if isinstance(result, Delivered):
            self.batches[batch.id] = list(batch.payloads)
        return result

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """Return the next queued confirmation, or confirm all batches."""
        confirmation = self.confirmations.popleft() if self.confirmations else len(batches)
        if isinstance(confirmation, Exception):
            raise confirmation
        return min(len(batches), confirmation)

    async def check(self) -> Iterable[CheckResult]:
        """Return one good result."""
        return [CheckResult(ok=True, message="keeps records in memory")]

    async def close(self) -> None:
        """Do nothing."""
