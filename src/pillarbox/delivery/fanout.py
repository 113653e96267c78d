"""Delivery to several sinks: batches are hard-linked into a queue for each sink, and each queue has a worker of its own.

`FanOut` moves batches from the outbox directory into the queues. The order is: a link in each queue; the queues synced; the
ledgers; then the name in the outbox directory is deleted, and only that makes the links count (`Directory.batch_names`). If the
process is killed before that, everything is done again and finds the same names; afterwards nothing is left to do. So no sink
misses a batch, and none that has settled a batch gets it again.

A queue that is being made is called `sink-<name>.adding` until it is complete. The first queues of a directory start with all
pending batches. A later queue starts with the batches that are sealed from then on, unless the backlog was requested for it
(`queue_changes.request_queue`).

`FanOutRunner` runs `FanOut` in a thread, and a worker for each sink. Each sink has a lease of its own, in its queue, so another
process may deliver it. The process that holds the lease of the outbox directory fans out; as long as it does, no other process
delivers the directory's batches to a single sink.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.clock import yield_gil
from pillarbox.delivery.lease import HEARTBEAT_INTERVAL_S, Lease
from pillarbox.delivery.runner import ThreadRunner, combine_stats
from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.stats import DeliveryCounters, State
from pillarbox.store import layout
from pillarbox.store.filesystem import concerns_one_file
from pillarbox.store.ledger import LOCKED_PROBLEM, LedgerWrite, LedgerWriter
from pillarbox.store.ledger_entries import FAN_OUT_WRITER, AdoptedEntry, FannedOutEntry, SealedEntry
from pillarbox.store.queue_changes import create_requested_queue, finish_removals, remove_request_links, request_queue
from pillarbox.store.recovery import recover
from pillarbox.store.state_log import StateLog
from pillarbox.store.windows import count_records
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pillarbox.clock import Clock
    from pillarbox.delivery.worker import Worker
    from pillarbox.stats import SinkStats
    from pillarbox.store.directory import Directory, LockedFile
    from pillarbox.store.ledger_entries import LedgerEntry
    from pillarbox.store.retention import Retention

log = logging.getLogger("pillarbox")

GROUP_MAX_FILES: Final = 64  # files fanned out together: each holds a descriptor, and they share their syncs
_LOCK_WAIT_S: Final = 1.0  # how long to wait for a file that another process has locked, before later files go ahead
_TAKEOVER_POLL_S: Final = 0.5  # between two attempts to acquire the lease
_SETTLEMENT_POLL_S: Final = 0.01  # between two checks whether a file was settled
_LOCKED_RETRY_S: Final = 0.05  # before a locked file is tried again


class _LinkedFile(NamedTuple):
    """A batch file that has a link in each queue, and the counts of its content."""

    locked_file: LockedFile
    records: int
    damaged_ranges: int
    plain_bytes: int


class FanOut:
    """Fans out one directory, in the process that holds its `deliver.lock`. Used by one thread.

    While `is_busy()`, it yields the GIL often.
    """

    def __init__(
        self,
        directory: Directory,
        sinks: Sequence[str],
        clock: Clock,
        ledger: LedgerWriter,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.directory = directory
        self.clock = clock
        self.ledger = ledger
        self._sinks = sinks
        self._ledgers: dict[str, LedgerWriter] = {}
        self._is_busy = is_busy
        self._is_prepared = False
        self._locked_since: dict[str, float] = {}  # files that another process has locked, and since when
        self.problems: dict[str, str] = {}  # files that cannot be fanned out, and why

    @property
    def waits_for_lock(self) -> bool:
        """Whether to wait for a file that another process has locked."""
        return any(name not in self.problems for name in self._locked_since)

    def ledger_for(self, queue: Directory) -> LedgerWriter:
        """The ledger of a queue; the same one for the queue's worker."""
        return self._ledgers.setdefault(queue.sink, LedgerWriter(queue, self.clock))

    def finish_ledgers(self) -> int:
        """Write the waiting ledger entries of the queues at the end. Returns the number of entries that cannot be written."""
        return sum(ledger.finish() for ledger in self._ledgers.values())

    def distribute_all(self) -> int:
        """Fan out all pending batches and return how many files that were. Raises `OSError`."""
        return sum(self.distribute())

    def distribute(self) -> Iterator[int]:
        """Make the missing queues and fan out the pending batches, group by group. Raises `OSError`.

        Yields the number of files of each group. The caller may stop after any group.

        Every existing queue gets the batches, even if this process does not know its sink: a sink that was left out by mistake
        must not miss any.
        """
        if not self._is_prepared:  # a process that made or removed queues may have died before that was durable, or complete
            self.directory.filesystem.sync_directory(self.directory.path)
            finish_removals(self.directory)
            remove_request_links(self.directory)
            self._is_prepared = True
        queues = self.directory.queues()
        existing = {queue.sink for queue in queues}
        missing = [sink for sink in self._sinks if sink not in existing]
        if missing:
            self._finish_adding(missing, first=not queues)
            queues = self.directory.queues()
        if queues:
            yield from self._distribute_to(queues)
        for sink in missing:
            self.directory.queue(sink).ensure_usable()  # batches that were sealed earlier are not for this sink

    def _finish_adding(self, missing: Sequence[str], *, first: bool) -> None:
        """Make the queues that begin with what waits: the first ones of a directory, and those for which that was requested."""
        if first:
            for sink in missing:  # all of them before the first is made: one cut short here must not become a later queue
                request_queue(self.directory, sink)
        requested = self.directory.requested_queues()
        for sink in missing:
            if sink in requested:
                added = create_requested_queue(self.directory, sink)
                if not first:  # the files of the first queues are fanned out next, and get their entries then
                    self._add_adopted_entries(sink, added)

    def _add_adopted_entries(self, sink: str, names: Sequence[str]) -> None:
        now = self.clock.micros()
        ledger = self.ledger_for(self.directory.queue(sink))
        ledger.add(*(AdoptedEntry(now, layout.batch_id(name), FAN_OUT_WRITER) for name in names))
        ledger.write(sync=True)  # the queue's worker shares this writer, and writes the entries before it deletes a file

    def _distribute_to(self, queues: Sequence[Directory]) -> Iterator[int]:
        names = self.directory.batch_names()
        if self._locked_since:
            self._locked_since = {name: since for name, since in self._locked_since.items() if name in names}
        if self.problems:
            self.problems = {name: problem for name, problem in self.problems.items() if name in names}
        remaining = iter(names)
        while group := list(islice(remaining, GROUP_MAX_FILES)):
            count, may_follow = self._distribute_group(group, queues)
            yield count
            if not may_follow:
                break

    def _distribute_group(self, names: Sequence[str], queues: Sequence[Directory]) -> tuple[int, bool]:
        """Fan out a group; return the number of files, and whether later groups may follow."""
        linked: list[_LinkedFile] = []
        may_follow = True
        # First: a power loss must not undo the sealing of a file that is fanned out. It would be recovered as another batch.
        self.directory.filesystem.sync_directory(self.directory.path)
        try:
            for name in names:
                may_follow = self._link_file(name, queues, linked)
                if not may_follow:
                    break
            if not linked:
                return 0, may_follow
            for queue in queues:
                queue.filesystem.sync_directory(queue.path)
            self._write_ledgers(linked, queues)
            for file in linked:
                self.directory.remove(file.locked_file.name)
            self.directory.filesystem.sync_directory(self.directory.path)
        finally:
            for file in linked:
                self.directory.filesystem.close(file.locked_file.fd)
        return len(linked), may_follow

    def _link_file(self, name: str, queues: Sequence[Directory], linked: list[_LinkedFile]) -> bool:
        """Lock, read and link one file; False if another process has locked it and later files must wait for it."""
        try:
            locked_file = self.directory.lock_existing(name)
        except FileUnusableError as error:
            self.problems[name] = error.problem
            return True
        except OSError as error:
            if not concerns_one_file(error):
                raise
            self.problems[name] = str(error)
            return True
        if locked_file is None:
            now = self.clock.monotonic()
            since = self._locked_since.setdefault(name, now)
            if now - since >= _LOCK_WAIT_S:
                self.problems[name] = "locked by another process"
                return True
            return False
        self._locked_since.pop(name, None)
        try:
            filesystem = self.directory.filesystem
            size = filesystem.size(locked_file.fd)
            records, ranges = count_records(filesystem, name, locked_file.fd, self._yield_gil_if_busy)
            for queue in queues:
                self.directory.link_into(queue, locked_file)
        except (OSError, FileUnusableError, MemoryError) as error:
            self.directory.filesystem.close(locked_file.fd)
            self.problems[name] = str(error) or "there is not enough memory"
            return True
        except BaseException:
            self.directory.filesystem.close(locked_file.fd)
            raise
        self.problems.pop(name, None)
        linked.append(_LinkedFile(locked_file, records, ranges, size))
        return True

    def _yield_gil_if_busy(self) -> None:
        if self._is_busy():
            yield_gil()

    def _write_ledgers(self, linked: Sequence[_LinkedFile], queues: Sequence[Directory]) -> None:
        """Write the files into each queue's ledger, then into the directory's. On a full disk, continue without the entries.

        While another process holds a ledger's lock, the files wait: raises `BlockingIOError`, and everything is done again.
        """
        now = self.clock.micros()
        for queue in queues:
            _write_or_withdraw(self.ledger_for(queue), [_sealed_entry(file, now) for file in linked], queue.path)
        sinks = [queue.sink for queue in queues]
        entries = [
            FannedOutEntry(now, layout.batch_id(file.locked_file.name), sinks, file.records, file.damaged_ranges)
            for file in linked
        ]
        _write_or_withdraw(self.ledger, entries, self.directory.path)


def _write_or_withdraw(ledger: LedgerWriter, entries: Sequence[LedgerEntry], path: str) -> None:
    ledger.add(*entries)
    if ledger.write(sync=True) is LedgerWrite.LOCKED:
        ledger.withdraw(entries)
        raise BlockingIOError(f"{path}: {LOCKED_PROBLEM}")


def _sealed_entry(file: _LinkedFile, now_micros: int) -> SealedEntry:
    """A file's first entry in a queue's ledger. Nobody knows how many events a damaged byte range held."""
    events = None if file.damaged_ranges else file.records
    return SealedEntry(now_micros, layout.batch_id(file.locked_file.name), FAN_OUT_WRITER, events, file.plain_bytes)


class FanOutRunner:
    """The `Runner` of several sinks.

    Args:
        fan_out: What fills the queues.
        build_worker: Builds the worker of a queue; called once for each sink, when its queue exists.
        display_names: Of the sinks, by name: URLs without secrets.
        poll_interval_s: Seconds between two scans of an idle directory.
        durability: Of the outbox in this process, for the heartbeat; empty if it only delivers.
        retention: Of the directory itself, for batches retained while there was a single sink.
    """

    def __init__(
        self,
        fan_out: FanOut,
        build_worker: Callable[[Directory], Worker],
        display_names: Mapping[str, str],
        poll_interval_s: float,
        durability: str = "",
        retention: Retention | None = None,
    ) -> None:
        self._fan_out = fan_out
        self._directory = fan_out.directory
        self._clock = fan_out.clock
        self._build_worker = build_worker
        self._display_names = display_names
        self._poll_interval_s = poll_interval_s
        self._retention = retention
        self._lease = Lease(fan_out.directory, ", ".join(display_names), fan_out.clock, durability)
        self._runners: dict[str, ThreadRunner] = {}
        self._work = threads.Event()
        self._stopping = threads.Event()
        self._fan_out_until = 0.0  # monotonic seconds, once `stop` is called
        self._problem = ""
        self._defect_log = StateLog(fan_out.clock)
        self._state_log = StateLog(fan_out.clock)
        self._all_fanned_out = False
        self.unwritten_ledger_entries = 0  # of the queues; known after `stop`
        self._thread = threads.Thread(target=self._run, name="pillarbox-fan-out")

    def start(self) -> None:
        """Start to fan out and to deliver."""
        self._thread.start()

    def notify(self) -> None:
        """Say that there may be something to do; from any thread."""
        self._work.set()

    def stop(self, timeout: float) -> bool:
        """Fan out and deliver what needs no waiting, then end; after `timeout` seconds the rest stays on disk."""
        deadline = self._clock.monotonic() + timeout
        self._fan_out_until = deadline - timeout / 2  # the other half is for delivery
        self._stopping.set()
        self._work.set()
        with contextlib.suppress(RuntimeError):  # the thread was not started
            self._thread.join(timeout)
        runners = list(self._runners.values())
        for runner in runners:
            runner.worker.end()
        ended = [runner.stop(max(0.0, deadline - self._clock.monotonic())) for runner in runners]
        if self._thread.is_alive():
            return False
        self._write_heartbeat(now=True)  # the final state
        self._lease.release()
        self.unwritten_ledger_entries = self._fan_out.finish_ledgers()
        return all(ended)

    def sinks(self) -> dict[str, SinkStats]:
        """The stats of each sink. A problem with fanning out is reported for every sink."""
        stats: dict[str, SinkStats] = {}
        for sink in self._display_names:
            runner = self._runners.get(sink)
            if runner is not None:
                (stats[sink],) = runner.sinks().values()
            else:
                stats[sink] = DeliveryCounters().to_stats(State("standby", "its queue does not exist yet"), "")
            problem = self._problem
            if problem and (runner is None or stats[sink].state.name in ("idle", "draining")):
                stats[sink] = stats[sink].as_degraded(problem)
        return stats

    def is_idle(self) -> bool:
        """Whether the last scans have found nothing to fan out, and nothing to deliver to any sink."""
        runners = [self._runners.get(sink) for sink in self._display_names]
        if not self._all_fanned_out or not all(runner is not None and runner.is_idle() for runner in runners):
            return False
        try:
            return not any(self._directory.queue(sink).waiting_batch_ids() for sink in self._display_names)
        except OSError:
            return False

    def is_stopped(self) -> bool:
        """Whether somebody must fix the configuration first: each sink is stopped, or has nothing to deliver."""
        runners = [self._runners.get(sink) for sink in self._display_names]
        stopped = [runner is not None and runner.is_stopped() for runner in runners]
        return (
            self._all_fanned_out
            and any(stopped)
            and all(each or (runner is not None and runner.is_idle()) for each, runner in zip(stopped, runners, strict=True))
        )

    def wait_for_settlement(self, known_files: int, timeout: float) -> None:
        """Wait until the number of settled files is not `known_files`, for at most `timeout` seconds."""
        deadline = self._clock.monotonic() + timeout
        while (left := deadline - self._clock.monotonic()) > 0 and not self._stopping.wait(min(left, _SETTLEMENT_POLL_S)):
            if sum(sink.flushed_files for sink in self.sinks().values()) != known_files:
                return

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._work.clear()
            wait_s = self._run_once()
            self._work.wait(wait_s)
        self._run_once()

    def _run_once(self) -> float:
        """Recover and fan out, if this process holds the lease; seconds until the next time."""
        problem = ""
        wait_s = min(self._poll_interval_s, HEARTBEAT_INTERVAL_S)
        try:
            if self._lease.is_valid() or self._lease.acquire():
                self._recover_segments()
                for _ in self._fan_out.distribute():
                    if not self._deliver_group():
                        break
                self._all_fanned_out = all(name in self._fan_out.problems for name in self._directory.batch_names())
                if self._retention is not None:
                    self._retention.prune()
                problem = self._find_problem()
                wait_s = _LOCKED_RETRY_S if self._fan_out.waits_for_lock else wait_s
            else:
                wait_s = min(wait_s, _TAKEOVER_POLL_S)
            self._start_runners()
        except (OSError, FileUnusableError, DirectoryUnusableError) as error:
            problem = f"not fanned out: {error}"
        except Exception as error:  # a defect must not end this thread, which would end delivery
            if self._defect_log.is_new_problem(f"{type(error).__name__}: {error}"):
                log.exception("%s: a defect in Pillarbox while fanning out", self._directory.path)
            problem = f"not fanned out: a defect in Pillarbox: {error}"
        self._log_problem(problem)
        self._write_heartbeat()
        return wait_s

    def _deliver_group(self) -> bool:
        """Notify the workers of a group that was fanned out; return whether to fan out another."""
        self._start_runners()
        for runner in self._runners.values():
            runner.notify()
        self._write_heartbeat()
        return not self._stopping.is_set() or self._clock.monotonic() < self._fan_out_until

    def _write_heartbeat(self, *, now: bool = False) -> None:
        stats = combine_stats(self.sinks())
        self._lease.write_heartbeat(stats.state, stats.delivered, stats.last_error, now=now)

    def _recover_segments(self) -> None:
        now = self._clock.micros()
        adopted = recover(self._directory)
        if adopted:
            self._fan_out.ledger.add(
                *(AdoptedEntry(now, layout.batch_id(file.sealed_name), layout.writer_of(file.active_name)) for file in adopted)
            )
            self._fan_out.ledger.write(sync=False)

    def _start_runners(self) -> None:
        """Start a thread for each sink whose queue exists, whichever process made it."""
        for queue in self._directory.queues() if len(self._runners) < len(self._display_names) else ():
            if queue.sink in self._display_names and queue.sink not in self._runners:
                runner = ThreadRunner(self._build_worker(queue))
                try:
                    runner.start()
                except RuntimeError as error:  # no thread could be started; the next round tries again
                    raise OSError(errno.EAGAIN, f"{queue.sink}: {error}") from None
                self._runners[queue.sink] = runner

    def _find_problem(self) -> str:
        """The first problem with a file, or with a queue that no worker delivers."""
        for name, problem in self._fan_out.problems.items():
            return f"not fanned out: {name}: {problem}"
        for queue in self._directory.queues():
            if queue.sink not in self._display_names and queue.batch_names():
                remedy = f"add it, or remove its queue with pillarbox sinks remove {queue.sink}"
                return f"{queue.path} is filling up: {queue.sink} is not in the setting sinks; {remedy}"
        return ""

    def _log_problem(self, problem: str) -> None:
        self._problem = problem
        if problem:
            if self._state_log.is_new_problem(problem):
                log.error("%s: %s", self._directory.path, problem)
        elif self._state_log.is_over():
            log.error("%s: %s", self._directory.path, self._state_log.describe_end())
