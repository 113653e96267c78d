"""Hands sealed files over to the queues of several sinks, and makes these queues.

Order: a second name in each queue; the queues synced; the ledgers; then the name in the directory itself goes, and that is
what makes the others count (`Directory.batch_names`). Killed anywhere before, all of it is done again and finds the same names;
afterwards there is nothing left to do. So no sink misses a file, and none that has settled one is given it again.

A queue that is being made is called `sink-<name>.adding` until it holds all that it is to begin with. The first queues of a
directory begin with all that waits, later ones with what is sealed from then on, unless somebody asks for more
(`request_queue`).
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.clock import yield_gil
from pillarbox.errors import FileUnusableError
from pillarbox.store import layout, reader
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import FAN_OUT_WRITER, AdoptedEntry, FannedOutEntry, SealedEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory, LockedFile

GROUP_MAX_FILES: Final = 64  # files handed over together: each holds a descriptor, and the syncs serve them all
_LOCK_WAIT_S: Final = 1.0  # how long to wait for a file that another process has before those behind it go ahead


class _LinkedFile(NamedTuple):
    """A file on its way, and what is in it."""

    locked_file: LockedFile
    records: int
    damaged_ranges: int
    plain_bytes: int


class FanOut:
    """Does so for one directory, in the process that holds its `deliver.lock`; one thread's.

    While `is_busy()`, the interpreter is given away often.
    """

    def __init__(
        self,
        directory: Directory,
        sinks: Sequence[str],
        clock: Clock,
        ledger: LedgerWriter,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._directory = directory
        self._sinks = sinks
        self._clock = clock
        self._ledger = ledger
        self._ledgers: dict[str, LedgerWriter] = {}
        self._is_busy = is_busy
        self._is_prepared = False
        self._locked_since: dict[str, float] = {}  # files that another process has, and since when
        self.problems: dict[str, str] = {}  # files that cannot be handed over, and why

    @property
    def waits_for_lock(self) -> bool:
        """Whether a file is to be waited for that another process has."""
        return any(name not in self.problems for name in self._locked_since)

    def ledger_for(self, queue: Directory) -> LedgerWriter:
        """The pen for a queue's account: one a process."""
        return self._ledgers.setdefault(queue.sink, LedgerWriter(queue, self._clock))

    def distribute(self, should_continue: Callable[[], bool] = lambda: True) -> int:
        """Make what is missing and hand over what is there; how many files went. Raises `OSError`.

        After each group it is asked whether it `should_continue()`: a backlog takes its time.

        Every queue that is there gets them, also one that this process was not told of: a sink that is left out by mistake must
        not miss any.
        """
        if not self._is_prepared:  # whoever made or removed queues may have died before that was durable, or done
            self._directory.filesystem.sync_directory(self._directory.path)
            self._directory.finish_queue_removals()
            self._is_prepared = True
        queues = self._directory.queues()
        missing = [sink for sink in self._sinks if sink not in {queue.sink for queue in queues}]
        if missing:
            self._finish_adding(missing, first=not queues)
            queues = self._directory.queues()
        count, ended = self._distribute_all(queues, should_continue) if queues else (0, True)
        for sink in missing if ended else ():
            self._directory.queue(sink).ensure_usable()  # what was sealed before is not for it
        return count

    def _finish_adding(self, missing: Sequence[str], *, first: bool) -> None:
        """Make the queues that are to begin with what waits: all the first ones, and those that somebody asked for."""
        if first:
            for sink in missing:  # all of them before the first is done: what is cut short here is no later queue
                self._directory.request_queue(sink)
        asked = self._directory.requested_queues()
        for sink in missing:
            if sink in asked:
                added = self._directory.create_requested_queue(sink)
                if not first:  # of the first ones, the files are handed over next, and noted then
                    self._note_adopted(sink, added)

    def _note_adopted(self, sink: str, names: Sequence[str]) -> None:
        now = self._clock.micros()
        ledger = self.ledger_for(self._directory.queue(sink))
        ledger.add(*(AdoptedEntry(now, layout.batch_id(name), FAN_OUT_WRITER) for name in names))
        ledger.write(sync=True)

    def _distribute_all(self, queues: Sequence[Directory], should_continue: Callable[[], bool]) -> tuple[int, bool]:
        """How many files went, and whether that was all that is for these queues alone."""
        names = self._directory.batch_names()
        self._locked_since = (
            {name: since for name, since in self._locked_since.items() if name in names} if self._locked_since else {}
        )
        self.problems = {name: why for name, why in self.problems.items() if name in names} if self.problems else {}
        count = 0
        each = iter(names)
        while group := list(islice(each, GROUP_MAX_FILES)):
            went, may_follow = self._distribute_group(group, queues)
            count += went
            if not should_continue():
                return count, False
            if not may_follow:
                break
        return count, True

    def _distribute_group(self, names: Sequence[str], queues: Sequence[Directory]) -> tuple[int, bool]:
        """Hand over a group; how many files went, and whether those behind it may follow."""
        linked: list[_LinkedFile] = []
        goes_on = True
        # First, lest the loss of power undo a sealing whose file was handed over: it would be adopted, as another batch.
        self._directory.filesystem.sync_directory(self._directory.path)
        try:
            for name in names:
                goes_on = self._link_file(name, queues, linked)
                if not goes_on:
                    break
            if not linked:
                return 0, goes_on
            for queue in queues:
                queue.filesystem.sync_directory(queue.path)
            self._write_ledgers(linked, queues)
            for file in linked:
                self._directory.remove(file.locked_file.name)
            self._directory.filesystem.sync_directory(self._directory.path)
        finally:
            for file in linked:
                self._directory.filesystem.close(file.locked_file.fd)
        return len(linked), goes_on

    def _link_file(self, name: str, queues: Sequence[Directory], linked: list[_LinkedFile]) -> bool:
        """Take, read and link one file; False where its turn comes before the others' and another process has it."""
        try:
            locked_file = self._directory.lock_existing(name)
        except FileUnusableError as error:
            self.problems[name] = error.problem
            return True
        if locked_file is None:
            now = self._clock.monotonic()
            since = self._locked_since.setdefault(name, now)
            if now - since >= _LOCK_WAIT_S:
                self.problems[name] = "another process has it, and does not let go of it"
                return True
            return False
        self._locked_since.pop(name, None)
        try:
            data = self._directory.filesystem.read_all(locked_file.fd)
            contents, _ = reader.read_file(name, data, self._yield_gil_if_busy)
            for queue in queues:
                self._directory.link_into(queue, locked_file)
        except (OSError, FileUnusableError) as error:
            self._directory.filesystem.close(locked_file.fd)
            self.problems[name] = str(error)
            return True
        except BaseException:
            self._directory.filesystem.close(locked_file.fd)
            raise
        self.problems.pop(name, None)
        linked.append(_LinkedFile(locked_file, len(contents.payloads), len(contents.damaged), len(data)))
        return True

    def _yield_gil_if_busy(self) -> None:
        if self._is_busy():
            yield_gil()

    def _write_ledgers(self, linked: Sequence[_LinkedFile], queues: Sequence[Directory]) -> None:
        """Each queue's account begins with what was found; without room for the entries the files go ahead."""
        now = self._clock.micros()
        for queue in queues:
            ledger = self.ledger_for(queue)
            ledger.add(*(_sealed_entry(found, now) for found in linked))
            ledger.write(sync=True)
        sinks = [queue.sink for queue in queues]
        shared = (
            FannedOutEntry(now, layout.batch_id(file.locked_file.name), sinks, file.records, file.damaged_ranges)
            for file in linked
        )
        self._ledger.add(*shared)
        self._ledger.write(sync=True)


def _sealed_entry(file: _LinkedFile, now: int) -> SealedEntry:
    """The first entry of a file in a queue's ledger. How many events a damaged span was, nobody knows."""
    counted = None if file.damaged_ranges else file.records
    return SealedEntry(now, layout.batch_id(file.locked_file.name), FAN_OUT_WRITER, counted, file.plain_bytes)
