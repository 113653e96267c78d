"""A clock that is set by hand, a sink that answers as it is told."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from pillarbox.sinks.base import Batch, CheckResult, Delivered, DeliveryResult, SinkCapabilities

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class ManualClock:
    """A `Clock` that stands still until `advance` is called; `step` moves wall time only, as a clock that is set does."""

    def __init__(self, micros: int = 1_700_000_000_000_000) -> None:
        self._micros = micros
        self._monotonic = 0.0

    def micros(self) -> int:
        """Wall time in microseconds since 1970."""
        return self._micros

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._monotonic += seconds
        self._micros += int(seconds * 1e6)

    def step(self, seconds: float) -> None:
        """Set the wall clock forward or back."""
        self._micros += int(seconds * 1e6)


class RecordingSink:
    """A `Sink` in memory: `batches` holds what it accepted; `results` are given first, then everything is accepted.

    An answer that is an exception is raised. `confirmations` answers `confirm` likewise, where it `needs_confirmation`.
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
        self.calls: list[str] = []  # batch ids, in the order in which they came
        self.batches: dict[str, list[bytes]] = {}
        self.open_count = 0

    @property
    def payloads(self) -> list[bytes]:
        """Every accepted record, in order of arrival."""
        return [payload for batch in self.batches.values() for payload in batch]

    async def open(self) -> None:
        """Count."""
        self.open_count += 1

    def prepare(self, batch: Batch) -> None:
        """Nothing."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Give the next answer, or accept."""
        self.calls.append(batch.id)
        answer = self.results.popleft() if self.results else Delivered(len(batch))
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Delivered):
            self.batches[batch.id] = list(batch.payloads)
        return answer

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """Give the next confirmation, or confirm all."""
        confirmation = self.confirmations.popleft() if self.confirmations else len(batches)
        if isinstance(confirmation, Exception):
            raise confirmation
        return min(len(batches), confirmation)

    async def check(self) -> Iterable[CheckResult]:
        """Nothing to find."""
        return [CheckResult(ok=True, message="records in memory")]

    async def close(self) -> None:
        """Nothing to let go."""
