"""Takes and reads sealed files, in order, and makes shipments of them; one is read ahead while another is on its way."""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Final

from pillarbox.clock import yield_gil
from pillarbox.delivery.lister import BatchLister
from pillarbox.delivery.request import BatchFile, SendRequest
from pillarbox.delivery.scheduler import Scheduler
from pillarbox.errors import FileUnusableError
from pillarbox.sinks.base import YIELD_EVERY_RECORDS
from pillarbox.store import layout, reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pillarbox.clock import Clock
    from pillarbox.delivery.policy import DeliveryConfig
    from pillarbox.delivery.retry import PoisonTracker
    from pillarbox.delivery.settlement import Settler
    from pillarbox.delivery.status import StatusReporter
    from pillarbox.sinks.base import Sink
    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")

COMBINED_RECORDS_MAX: Final = 500  # of small files that go out in one call, where the sink takes that: as many as a file has
COMBINED_BYTES_MAX: Final = 1_000_000
COMBINED_FILES_MAX: Final = 64  # each holds a descriptor
OPEN_FILES_MAX: Final = 256  # of all calls that are under way, and the one that is read ahead
_LOCK_WAIT_S: Final = 1.0  # how long to wait for a file that another process has before the next one is sent


class Fetcher:
    """The names that are to go, and what is read of them. While `is_busy()`, the interpreter is given away often."""

    def __init__(
        self,
        directory: Directory,
        sink: Sink,
        clock: Clock,
        config: DeliveryConfig,
        status: StatusReporter,
        poison_tracker: PoisonTracker,
        settler: Settler,
        is_busy: Callable[[], bool],
    ) -> None:
        self._directory = directory
        self._sink = sink
        self._clock = clock
        self._config = config
        self._status = status
        self._poison_tracker = poison_tracker
        self._settler = settler
        self._is_busy = is_busy
        self.lister = BatchLister(directory, settler.sync_names, config.page_files)
        self.scheduler = Scheduler(config.live_share)
        self._prefetched: SendRequest | None = None  # read while the one before it is on its way
        self._carried_over: BatchFile | None = None  # read, and too large for the shipment before it
        self._lines_since_yield = 0  # of small files, since the interpreter was given away
        self._locked_since: dict[str, float] = {}  # the files that another process has, and since when

    @property
    def has_more(self) -> bool:
        """Whether anything is left to send, as far as is known."""
        return self._prefetched is not None or self._has_unread()

    def _has_unread(self) -> bool:
        return bool(self.scheduler) or self._carried_over is not None

    def next_request(self) -> SendRequest | None:
        """The next file, or the next small ones that the sink takes together; None where none can be read."""
        request, self._prefetched = self._prefetched or self._fetch_request(), None
        return request

    def prefetch(self) -> None:
        """Read and prepare what goes next, while there is time."""
        if self._prefetched is None and not self.waits_for_lock() and self._has_unread():
            self._prefetched = self._fetch_request()
            if self._prefetched is not None:
                with contextlib.suppress(Exception):  # it is no part of this call; what is wrong shows in the next
                    self._sink.prepare(self._prefetched.batch)

    @property
    def locked_elsewhere(self) -> Iterable[str]:
        """The files that another process has."""
        return self._locked_since

    def drop_pending(self) -> None:
        """Have the next look at the directory find everything in order."""
        self._drop_names()
        if self._prefetched is not None:
            self.close_request(self._prefetched)
            self._prefetched = None
        if self._carried_over is not None:
            self._directory.filesystem.close(self._carried_over.locked_file.fd)
            self._carried_over = None

    def _drop_names(self) -> None:
        self.scheduler.clear()
        self.lister.reset()

    def close_request(self, request: SendRequest) -> None:
        """Let go of its files: they are sent again."""
        for file in request.files:
            self._directory.filesystem.close(file.locked_file.fd)

    def waits_for_lock(self) -> bool:
        """Whether a file that another process has is to be waited for, for its turn comes before the others'."""
        now = self._clock.monotonic()
        return any(now - since < _LOCK_WAIT_S for since in self._locked_since.values())

    def forget_missing(self, existing: set[str]) -> None:
        """Of the files that another process has, forget those that are gone."""
        if self._locked_since:
            self._locked_since = {name: since for name, since in self._locked_since.items() if name in existing}

    def _fetch_request(self) -> SendRequest | None:
        files: list[BatchFile] = []
        try:
            self._fetch_files(files)
        except BaseException:
            for file in files:
                self._directory.filesystem.close(file.locked_file.fd)
            raise
        if not files:
            return None
        name = files[0].name
        history, proven = self._poison_tracker.history_of(name), self._poison_tracker.accepted_since_rejection(name)
        return SendRequest(files, self._clock, self._yield_gil_if_busy, history, accepted_since_rejection=proven)

    def _fetch_files(self, files: list[BatchFile]) -> None:
        while self._has_unread():
            file, self._carried_over = self._carried_over or self._fetch_file(self.scheduler.pop_next()), None
            if file is None:
                if self.waits_for_lock():
                    return  # those behind it are not to overtake it
                continue
            if files and not self._fits_with(files, file):
                self._carried_over = file
                return
            files.append(file)
            if not self._sink.capabilities.combines_files:
                return

    def _fits_with(self, fetched: list[BatchFile], file: BatchFile) -> bool:
        """Whether a file goes out together with these; one that was refused goes by itself, to be judged by itself."""
        count = len(fetched) + 1
        if count > COMBINED_FILES_MAX or count * (self._config.max_in_flight + 1) > OPEN_FILES_MAX:
            return False
        if any(self._poison_tracker.is_tracked(one.name) and self._must_go_alone(one.name) for one in (fetched[0], file)):
            return False  # those between the two were asked about when they came
        records, size = file.records, file.plain_bytes
        for each in fetched:
            records += each.records
            size += each.plain_bytes
        return records <= COMBINED_RECORDS_MAX and size <= COMBINED_BYTES_MAX

    def _must_go_alone(self, name: str) -> bool:
        return name in self._poison_tracker.send_alone or self._poison_tracker.accepted_since_rejection(name)

    def _fetch_file(self, name: str) -> BatchFile | None:
        """Take and read a sealed file; None where another has it or it cannot be read (it is tried again later)."""
        try:
            file = self._directory.lock_existing(name)
            if file is None:
                since = self._locked_since.setdefault(name, self._clock.monotonic())
                if self._clock.monotonic() - since >= _LOCK_WAIT_S:
                    self._status.warn(name, "another process has it, and does not let go of it")
                return None
            self._locked_since.pop(name, None)
            try:
                data = self._directory.filesystem.read_all(file.fd)
                contents, plain = reader.read_file(name, data, self._yield_hook(name, data))
                job = BatchFile(file, plain, contents, len(data), self._clock.monotonic())
            except BaseException:
                self._directory.filesystem.close(file.fd)
                raise
        except (OSError, FileUnusableError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                self._drop_names()  # no fault of the file's: all are tried again later
                self._status.transition("degraded", str(error))
                return None
            if self._status.warn(name, f"it cannot be read: {error}"):
                log.error("%s is stepped over, it cannot be read: %s", name, error)  # noqa: TRY400 - the trace says nothing
            self._status.set_healthy("idle")
            return None
        if not self._settler.is_held(name):
            self._status.clear_warning(name)
        return job

    def _yield_hook(self, name: str, data: bytes) -> Callable[[], None]:
        """What reading a file calls every so many lines; nothing for one of several small files that together have fewer."""
        self._lines_since_yield += data.count(b"\n") + 1
        if self._lines_since_yield < YIELD_EVERY_RECORDS and not name.endswith(layout.COMPRESSED_SUFFIX):
            return _no_yield
        self._lines_since_yield = 0
        return self._yield_gil_if_busy

    def _yield_gil_if_busy(self) -> None:
        # 60 us or so each time, for the kernel rounds the shortest sleep up: not for nobody.
        if self._is_busy():
            yield_gil()


def _no_yield() -> None:
    pass
