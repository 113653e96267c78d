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

from pillarbox.delivery.dead_letter import DeadLetter
from pillarbox.delivery.retry import AttemptHistory
from pillarbox.sinks.base import Batch, Rejection
from pillarbox.store import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pillarbox.delivery.rejects import FileRejects
    from pillarbox.delivery.retry import Verdict
    from pillarbox.store.directory import LockedFile
    from pillarbox.store.filesystem import Filesystem
    from pillarbox.store.reader import FileContents
    from pillarbox.store.windows import Window


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
        self.window: Window | None = None  # the window that was read last, if the file is larger than one
        self.next_windows: Iterator[Window] = iter(())  # the windows after it


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
        if first.window is not None:
            self.batch = Batch(_window_id(first.batch_id, 0, len(payloads)), payloads, yield_gil=yield_gil)
        self.records = len(payloads)
        self.history = history._replace(first_at_micros=history.first_at_micros or now_micros)
        self.accepted_since_rejection = accepted_since_rejection  # another batch, since this one was wholly rejected
        self.accepted_before = 0  # records accepted in earlier windows of the file

    @property
    def is_windowed(self) -> bool:
        """Whether this is a window of a file that is larger than one."""
        return self.files[0].window is not None

    @property
    def has_next_window(self) -> bool:
        """Whether the file has another window after this one."""
        window = self.files[0].window
        return window is not None and not window.is_last

    def advance(self, result: SendResult) -> None:
        """Advance to the next window of the file, after the result of this one. Raises `OSError`."""
        (file,) = self.files
        first, yield_gil = self.batch.first_index + self.records, self.batch.yield_gil
        file.payloads, file.data, file.window, self.batch.payloads = (), b"", None, ()  # before the next one is read
        file.window = next(file.next_windows)
        payloads = file.window.contents.payloads
        batch_id = _window_id(file.batch_id, first, len(payloads))
        self.batch = Batch(batch_id, payloads, first, yield_gil)
        self.records = len(payloads)
        self.accepted_before += result.accepted
        # Attempts are counted anew. The time since the first failure is kept, so that an age limit applies to the whole file.
        failing_since = None if result.accepted else result.failing_since
        self.history = AttemptHistory(0, self.history.first_at_micros, failing_since)

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

    def window_letters(self, sink_name: str, now_micros: int) -> dict[int, DeadLetter]:
        """The dead letters of a window, by their index in the file."""
        batch = self._request.batch
        letters = self._dead_letters(batch.first_index, self._request.records, sink_name, now_micros, batch.first_index)
        return {
            batch.first_index + index: msgspec.structs.replace(letter, index=batch.first_index + index)
            for index, letter in letters.items()
        }

    def _dead_letters(
        self, first: int, records: int, sink_name: str, now_micros: int, payload_base: int = 0
    ) -> dict[int, DeadLetter]:
        dead: dict[int, DeadLetter] = {}
        for index in range(first, first + records):
            if index in self.rejected:
                rejection, attempts = self.rejected[index]
                dead[index - first] = DeadLetter(
                    msgspec.Raw(self._request.batch.payloads[index - payload_base]),
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
    rejects: FileRejects | None = None  # dead letters and damaged bytes of a file that was sent in windows

    @property
    def dead_count(self) -> int:
        """The number of dead letters."""
        return len(self.dead_letters) if self.rejects is None else self.rejects.dead_letters

    @property
    def damaged_count(self) -> int:
        """The number of damaged ranges."""
        return len(self.file.damaged_ranges) if self.rejects is None else self.rejects.damaged_ranges

    def close(self, filesystem: Filesystem) -> None:
        """Release the lock of the file; it is fetched and sent again."""
        if self.rejects is not None:
            self.rejects.abandon()
        filesystem.close(self.file.locked_file.fd)


class SentBatch:
    """Files that went out together and are not settled yet. `files` becomes shorter while they are settled."""

    def __init__(self, batch: Batch, files: list[DeliveredFile]) -> None:
        self.batch = batch
        self.files = files
        self.file_count = len(files)
        self.was_dropped = False  # it was not confirmed, and must be sent again

    def close_files(self, filesystem: Filesystem) -> None:
        """Release the locks of the files that are left; they are fetched and sent again."""
        for delivered in self.files:
            delivered.close(filesystem)


def _window_id(batch_id: str, first: int, records: int) -> str:
    return f"{batch_id}:{first}-{first + records - 1}"


def _printable(text: object) -> str:
    """Make text encodable, whatever a destination or a sink has put into it."""
    return str(text).encode(errors="backslashreplace").decode()
