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


class BatchFile:
    """A sealed file on its way: taken, read, and not settled yet."""

    def __init__(
        self, locked_file: LockedFile, data: bytes, contents: reader.FileContents, stored_bytes: int, started_s: float
    ) -> None:
        self.locked_file = locked_file
        self.name = locked_file.name
        self.batch_id = layout.batch_id(locked_file.name)
        self.payloads: Sequence[bytes] = contents.payloads
        self.records = len(contents.payloads)
        self.damaged_ranges = contents.damaged
        self.data = data if contents.damaged else b""
        self.plain_bytes = len(data)
        self.stored_bytes = stored_bytes  # bytes on disk, where it may be compressed
        self.started_s = started_s
        self.accepted = 0
        self.duplicates = 0
        self.dead_letters: dict[int, DeadLetter] = {}
        self.discarded_kinds: set[str] = set()  # what of it is not kept, for want of room: "dead", "quarantine"


class AttemptHistory(NamedTuple):
    """What was tried with a file before, by this process: a file that is put off comes again."""

    attempts: int = 0
    first_at_micros: int = 0
    failing_since: float | None = None  # monotonic seconds


class SendRequest:
    """Files whose records go out as one batch, and what becomes of each record."""

    def __init__(
        self,
        files: list[BatchFile],
        clock: Clock,
        yield_gil: Callable[[], None],
        history: AttemptHistory,
        *,
        accepted_since_rejection: bool,
    ) -> None:
        self.files = files
        self._clock = clock
        first = files[0]
        more = f"+{len(files) - 1}" if len(files) > 1 else ""
        payloads = first.payloads if not more else [payload for job in files for payload in job.payloads]
        self.batch = Batch(first.batch_id + more, payloads, yield_gil=yield_gil)
        self.records = len(payloads)
        self.accepted_since_rejection = (
            accepted_since_rejection  # the destination has accepted something since it refused this as a whole
        )
        self.attempts = history.attempts
        self.first_at_micros = history.first_at_micros or clock.micros()
        self.failing_since = history.failing_since
        self.accepted = 0
        self.duplicates = 0
        self.rejected: dict[int, tuple[Rejection, int]] = {}  # by index among all records: why, and after how many attempts
        self.rejected_calls = 0  # in a row

    def attempt_history(self) -> AttemptHistory:
        """What to remember where it is put off."""
        return AttemptHistory(self.attempts, self.first_at_micros, self.failing_since)

    def add_accepted(self, accepted: int, duplicates: int) -> None:
        """So many records of a part arrived."""
        self.accepted += accepted
        self.duplicates += duplicates

    def add_rejected(self, part: Batch, rejections: dict[int, Rejection]) -> None:
        """The records at these indexes of a part did not, and will not."""
        for index, refusal in rejections.items():
            self.rejected[part.first_index + index] = (
                Rejection(_printable(refusal.code), _printable(refusal.reason)),
                self.attempts,
            )

    def assign_results(self, sink_name: str) -> None:
        """Give each file its share of what became of the records; those that are refused become dead letters."""
        first = 0
        now = self._clock.micros()
        accepted, duplicates = self.accepted, self.duplicates
        for job in self.files:
            for index in range(first, first + job.records) if self.rejected else ():
                if index in self.rejected:
                    refusal, attempts = self.rejected[index]
                    event = msgspec.Raw(self.batch.payloads[index])
                    job.dead_letters[index - first] = DeadLetter(
                        event, refusal.code, refusal.reason, sink_name, index - first, attempts, self.first_at_micros, now
                    )
            # What the destination says of all of them is each one's as far as it goes: the account must show what is missing.
            job.accepted = min(accepted, job.records - len(job.dead_letters)) if job is not self.files[-1] else accepted
            job.duplicates = min(duplicates, job.accepted)
            accepted -= job.accepted
            duplicates -= job.duplicates
            job.payloads = ()  # what is sent again is read again
            first += job.records
        self.batch.payloads = ()


def _printable(text: object) -> str:
    """Text that can be written down, whatever a destination or a sink has put into it."""
    return str(text).encode(errors="backslashreplace").decode()
