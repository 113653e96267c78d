"""The stages of a batch's life, one type for each.

1. Named: a `str`, the name of a sealed file, from `fetcher.BatchLister`.
2. Fetched: a `BatchFile`, locked and read by `fetcher.Fetcher`.
3. In flight: a `SendRequest`, one call's files, with the `SendResult` that `sender.Sender` fills.
4. Sent: a `SentBatch` of `DeliveredFile`s; each has its share of the result. It may still need a confirmation.
5. Settled: only the ledger entry is left; see `settlement`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pillarbox.delivery.retry import AttemptHistory
from pillarbox.sinks.base import Batch, Rejection
from pillarbox.store import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pillarbox.delivery.retry import Verdict
    from pillarbox.store.directory import LockedFile
    from pillarbox.store.filesystem import Filesystem
    from pillarbox.store.reader import FileContents


class DeadLetter(msgspec.Struct, frozen=True):
    """A well-formed record that the destination rejected for good; one line of a `dead-` file."""

    event: msgspec.Raw
    code: str
    reason: str
    sink: str
    index: int  # position among the well-formed records of the batch, from 0
    attempts: int
    first_at_micros: int
    last_at_micros: int


class BatchFile:
    """A batch file that this process has locked and read."""

    def __init__(
        self, locked_file: LockedFile, data: bytes, contents: FileContents, stored_bytes: int, started_s: float
    ) -> None:
        self.locked_file = locked_file
        self.name = locked_file.name
        self.batch_id = layout.batch_id(locked_file.name)
        self.payloads: Sequence[bytes] = contents.payloads
        self.records = len(contents.payloads)
        self.damaged_ranges = contents.damaged
        self.data = data if contents.damaged else b""  # source of the bytes that are quarantined
        self.plain_bytes = len(data)
        self.stored_bytes = stored_bytes  # on disk, where it may be compressed
        self.started_s = started_s  # monotonic


class SendRequest:
    """What goes out together: one batch file, or several small ones if the sink combines files."""

    def __init__(
        self,
        files: list[BatchFile],
        now_micros: int,
        yield_gil: Callable[[], None],
        history: AttemptHistory,
        *,
        accepted_since_rejection: bool,
    ) -> None:
        self.files = files
        first = files[0]
        suffix = f"+{len(files) - 1}" if len(files) > 1 else ""
        payloads = first.payloads if not suffix else [payload for file in files for payload in file.payloads]
        self.batch = Batch(first.batch_id + suffix, payloads, yield_gil=yield_gil)
        self.records = len(payloads)
        self.history = history._replace(first_at_micros=history.first_at_micros or now_micros)
        self.accepted_since_rejection = accepted_since_rejection  # another batch, since this one was wholly rejected

    def close_files(self, filesystem: Filesystem) -> None:
        """Release the locks; the files are fetched and sent again."""
        for file in self.files:
            filesystem.close(file.locked_file.fd)


class SendResult:
    """The destination's answer for each record of a request. The sender fills it in, part by part."""

    def __init__(self, request: SendRequest) -> None:
        self.verdict: Verdict | None = None  # None if the worker had to end first
        self.accepted = 0
        self.duplicates = 0
        self.rejected: dict[int, tuple[Rejection, int]] = {}  # by index among all records; with the number of attempts
        self.rejected_calls = 0  # consecutive calls that were rejected
        self.attempts = request.history.attempts
        self.failing_since = request.history.failing_since
        self._request = request

    @property
    def history(self) -> AttemptHistory:
        """What to remember if the batch is deferred."""
        return AttemptHistory(self.attempts, self._request.history.first_at_micros, self.failing_since)

    def add_accepted(self, accepted: int, duplicates: int) -> None:
        """Count records of a part that the destination accepted."""
        self.accepted += accepted
        self.duplicates += duplicates

    def add_rejected(self, part: Batch, rejections: dict[int, Rejection]) -> None:
        """Note the records of a part that the destination rejected, by their index in the part."""
        for index, rejection in rejections.items():
            clean = Rejection(_printable(rejection.code), _printable(rejection.reason))
            self.rejected[part.first_index + index] = (clean, self.attempts)

    def to_sent_batch(self, sink_name: str, now_micros: int) -> SentBatch:
        """Give each file its share of the result; rejected records become dead letters."""
        request, first = self._request, 0
        accepted, duplicates = self.accepted, self.duplicates
        files: list[DeliveredFile] = []
        for file in request.files:
            dead = self._dead_letters(first, file.records, sink_name, now_micros) if self.rejected else {}
            # The sink counts for all files together. Each gets at most its own records, the last one the rest: if the sink
            # counted wrongly, the reconciliation must show it.
            is_last = file is request.files[-1]
            own_accepted = accepted if is_last else min(accepted, file.records - len(dead))
            own_duplicates = min(duplicates, own_accepted)
            files.append(DeliveredFile(file, own_accepted, own_duplicates, dead))
            accepted -= own_accepted
            duplicates -= own_duplicates
            first += file.records
        for file in request.files:
            file.payloads = ()  # a batch that is sent again is read again
        request.batch.payloads = ()
        return SentBatch(request.batch, files)

    def _dead_letters(self, first: int, records: int, sink_name: str, now_micros: int) -> dict[int, DeadLetter]:
        dead: dict[int, DeadLetter] = {}
        for index in range(first, first + records):
            if index in self.rejected:
                rejection, attempts = self.rejected[index]
                dead[index - first] = DeadLetter(
                    msgspec.Raw(self._request.batch.payloads[index]),
                    rejection.code,
                    rejection.reason,
                    sink_name,
                    index - first,
                    attempts,
                    self._request.history.first_at_micros,
                    now_micros,
                )
        return dead


class DeliveredFile(NamedTuple):
    """A batch file and the destination's answer for its records."""

    file: BatchFile
    accepted: int
    duplicates: int
    dead_letters: dict[int, DeadLetter]  # by index among the well-formed records


class SentBatch:
    """Files that went out together and are not settled yet. `files` becomes shorter while they are settled."""

    def __init__(self, batch: Batch, files: list[DeliveredFile]) -> None:
        self.batch = batch
        self.files = files
        self.file_count = len(files)

    def close_files(self, filesystem: Filesystem) -> None:
        """Release the locks of the files that are left; they are fetched and sent again."""
        for delivered in self.files:
            filesystem.close(delivered.file.locked_file.fd)


def _printable(text: object) -> str:
    """Make text encodable, whatever a destination or a sink has put into it."""
    return str(text).encode(errors="backslashreplace").decode()
