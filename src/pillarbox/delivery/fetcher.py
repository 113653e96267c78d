"""Lists the pending batches, decides their order, and locks and reads them.

`BatchLister` lists a directory a page at a time, `Scheduler` decides which batch goes next, and `Fetcher` reads it and makes a
`SendRequest` of it. One request is prefetched while another is in flight.

When a scan begins, a page is listed twice, with a sync of the names in between. Without the sync, a batch whose name a power
loss removes would come back under another name. Without the second listing, a batch could be overtaken: a listing may miss a
name that is created while it runs and show one that is created later, but the second listing shows every name that was created
before the last name of the first listing. No page goes beyond that name; later names are for the next scan.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from pillarbox.clock import yield_gil
from pillarbox.delivery.batch import BatchFile, SendRequest
from pillarbox.errors import FileUnusableError
from pillarbox.sinks.base import YIELD_EVERY_RECORDS
from pillarbox.store import layout, reader
from pillarbox.store.directory import BatchPage
from pillarbox.store.layout import Kind
from pillarbox.store.windows import WINDOW_BYTES, no_yield, read_windows

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from pillarbox.delivery.context import DeliveryContext
    from pillarbox.delivery.retry import PoisonTracker
    from pillarbox.delivery.settlement import Settler
    from pillarbox.store.directory import Directory, LockedFile

log = logging.getLogger("pillarbox")

COMBINED_RECORDS_MAX: Final = 500  # records in one request of several small files: as many as a full file has
COMBINED_BYTES_MAX: Final = 1_000_000
COMBINED_FILES_MAX: Final = 64  # files in such a request: each holds a descriptor
OPEN_FILES_MAX: Final = 256  # files in all requests in flight and the prefetched one
_LOCK_WAIT_S: Final = 1.0  # how long to wait for a file that another process has locked, before the next one is sent
_LIST_TIME_FACTOR: Final = 9  # listing in the middle of a drain may take a tenth of the time
_NO_NAME: Final = ""  # sorts before each name


class BatchLister:
    """Lists the batches of a directory, oldest first, at most `page_files` at a time: that bounds the memory for names.

    `sync_names()` makes the names durable.
    """

    def __init__(self, directory: Directory, sync_names: Callable[[], None], page_files: int) -> None:
        self._directory = directory
        self._sync_names = sync_names
        self._page_files = page_files
        self._lists_all = False
        self._page_start = _NO_NAME  # the last page begins after this name
        self._next_start = _NO_NAME  # the next page begins after this name
        self._end = _NO_NAME  # no page goes beyond this name

    @property
    def has_more(self) -> bool:
        """Whether there is another page."""
        return bool(self._next_start)

    def list_first_page(self, *, everything: bool) -> list[str]:
        """Start a scan and return the first page of names, or all of them. Raises `OSError`."""
        self.reset()
        self._lists_all = everything
        self._end = self._list_names(0).last
        return self.list_next_page() if self._end else []

    def list_next_page(self) -> list[str]:
        """Return the next page of names. Raises `OSError`; the next call then tries the same page again."""
        self._sync_names()
        page = self._list_names(self._page_files, self._next_start)
        self._page_start, self._next_start = self._next_start, page.next_after
        return page.names

    def reset(self) -> None:
        """End the scan."""
        self._page_start = self._next_start = self._end = _NO_NAME

    def is_outside_page(self, name: str) -> bool:
        """Whether a name is outside the last page, which then does not tell whether the file exists."""
        return name <= self._page_start or bool(self._next_start and name > self._next_start)

    def _list_names(self, limit: int, after: str = _NO_NAME) -> BatchPage:
        page = None if self._lists_all else self._directory.oldest_batches(limit, after, self._end)
        if page is None:
            names = [name for name in self._directory.batch_names() if name > after and (not self._end or name <= self._end)]
            page = BatchPage(names, "", names[-1] if names else "")
        return page


class Scheduler:
    """Decides which batch goes next: the oldest, or for a part of the sends one that was sealed since the drain began. Pure.

    Names sort by age. The batches that are pending when a drain begins are the backlog; those sealed from then on are live.
    Each of the two is first in, first out. While both have batches, `live_share` of the batches that are sent are live ones,
    evenly spread. With 0, all are sent in the order in which they were scheduled.
    """

    def __init__(self, live_share: float = 0.0) -> None:
        self._live_share = live_share
        self._backlog: deque[str] = deque()
        self._live: deque[str] = deque()
        self._live_credit = 0.0  # number of batches by which the live ones are behind their share
        self._newest = _NO_NAME  # of all names given so far
        self._newest_backlog = _NO_NAME

    def __bool__(self) -> bool:
        return bool(self._backlog or self._live)

    @property
    def is_backlog_done(self) -> bool:
        """Whether no backlog is left, so that batches sealed from now on change nothing."""
        return not self._backlog and self._newest_backlog != _NO_NAME

    def start_backlog(self) -> None:
        """Have all that waits at the next listing become the backlog."""
        self._newest_backlog = _NO_NAME

    def schedule(self, names: Sequence[str]) -> None:
        """Replace the schedule by these names, which are sorted by age."""
        self.clear()
        self._newest = names[-1] if names else self._newest
        if not names or min(names) > self._newest_backlog:
            self._newest_backlog = self._newest  # the old backlog is delivered, and these names are the next one
        self._add(names)

    def schedule_in_order(self, names: Sequence[str]) -> None:
        """Replace the schedule by these names, to go in this order whatever the share."""
        self.clear()
        self._newest = max(names, default=self._newest)
        self._backlog.extend(names)

    def add_live(self, names: Sequence[str]) -> None:
        """Add the batches among `names` that were sealed since the last listing."""
        new_names = [name for name in names if name > self._newest]
        self._newest = new_names[-1] if new_names else self._newest
        if self._newest_backlog == _NO_NAME:
            self._newest_backlog = self._newest
            new_names = sorted([*self._backlog, *self._live, *new_names])
            self.clear()
        self._add(new_names)

    def _add(self, names: Sequence[str]) -> None:
        if not self._live_share:
            self._backlog.extend(names)
            return
        self._backlog.extend(name for name in names if name <= self._newest_backlog)
        self._live.extend(name for name in names if name > self._newest_backlog)

    def pop_next(self) -> str:
        """Take the next name. Raises `IndexError` if there is none."""
        if not self._backlog or not self._live:
            return (self._backlog or self._live).popleft()
        self._live_credit += self._live_share
        if self._live_credit < 1:
            return self._backlog.popleft()
        self._live_credit -= 1
        return self._live.popleft()

    def clear(self) -> None:
        """Drop all names. What counts as backlog stays the same."""
        self._backlog.clear()
        self._live.clear()


class Fetcher:
    """Yields the requests to send. While `is_busy()`, it yields the GIL often."""

    def __init__(
        self, context: DeliveryContext, poison_tracker: PoisonTracker, settler: Settler, is_busy: Callable[[], bool]
    ) -> None:
        self._directory = context.directory
        self._sink = context.sink
        self._clock = context.clock
        self._config = context.config
        self._status = context.status
        self._poison_tracker = poison_tracker
        self._settler = settler
        self._is_busy = is_busy
        self._lister = BatchLister(context.directory, settler.sync_names, context.config.page_files)
        self._scheduler = Scheduler(context.config.live_share)
        self._prefetched: SendRequest | None = None
        self._carried_over: BatchFile | None = None  # a file that was read and is too large for the request before it
        self._lines_since_yield = 0
        self._locked_since: dict[str, float] = {}  # files that another process has locked, and since when
        self._listed_at = self._list_after = 0.0  # monotonic seconds

    # Listing and scheduling.

    @property
    def has_more(self) -> bool:
        """Whether any batch is scheduled."""
        return self._prefetched is not None or self._has_unread()

    @property
    def has_more_pages(self) -> bool:
        """Whether batches are left that are not listed yet."""
        return self._lister.has_more

    def start_backlog(self) -> None:
        """Have all that waits at the next listing become the backlog."""
        self._scheduler.start_backlog()

    def start_drain(self) -> None:
        """Note that a drain begins: live batches are listed from a while after now."""
        self._listed_at = self._clock.monotonic()

    def schedule_first_page(self, unconfirmed: set[str]) -> None:
        """Begin a scan and schedule what it finds, except for unconfirmed batches. Raises `OSError`, `FileUnusableError`."""
        # Any other order than that of the names requires that all of them are known.
        everything = self._poison_tracker.has_deferred or self._config.live_share > 0
        self._schedule(self._lister.list_first_page(everything=everything), unconfirmed)

    def schedule_next_pages(self, unconfirmed: set[str]) -> bool:
        """Schedule the next page that has something to send; False if nothing is left to send in this scan."""
        while self._lister.has_more and not self.has_more and not self._poison_tracker.has_deferred:
            try:
                self._schedule(self._lister.list_next_page(), unconfirmed)
            except (OSError, FileUnusableError) as error:
                self._status.transition("degraded", str(error))
                break
        return self.has_more

    def schedule_live(self, work: asyncio.Event) -> None:
        """In the middle of a drain, schedule the batches that were sealed meanwhile, if `live_share` is not 0.

        Clears `work`, which is set when there may be new ones. A tenth of the time at most goes into listing.
        """
        began = self._clock.monotonic()
        if not self._config.live_share or self._poison_tracker.has_deferred or began < self._list_after:
            return
        if not work.is_set() and began < self._listed_at + self._config.poll_interval_s:
            return
        if self._scheduler.is_backlog_done:
            return
        work.clear()
        with contextlib.suppress(OSError, FileUnusableError):  # the next scan reports it
            self._scheduler.add_live(self._lister.list_first_page(everything=True))
        self._listed_at = self._clock.monotonic()
        self._list_after = self._listed_at + _LIST_TIME_FACTOR * (self._listed_at - began)

    def _schedule(self, names: list[str], unconfirmed: set[str]) -> None:
        selected = self._select(names, unconfirmed)
        if self._poison_tracker.has_deferred:
            self._scheduler.schedule_in_order(selected)
        else:
            self._scheduler.schedule(selected)

    def _select(self, names: list[str], unconfirmed: set[str]) -> list[str]:
        """Which of the listed batches to send now, in order. Drops what is remembered of files that no longer exist."""
        existing = set(names)
        # Names outside the listed page: ask the directory.
        for name in (
            *self._locked_since,
            *self._settler.held_names,
            *self._poison_tracker.tracked_names(),
            *self._status.warnings,
        ):
            if name not in existing and self._lister.is_outside_page(name) and self._directory.contains(name):
                existing.add(name)
        if self._locked_since:
            self._locked_since = {name: since for name, since in self._locked_since.items() if name in existing}
        for name in set(self._status.warnings) - existing if self._status.warnings else ():
            if layout.kind_of(name) is Kind.SEALED:
                self._status.clear_warning(name)
        self._poison_tracker.forget_missing(existing)
        unavailable = self._settler.unavailable(existing) | unconfirmed
        return self._poison_tracker.select_batches([name for name in names if name not in unavailable], self._clock.monotonic())

    def drop_pending(self) -> None:
        """Drop everything scheduled or read: the next scan finds it again, in order."""
        self._drop_names()
        if self._prefetched is not None:
            self._prefetched.close_files(self._directory.filesystem)
            self._prefetched = None
        if self._carried_over is not None:
            self._directory.filesystem.close(self._carried_over.locked_file.fd)
            self._carried_over = None

    def _drop_names(self) -> None:
        self._scheduler.clear()
        self._lister.reset()

    # Locking and reading.

    def next_request(self) -> SendRequest | None:
        """The next batch, or the next small ones that the sink combines; None if none can be read."""
        request, self._prefetched = self._prefetched or self._fetch_request(), None
        return request

    def prefetch(self) -> None:
        """Read and prepare the next request while another is in flight."""
        if self._prefetched is None and not self.waits_for_lock() and self._has_unread():
            self._prefetched = self._fetch_request()
            if self._prefetched is not None:
                with contextlib.suppress(Exception):  # `deliver` raises it again
                    self._sink.prepare(self._prefetched.batch)

    def waits_for_lock(self) -> bool:
        """Whether to wait for a file that another process has locked, because later files must not overtake it."""
        now = self._clock.monotonic()
        return any(now - since < _LOCK_WAIT_S for since in self._locked_since.values())

    def _has_unread(self) -> bool:
        return bool(self._scheduler) or self._carried_over is not None

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
        return SendRequest(
            files,
            self._clock.micros(),
            self._yield_gil_if_busy,
            self._poison_tracker.history_of(name),
            accepted_since_rejection=self._poison_tracker.accepted_since_rejection(name),
        )

    def _fetch_files(self, files: list[BatchFile]) -> None:
        while self._has_unread():
            file, self._carried_over = self._carried_over or self._fetch_file(self._scheduler.pop_next()), None
            if file is None:
                if self.waits_for_lock():
                    return  # the batches behind it must not overtake it
                continue
            if files and not self._fits_with(files, file):
                self._carried_over = file
                return
            files.append(file)
            if not self._sink.capabilities.combines_files:
                return

    def _fits_with(self, fetched: list[BatchFile], file: BatchFile) -> bool:
        """Whether a file goes into the same request as these. A rejected one goes alone, to be judged alone."""
        count = len(fetched) + 1
        if count > COMBINED_FILES_MAX or count * (self._config.max_in_flight + 1) > OPEN_FILES_MAX:
            return False
        if any(self._poison_tracker.is_tracked(each.name) and self._must_go_alone(each.name) for each in (fetched[0], file)):
            return False  # the files between the two were checked when they were added
        records = file.records + sum(each.records for each in fetched)
        plain_bytes = file.plain_bytes + sum(each.plain_bytes for each in fetched)
        return records <= COMBINED_RECORDS_MAX and plain_bytes <= COMBINED_BYTES_MAX

    def _must_go_alone(self, name: str) -> bool:
        return name in self._poison_tracker.send_alone or self._poison_tracker.accepted_since_rejection(name)

    def _fetch_file(self, name: str) -> BatchFile | None:
        """Lock and read a batch file; None if another process has it or it is unreadable. It is tried again later."""
        try:
            locked_file = self._directory.lock_existing(name)
            if locked_file is None:
                since = self._locked_since.setdefault(name, self._clock.monotonic())
                if self._clock.monotonic() - since >= _LOCK_WAIT_S:
                    self._status.warn(name, "locked by another process")
                return None
            self._locked_since.pop(name, None)
            try:
                file = self._read_file(locked_file)
            except BaseException:
                self._directory.filesystem.close(locked_file.fd)
                raise
        except (OSError, FileUnusableError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                self._drop_names()  # not the file's fault: all are tried again later
                self._status.transition("degraded", str(error))
                return None
            problem = str(error) or "there is not enough memory"
            if self._status.warn(name, f"unreadable: {problem}"):
                log.error("skipping unreadable batch file %s: %s", name, problem)  # noqa: TRY400 - the traceback tells nothing
            self._status.set_healthy("idle")
            return None
        if not self._settler.is_held(name):
            self._status.clear_warning(name)
        return file

    def _read_file(self, locked_file: LockedFile) -> BatchFile:
        """Read a file, or the first window of a large one."""
        filesystem, name, fd = self._directory.filesystem, locked_file.name, locked_file.fd
        size, now = filesystem.size(fd), self._clock.monotonic()
        if size <= WINDOW_BYTES and not name.endswith(layout.COMPRESSED_SUFFIX):
            data = filesystem.read_all(fd)
            return BatchFile(locked_file, data, reader.read_lines(data, self._yield_hook(data)), size, now)
        windows = read_windows(filesystem, name, fd, self._yield_gil_if_busy)
        first = next(windows)
        file = BatchFile(locked_file, first.data, first.contents, size, now)
        if not first.is_last:
            file.window, file.next_windows, file.plain_bytes = first, windows, max(size, len(first.data))
        return file

    def _yield_hook(self, data: bytes) -> Callable[[], None]:
        """The function that the reader calls after a number of lines; for small files it counts their lines together."""
        self._lines_since_yield += data.count(b"\n") + 1
        if self._lines_since_yield < YIELD_EVERY_RECORDS:
            return no_yield
        self._lines_since_yield = 0
        return self._yield_gil_if_busy

    def _yield_gil_if_busy(self) -> None:
        # A yield takes some 60 us, because the kernel rounds the shortest sleep up, so only while somebody waits for the GIL.
        if self._is_busy():
            yield_gil()
