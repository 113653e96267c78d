"""What goes out in one call: one sealed file, or several small ones where the sink takes them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pillarbox.delivery.settlement import DeadLetter
from pillarbox.sinks.base import Batch, Rejection
from pillarbox.store import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pillarbox.clock import Clock
    from pillarbox.store import reader
    from pillarbox.store.directory import LockedFile


class Job:
    """A sealed file on its way: taken, read, and not settled yet."""

    def __init__(self, file: LockedFile, data: bytes, contents: reader.FileContents, stored: int, started: float) -> None:
        self.file = file
        self.name = file.name
        self.id = layout.batch_id(file.name)
        self.payloads: Sequence[bytes] = contents.payloads
        self.records = len(contents.payloads)
        self.spans = contents.damaged
        self.data = data if contents.damaged else b""
        self.size = len(data)
        self.stored = stored  # bytes on disk, where it may be compressed
        self.started = started
        self.accepted = 0
        self.duplicates = 0
        self.dead: dict[int, DeadLetter] = {}
        self.discards: set[str] = set()  # what of it is not kept, for want of room: "dead", "quarantine"


class History(NamedTuple):
    """What was tried with a file before, by this process: a file that is put off comes again."""

    attempts: int = 0
    first_at_micros: int = 0
    failing_since: float | None = None  # monotonic seconds


class Shipment:
    """Files whose records go out as one batch, and what becomes of each record."""

    def __init__(self, jobs: list[Job], clock: Clock, give_way: Callable[[], None], history: History, *, proven: bool) -> None:
        self.jobs = jobs
        self._clock = clock
        first = jobs[0]
        more = f"+{len(jobs) - 1}" if len(jobs) > 1 else ""
        payloads = first.payloads if not more else [payload for job in jobs for payload in job.payloads]
        self.batch = Batch(first.id + more, payloads, yield_gil=give_way)
        self.records = len(payloads)
        self.proven = proven  # the destination has accepted something since it refused this as a whole
        self.attempts = history.attempts
        self.first_at = history.first_at_micros or clock.micros()
        self.failing_since = history.failing_since
        self.accepted = 0
        self.duplicates = 0
        self.refused: dict[int, tuple[Rejection, int]] = {}  # by index among all records: why, and after how many attempts
        self.refused_calls = 0  # in a row

    def history(self) -> History:
        """What to remember where it is put off."""
        return History(self.attempts, self.first_at, self.failing_since)

    def accept(self, accepted: int, duplicates: int) -> None:
        """So many records of a part arrived."""
        self.accepted += accepted
        self.duplicates += duplicates

    def refuse(self, part: Batch, dead: dict[int, Rejection]) -> None:
        """The records at these indexes of a part did not, and will not."""
        for index, refusal in dead.items():
            self.refused[part.first_index + index] = (Rejection(_clean(refusal.code), _clean(refusal.reason)), self.attempts)

    def hand_out(self, sink_name: str) -> None:
        """Give each file its share of what became of the records; those that are refused become dead letters."""
        first = 0
        now = self._clock.micros()
        accepted, duplicates = self.accepted, self.duplicates
        for job in self.jobs:
            for index in range(first, first + job.records) if self.refused else ():
                if index in self.refused:
                    refusal, attempts = self.refused[index]
                    event = msgspec.Raw(self.batch.payloads[index])
                    job.dead[index - first] = DeadLetter(
                        event, refusal.code, refusal.reason, sink_name, index - first, attempts, self.first_at, now
                    )
            # What the destination says of all of them is each one's as far as it goes: the account must show what is missing.
            job.accepted = min(accepted, job.records - len(job.dead)) if job is not self.jobs[-1] else accepted
            job.duplicates = min(duplicates, job.accepted)
            accepted -= job.accepted
            duplicates -= job.duplicates
            job.payloads = ()  # what is sent again is read again
            first += job.records
        self.batch.payloads = ()


def _clean(text: object) -> str:
    """Text that can be written down, whatever a destination or a sink has put into it."""
    return str(text).encode(errors="backslashreplace").decode()
