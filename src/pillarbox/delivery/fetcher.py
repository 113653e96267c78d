"""Takes and reads sealed files, in order, and makes shipments of them; one is read ahead while another is on its way."""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Final

from pillarbox.clock import yield_gil
from pillarbox.delivery.backlog import Backlog
from pillarbox.delivery.lineup import Lineup
from pillarbox.delivery.shipment import Job, Shipment
from pillarbox.errors import FileUnusableError
from pillarbox.sinks.base import YIELD_EVERY_RECORDS
from pillarbox.store import layout, reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pillarbox.clock import Clock
    from pillarbox.delivery.policy import Rules
    from pillarbox.delivery.retry import Suspects
    from pillarbox.delivery.settlement import Settler
    from pillarbox.delivery.status import Standing
    from pillarbox.sinks.base import Sink
    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")

TOGETHER_RECORDS: Final = 500  # of small files that go out in one call, where the sink takes that: as many as a file has
TOGETHER_BYTES: Final = 1_000_000
TOGETHER_FILES: Final = 64  # each holds a descriptor
OPEN_FILES_MAX: Final = 256  # of all calls that are under way, and the one that is read ahead
_HELD_S: Final = 1.0  # how long to wait for a file that another process has before the next one is sent


class Loader:
    """The names that are to go, and what is read of them. While `busy()`, the interpreter is given away often."""

    def __init__(
        self,
        directory: Directory,
        sink: Sink,
        clock: Clock,
        rules: Rules,
        standing: Standing,
        suspects: Suspects,
        settler: Settler,
        busy: Callable[[], bool],
    ) -> None:
        self._directory = directory
        self._sink = sink
        self._clock = clock
        self._rules = rules
        self._standing = standing
        self._suspects = suspects
        self._settler = settler
        self._busy = busy
        self.backlog = Backlog(directory, settler.sync_names, rules.named_at_once)
        self.lineup = Lineup(rules.live_share)
        self._ahead: Shipment | None = None  # read while the one before it is on its way
        self._spare: Job | None = None  # read, and too large for the shipment before it
        self._lines = 0  # of small files, since the interpreter was given away
        self._held: dict[str, float] = {}  # the files that another process has, and since when

    @property
    def has_more(self) -> bool:
        """Whether anything is left to send, as far as is known."""
        return self._ahead is not None or self._has_unread()

    def _has_unread(self) -> bool:
        return bool(self.lineup) or self._spare is not None

    def next(self) -> Shipment | None:
        """The next file, or the next small ones that the sink takes together; None where none can be read."""
        shipment, self._ahead = self._ahead or self._load_shipment(), None
        return shipment

    def read_ahead(self) -> None:
        """Read and prepare what goes next, while there is time."""
        if self._ahead is None and not self.waits_for_another() and self._has_unread():
            self._ahead = self._load_shipment()
            if self._ahead is not None:
                with contextlib.suppress(Exception):  # it is no part of this call; what is wrong shows in the next
                    self._sink.prepare(self._ahead.batch)

    @property
    def held(self) -> Iterable[str]:
        """The files that another process has."""
        return self._held

    def forget(self) -> None:
        """Have the next look at the directory find everything in order."""
        self._forget_names()
        if self._ahead is not None:
            self.close(self._ahead)
            self._ahead = None
        if self._spare is not None:
            self._directory.filesystem.close(self._spare.file.fd)
            self._spare = None

    def _forget_names(self) -> None:
        self.lineup.clear()
        self.backlog.forget()

    def close(self, shipment: Shipment) -> None:
        """Let go of its files: they are sent again."""
        for job in shipment.jobs:
            self._directory.filesystem.close(job.file.fd)

    def waits_for_another(self) -> bool:
        """Whether a file that another process has is to be waited for, for its turn comes before the others'."""
        now = self._clock.monotonic()
        return any(now - since < _HELD_S for since in self._held.values())

    def keep_only(self, names: set[str]) -> None:
        """Of the files that another process has, forget those that are gone."""
        if self._held:
            self._held = {name: since for name, since in self._held.items() if name in names}

    def _load_shipment(self) -> Shipment | None:
        jobs: list[Job] = []
        try:
            self._load_some(jobs)
        except BaseException:
            for job in jobs:
                self._directory.filesystem.close(job.file.fd)
            raise
        if not jobs:
            return None
        name = jobs[0].name
        history, proven = self._suspects.history(name), self._suspects.is_proven(name)
        return Shipment(jobs, self._clock, self._give_way, history, proven=proven)

    def _load_some(self, jobs: list[Job]) -> None:
        while self._has_unread():
            job, self._spare = self._spare or self._load(self.lineup.take()), None
            if job is None:
                if self.waits_for_another():
                    return  # those behind it are not to overtake it
                continue
            if jobs and not self._goes_along(jobs, job):
                self._spare = job
                return
            jobs.append(job)
            if not self._sink.capabilities.combines_files:
                return

    def _goes_along(self, jobs: list[Job], job: Job) -> bool:
        """Whether a file goes out together with these; one that was refused goes by itself, to be judged by itself."""
        files = len(jobs) + 1
        if files > TOGETHER_FILES or files * (self._rules.max_in_flight + 1) > OPEN_FILES_MAX:
            return False
        if any(self._suspects.knows(one.name) and self._goes_alone(one.name) for one in (jobs[0], job)):
            return False  # those between the two were asked about when they came
        records, size = job.records, job.size
        for one in jobs:
            records += one.records
            size += one.size
        return records <= TOGETHER_RECORDS and size <= TOGETHER_BYTES

    def _goes_alone(self, name: str) -> bool:
        return name in self._suspects.alone or self._suspects.is_proven(name)

    def _load(self, name: str) -> Job | None:
        """Take and read a sealed file; None where another has it or it cannot be read (it is tried again later)."""
        try:
            file = self._directory.lock_existing(name)
            if file is None:
                since = self._held.setdefault(name, self._clock.monotonic())
                if self._clock.monotonic() - since >= _HELD_S:
                    self._standing.complain(name, "another process has it, and does not let go of it")
                return None
            self._held.pop(name, None)
            try:
                data = self._directory.filesystem.read_all(file.fd)
                contents, plain = reader.read_file(name, data, self._give_way_within(name, data))
                job = Job(file, plain, contents, len(data), self._clock.monotonic())
            except BaseException:
                self._directory.filesystem.close(file.fd)
                raise
        except (OSError, FileUnusableError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                self._forget_names()  # no fault of the file's: all are tried again later
                self._standing.enter("degraded", str(error))
                return None
            if self._standing.complain(name, f"it cannot be read: {error}"):
                log.error("%s is stepped over, it cannot be read: %s", name, error)  # noqa: TRY400 - the trace says nothing
            self._standing.well("idle")
            return None
        if not self._settler.is_parked(name):
            self._standing.withdraw(name)
        return job

    def _give_way_within(self, name: str, data: bytes) -> Callable[[], None]:
        """What reading a file calls every so many lines; nothing for one of several small files that together have fewer."""
        self._lines += data.count(b"\n") + 1
        if self._lines < YIELD_EVERY_RECORDS and not name.endswith(layout.COMPRESSED_SUFFIX):
            return _nothing
        self._lines = 0
        return self._give_way

    def _give_way(self) -> None:
        # 60 us or so each time, for the kernel rounds the shortest sleep up: not for nobody.
        if self._busy():
            yield_gil()


def _nothing() -> None:
    pass
