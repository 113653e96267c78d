"""Seals retired segments, in a thread of its own: syncs, renames, keeps spares ready, seals by age, and has limits enforced.

Work that could make a caller of `enqueue` wait is done here. `step` does one round and returns when the next one is due. The
thread does nothing but call it, so that a test can do the same with a clock of its own.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, get_args

import msgspec

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.drops import DropRecorder
from pillarbox.store.ledger_entries import AdoptedEntry, SealedEntry
from pillarbox.store.quota import QuotaEnforcer
from pillarbox.store.recovery import recover
from pillarbox.store.segment import SealReason
from pillarbox.store.state_log import StateLog
from pillarbox.store.writer import RETIRED_MAX
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory, LockedFile
    from pillarbox.store.group_commit import GroupCommitter
    from pillarbox.store.ledger import LedgerWriter
    from pillarbox.store.segment import Segment, UnsyncedLines
    from pillarbox.store.writer import Writer

log = logging.getLogger("pillarbox")

AGE_STRETCHED_MAX_S: Final = 60.0  # the longest stretched interval, unless `flush_interval` is longer
# How long retired segments may accumulate after a round that sealed some. Each system call here may cost a caller of `enqueue`
# a switch of threads, about 30 us on two cores; segments that are sealed in one round share many of the calls.
_PACE_S: Final = 0.03
_PACE_EVICTING_S: Final = 0.01  # the same with eviction, where a round also makes the room that callers need
_RETRY_S: Final = 1.0  # pause after a disk error


def stretched_flush_interval(flush_interval: float, waiting: int) -> float:
    """The seconds after which the active segment is sealed by age while `waiting` sealed files are not delivered yet."""
    return min(max(AGE_STRETCHED_MAX_S, flush_interval), flush_interval * 2.0 ** min(waiting, 16))


class SealerInbox:
    """Wakes the thread of a `Sealer`: for work of a writer, or for a caller who waits for a round."""

    def __init__(self) -> None:
        self._queue: threads.SimpleQueue[threads.Event | None] = threads.SimpleQueue()  # `put` takes no lock of ours

    def wake(self) -> None:
        """Report work. Quick and re-entrant."""
        self._queue.put(None)

    def add_ticket(self, ticket: threads.Event) -> None:
        """Wake the sealer, which sets `ticket` after its next round."""
        self._queue.put(ticket)

    def wait(self, timeout_s: float, gather_s: float) -> list[threads.Event]:
        """Wait for work, then for more of it to accumulate. Returns the tickets that came; a ticket ends both waits."""
        tickets: list[threads.Event] = []
        for wait in (timeout_s, gather_s):
            if not wait or tickets:
                continue
            try:
                ticket = self._queue.get(timeout=wait)
            except threads.Empty:
                continue
            if ticket is not None:
                tickets.append(ticket)
        while not self._queue.empty():
            ticket = self._queue.get_nowait()  # only this thread takes from the queue
            if ticket is not None:
                tickets.append(ticket)
        return tickets


class _StartGate:
    """Holds a new thread until all other parts have started, or one of them has failed to."""

    def __init__(self) -> None:
        self._opened = threads.Event()
        self._works = False

    def open(self, *, works: bool) -> None:
        """Let the thread continue; `works` says whether it works or ends."""
        self._works = works
        self._opened.set()

    def wait(self) -> bool:
        """Wait for `open`. Returns whether the thread works."""
        self._opened.wait()
        return self._works


class Sealer:
    """Seals what a `Writer` retires. `on_sealed()` is called from its thread after segments were sealed.

    `on_drops(totals)` is called from it in every round and at the end, with the number of dropped events by reason. It must not
    wait for the application.
    `uncounted_drops` are reasons of drops that are taken back before the next attempt.
    """

    def __init__(
        self,
        directory: Directory,
        writer: Writer,
        inbox: SealerInbox,
        clock: Clock,
        flush_interval: float,
        on_sealed: Callable[[], None],
        min_free_bytes: int | None = None,
        *,
        committer: GroupCommitter | None = None,
        syncs_spare_names: bool = False,
        evicts: bool = False,
        on_drops: Callable[[dict[str, int]], None] | None = None,
        ledger: LedgerWriter | None = None,
        uncounted_drops: Collection[str] = (),
    ) -> None:
        self._directory = directory
        self._writer = writer
        self._inbox = inbox
        self._clock = clock
        self._flush_interval = flush_interval
        self._on_sealed = on_sealed
        self._on_drops = on_drops
        self._ledger = ledger
        self.quota = QuotaEnforcer(directory, writer, clock, min_free_bytes, ledger, evicts=evicts)
        self._seal_requests = SealRequestReader(directory, clock)
        self._thread: threads.Thread | None = None
        self._start_gate = _StartGate()
        self._stopping = False
        self._ledger_behind = False  # the last write left entries in memory
        self._unrecorded: list[SealedEntry] = []  # sealed files whose names are not durable yet
        self._pace = 0.0  # seconds for which the next wait lets segments accumulate
        self._pace_s = _PACE_EVICTING_S if evicts else _PACE_S
        self._unsynced_lines: UnsyncedLines = (lambda _: ()) if committer is None else committer.unsynced_lines
        self._syncs_spare_names = syncs_spare_names  # answers callers with `durability="power"`
        # Segments synced in one call: a caller that waits for one of them waits for all.
        self._sync_at_once = 1 if syncs_spare_names else RETIRED_MAX
        self._active_since: tuple[str, float] | None = None
        writer_id = writer._writer_id  # noqa: SLF001 - the ledger's entries have the writer's id
        self._drop_recorder = DropRecorder(directory.path, writer_id, clock, ledger, self._drop_totals, uncounted_drops)
        self._disk_log = StateLog(clock)
        self._sync_log = StateLog(clock)
        self.problem = ""  # problem of the last round; empty if there was none
        self.sealed: dict[str, int] = dict.fromkeys(get_args(SealReason), 0)

    def start(self) -> None:
        """Start the thread, which waits for `run_rounds`. Raises `RuntimeError` if the system cannot start another thread."""
        self._seal_requests.has_new()  # requests that were made earlier do not concern this writer
        gate = _StartGate()
        thread = threads.Thread(target=self._run, args=(gate,), name="pillarbox-sealer")
        thread.start()
        self._thread, self._start_gate = thread, gate

    def run_rounds(self) -> None:
        """Let the thread work; the writer has started."""
        self._start_gate.open(works=True)

    def cancel_start(self) -> None:
        """End the thread before `run_rounds` was called."""
        self._start_gate.open(works=False)
        self._thread = None

    def seal_now(self, reason: SealReason, timeout: float) -> bool:
        """Retire the active segment and wait until everything retired so far is sealed. False after `timeout` seconds."""
        if not self._writer.rotate(reason):
            return False
        last = self._writer.retired_segments()[-1:]
        done = threads.Event()
        self._inbox.add_ticket(done)
        return done.wait(timeout) and not any(file is waiting for file in last for waiting in self._writer.retired_segments())

    def request_stop(self) -> None:
        """Tell the thread to seal the remaining segments and end."""
        self._stopping = True
        self._inbox.wake()

    def stop(self, timeout: float) -> bool:
        """Seal the remaining segments and end the thread. False if it has not ended after `timeout` seconds."""
        self.request_stop()
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def _run(self, gate: _StartGate) -> None:
        if not gate.wait():
            return
        self.adopt_segments()
        wait = 0.0
        while not self._stopping:
            pace, self._pace = self._pace, 0.0
            tickets = self._inbox.wait(wait, pace)
            try:
                wait = self.step()
            except Exception as error:  # a defect must not end this thread, because nothing would be sealed any more
                self.problem = f"a defect in Pillarbox: {type(error).__name__}: {error}"
                if self._disk_log.is_new_problem(self.problem):
                    log.exception("%s: a defect in Pillarbox while sealing", self._directory.path)
                wait = _RETRY_S
            for ticket in tickets:
                ticket.set()
        self.seal_remaining()

    def adopt_segments(self) -> None:
        """Seal the segments of dead writers, before any of this writer's."""
        try:
            adopted = recover(self._directory)
        except OSError as error:
            self._log_disk_state(f"cannot adopt what is in the directory: {error}")
            return
        for file in adopted:
            reason: SealReason = "startup" if file.active_name == layout.LEGACY_ACTIVE else "adopted"
            self.sealed[reason] += 1
            self._add_ledger_entry(
                AdoptedEntry(self._clock.micros(), layout.batch_id(file.sealed_name), layout.writer_of(file.active_name))
            )
        if adopted:
            self._write_ledger()
            files = "file" if len(adopted) == 1 else "files"
            log.info("%s: recovered %d %s of dead writers", self._directory.path, len(adopted), files)
            self._on_sealed()

    def step(self) -> float:
        """Do one round: create spares, seal by age, sync and rename, enforce the limits.

        Returns the seconds until the next is due.
        """
        problem = ""
        try:
            problem = self._create_spares(self._writer.poll_for_sealer())
            if self._seal_requests.has_new() and self._writer.rotate("manual"):
                self._seal_requests.mark_handled()
            wait = self._seal_by_age()
            self._seal_retired()
            self._writer.retire_if_full()  # a segment may hold fewer events now that the others are sealed
            wait = min(wait, self.quota.enforce())
        except (OSError, FileUnusableError) as error:
            problem = str(error)
            wait = _RETRY_S
        self._log_disk_state(problem)
        self.report_drops()
        if self._ledger_behind:
            self._write_ledger()
            wait = min(wait, _RETRY_S)
        return wait

    def _create_spares(self, count: int) -> str:
        """Create spares and give them to the writer.

        An error is returned, not raised, because sealing, which makes room, must continue.
        """
        if count <= 0:
            return ""
        spares, error = self._writer.create_spares(count)
        entered = bool(spares) and self._syncs_spare_names and error is None
        if entered:
            try:
                self._directory.filesystem.sync_directory(self._directory.path)
            except OSError as sync_error:
                error, entered = sync_error, False
        # Spares are added at once, here and below: a caller of `enqueue` in its system call holds the writer's lock, and both
        # sides pay for each switch.
        if spares:
            for file in self._writer.add_spares(spares, names_durable=entered):
                self._remove_empty(file)
        return "" if error is None else str(error)

    def seal_remaining(self) -> None:
        """Seal all segments, and remove empty ones. The writer accepts no more events."""
        empty = self._writer.close()
        try:
            self._seal_retired()
        except OSError as error:
            log.error("%s: not sealed at the end; recovered at the next start: %s", self._directory.path, error)  # noqa: TRY400 - a traceback adds nothing
            for left in self._writer.retired_segments():  # they may be recovered in this process
                self._directory.filesystem.close(left.locked_file.fd)
        for file in empty:
            self._remove_empty(file)
        self.report_drops(is_last=True)

    def remove_spares(self) -> bool:
        """Remove the spares of this process to free their inodes. Returns whether there were any."""
        spares = self._writer.take_spares()
        for file in spares:
            self._remove_empty(file)
        return bool(spares)

    def _remove_empty(self, file: LockedFile) -> None:
        filesystem = self._directory.filesystem
        try:
            if filesystem.size(file.fd) == 0:
                self._directory.remove(file.name)
        except OSError as error:
            log.warning("%s: an empty segment could not be removed; the next start removes it: %s", file.name, error)
        filesystem.close(file.fd)

    def _seal_by_age(self) -> float:
        active = self._writer.active_segment()
        if active is None:
            self._active_since = None
            return AGE_STRETCHED_MAX_S
        name, _ = active
        now = self._clock.monotonic()
        if self._active_since is None or self._active_since[0] != name:
            self._active_since = (name, now)
        waiting = self._writer.pending_files - 1 - len(self._writer.retired)
        left = self._active_since[1] + stretched_flush_interval(self._flush_interval, waiting) - now
        if left > 0:
            # While the interval is stretched, check again after the plain one: fewer files may wait by then. And while there is
            # something to seal, poll for requests.
            return min(left, self._flush_interval, REQUEST_POLL_S)
        self._writer.rotate("flush_interval")
        return self._flush_interval

    def _seal_retired(self) -> None:
        retired = self._writer.retired_segments()
        if not retired:
            due = self._directory.retry_name_sync()
            if due or self._unrecorded:  # recovery by another thread may have synced the names
                self._record_sealed()
            if due:
                self._on_sealed()
            return

        self._sync_segments(retired)
        done, moved = 0, False

        def renamed(files: Sequence[LockedFile], names: Sequence[str]) -> None:
            nonlocal done, moved
            now = self._clock.micros()
            for sealed, name in zip(retired[done : done + len(names)], names, strict=True):
                if not name:
                    moved = True
                    continue
                self.sealed[sealed.seal_reason] += 1
                # With leftover bytes that could not be cut off, the file may hold more events than were accepted: whoever reads
                # it counts them.
                events = None if sealed.has_leftover else sealed.events
                writer = layout.writer_of(sealed.locked_file.name)
                self._unrecorded.append(SealedEntry(now, layout.batch_id(name), writer, events, sealed.bytes))
            done += len(names)
            self._directory.filesystem.close_each([file.fd for file in files])

        try:
            self._directory.seal([file.locked_file for file in retired], renamed)
        finally:
            self._writer.remove_oldest_retired(done)
        if moved:
            self._leave_moved_segments()
        self._record_sealed()
        self._pace = self._pace_s
        self._on_sealed()

    def _leave_moved_segments(self) -> None:
        """Replace the spares and the active segment after the directory was moved: create new ones under the old path."""
        self.remove_spares()
        self._writer.rotate("manual")

    def _record_sealed(self) -> None:
        """Write the ledger entries of the sealed segments.

        Their names were synced before, because a batch must not get another id after a power loss.
        """
        for entry in self._unrecorded:
            self._add_ledger_entry(entry)
        self._unrecorded.clear()
        self._write_ledger()

    def _add_ledger_entry(self, entry: SealedEntry | AdoptedEntry) -> None:
        if self._ledger is not None:
            self._ledger.add(entry)

    def _write_ledger(self) -> None:
        if self._ledger is not None:
            self._ledger_behind = not self._ledger.write(sync=False)

    def _sync_segments(self, files: Sequence[Segment]) -> None:
        for at in range(0, len(files), self._sync_at_once):
            messages = self._writer.syncer.sync_for_seal(files[at : at + self._sync_at_once], self._unsynced_lines)
            for message in messages:
                if self._sync_log.is_new_problem(message):
                    log.error("%s", message)
            if not messages:
                self._sync_log.is_over()

    def _log_disk_state(self, problem: str) -> None:
        """Log a disk error when it begins, when it changes, and when it ends."""
        self.problem = problem
        if problem:
            if self._disk_log.is_new_problem(problem):
                log.error("%s: %s", self._directory.path, problem)
        elif self._disk_log.is_over():
            log.error("%s: %s", self._directory.path, self._disk_log.describe_end())

    def report_drops(self, *, is_last: bool = False) -> None:
        """Report what was dropped since the last report: in the ledger, in the log, and to `on_drops`.

        Safe to call from any thread. Whoever drops an event calls it while the sealer's thread does not run.
        """
        self.record_drops(is_last=is_last)
        if self._on_drops is not None:
            self._on_drops(self._drop_totals())

    def record_drops(self, *, is_last: bool = False) -> None:
        """Report what was dropped since the last report in the ledger and in the log. Safe to call from any thread."""
        if self._drop_recorder.report(is_last=is_last):
            self._write_ledger()

    def _drop_totals(self) -> dict[str, int]:
        with self._writer.lock:  # while another thread holds it, a drop may be counted and uncounted
            return dict(self._writer.dropped)


REQUEST_POLL_S: Final = 0.25  # how long a request may remain unnoticed while a writer has something to seal
_REQUEST_BYTES_MAX: Final = 4096  # bytes of the file that are read at most


class SealRequest(msgspec.Struct, frozen=True):
    """The content of `seal.request`: an id, and when it was written.

    A command writes it to make the writers of a directory seal their active segments. Each sealer compares it with the content
    that it read last. A torn, lost or forged file does no harm: a segment is sealed early, or the command repeats the request.
    """

    id: str
    at_micros: int


class SealRequestReader:
    """Reads `seal.request` for one sealer."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._next_poll = 0.0
        self._latest: bytes | None = None
        self._handled: bytes | None = None

    def has_new(self) -> bool:
        """Whether a request came after the last one that was handled.

        Reads the file only from time to time; the first call marks its content as old.
        """
        now = self._clock.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + REQUEST_POLL_S
            self._read_request()
        return self._latest != self._handled

    def _read_request(self) -> None:
        filesystem = self._directory.filesystem
        try:
            fd = filesystem.open_existing(self._directory.path_of(layout.SEAL_REQUEST))
        except FileNotFoundError:
            self._latest = b""
        except (OSError, FileUnusableError):
            return  # the command that writes the file reports the error
        else:
            try:
                self._latest = filesystem.read_at(fd, 0, _REQUEST_BYTES_MAX)
            except OSError:
                return
            finally:
                filesystem.close(fd)
        if self._handled is None:
            self._handled = self._latest

    def mark_handled(self) -> None:
        """Note that the latest request is being handled."""
        self._handled = self._latest


def request_seal(directory: Directory, clock: Clock) -> None:
    """Request all writers of the directory to seal their active segments.

    Raises `FileUnusableError`, or the `OSError` of the disk.
    """
    filesystem = directory.filesystem
    request = SealRequest(directory.new_id(), clock.micros())
    fd = filesystem.open_lock_file(directory.path_of(layout.SEAL_REQUEST))
    try:
        filesystem.overwrite(fd, msgspec.json.encode(request) + b"\n")
    finally:
        filesystem.close(fd)
