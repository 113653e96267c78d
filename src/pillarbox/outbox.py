"""`Outbox`: what an application holds. Thin: it owns entrance, writer, sealer and deliverer, and begins and ends them."""

from __future__ import annotations

import atexit
import logging
import threading
from functools import partial
from os import register_at_fork
from typing import TYPE_CHECKING, Any, Final, Literal
from weakref import WeakSet

from pillarbox._native import CommitFuture
from pillarbox.backpressure import FULL_REASONS, BlockWhenFull, RaiseWhenFull
from pillarbox.clock import Clock, SystemClock
from pillarbox.codec import EventEncoder
from pillarbox.delivery.deliverer import ONLY_SINK, combine_stats
from pillarbox.delivery.runner import build_runner, build_sinks, check_delivery_settings
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.errors import ConfigurationError
from pillarbox.event import EVENT_BYTES_MAX, TrackingEvent
from pillarbox.hooks import Hooks
from pillarbox.outcome import DROPPED, DURABILITIES, Dropped, DropReason, Durability, Outcome
from pillarbox.settings import Settings, resolve, sink_and_sinks_error
from pillarbox.sinks.base import Sink
from pillarbox.stats import Stats
from pillarbox.store.append_hooks import AppendHooks, EnqueueFunction
from pillarbox.store.group_commit import GroupCommitter
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at
from pillarbox.store.quota import FILE_SHARE
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.telemetry import instruments, sink_attributes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType
    from typing import Self

    import msgspec

    from pillarbox.delivery.deliverer import Runner
    from pillarbox.delivery.settlement import DeadLetter
    from pillarbox.store.usage import DiskUsage

log = logging.getLogger("pillarbox")

CALL_BYTES_MAX: Final = 16 * 2**20  # one call of `enqueue_many`: it becomes one write, and is read as one batch
EXIT_TIMEOUT_S: Final = 2.0  # how long the end of the program may wait for a last delivery
_BUSY_PERIOD_S: Final = 10.0  # how long after an event the deliverer goes on giving the interpreter away every few records
_POLL_S: Final = 0.05  # between two looks of `flush` where another process delivers
_GROUP_WAIT_S: Final = 0.25  # the same where this one does: files are settled in groups, the next one within so long
_LISTING_TIME_SHARE: Final = 10  # `flush` lists the directory for a tenth of its time at most


class Outbox:
    """A durable outbox in a directory.

    The directory is checked and made now (or `DirectoryUnusableError`); threads start, and what an earlier writer left
    is adopted, at first use: `enqueue`, `flush`, or entering it as a context manager. `sink` is a URL, a `Sink`, or None: only
    store, and another process delivers. Instead of it, `sinks` names several. Raises `ConfigurationError` for a setting that is
    not allowed.
    """

    # `enqueue(event, *, durability=None)` -> `Enqueued` once the operating system has the event, `Dropped(reason)` where it is
    # refused. It is no method, for one call less is a twentieth of its time: `Writer.build_enqueue` has it.
    enqueue: EnqueueFunction

    def __init__(
        self,
        directory: str,
        sink: str | Sink | None = None,
        event_type: type[msgspec.Struct] = TrackingEvent,
        *,
        sinks: Mapping[str, str | Sink] | None = None,
        deliver: Literal["thread", "process", "external"] = "thread",
        trusted: bool = False,
        enabled: bool = True,
        batch_size: int = 500,
        batch_bytes: int = 1_000_000,
        flush_interval: float = 1.0,
        max_bytes: int = 512 * 2**20,
        max_files: int = 200_000,
        when_full: Literal["drop_newest", "drop_oldest", "block", "raise"] = "drop_newest",
        block_timeout: float = 5.0,
        min_free_bytes: int | None = None,
        durability: Durability = "process",
        on_invalid: Literal["drop", "raise"] = "drop",
        max_in_flight: int = 1,
        backoff_max: float = 30.0,
        call_timeout: float = 60.0,
        stop_after_rejected_batches: int = 3,
        max_rate: float | None = None,
        live_share: float = 0.0,
        max_age: float | None = None,
        compress_after: float | None = None,
        max_dead_bytes: int = 64 * 2**20,
        max_quarantine_bytes: int = 64 * 2**20,
        on_quarantine_full: Literal["hold", "discard"] = "hold",
        keep_delivered: float | str | None = None,
        max_delivered_bytes: int = 2**30,
        before_send: Callable[[Any], msgspec.Struct | None] | None = None,
        on_drop: Callable[[DropReason, int], object] | None = None,
        on_dead_letter: Callable[[DeadLetter], object] | None = None,
        **others: object,
    ) -> None:
        keywords: dict[str, object] = locals() | others  # before anything else has a name here
        del keywords["self"], keywords["others"]
        if sink is not None and not isinstance(sink, (str, Sink)):
            raise ConfigurationError("sink", None, "the call", f"sink: use a URL, a Sink or None, not {type(sink).__name__}")
        keywords["sink"] = sink if isinstance(sink, str) else None
        given = {ONLY_SINK: sink} if isinstance(sink, Sink) else {}
        if given and sinks is not None:
            raise sink_and_sinks_error("the call")
        self._initialize(resolve(keywords), given)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """An outbox with settings that `resolve` has checked, from the environment or a TOML file for example."""
        outbox = cls.__new__(cls)
        outbox._initialize(settings, {})
        return outbox

    def _initialize(self, settings: Settings, given: dict[str, Sink]) -> None:
        if settings.enabled and not settings.directory:
            raise ConfigurationError("directory", None, "the call", "no directory; pass the path of one")
        self._sink_objects = given | {name: sink for name, sink in settings.sinks.items() if not isinstance(sink, str)}
        check_delivery_settings(settings, self._sink_objects)
        self.settings = settings
        self.name = settings.directory
        self._delivers = settings.deliver != "external"
        self._encoder = EventEncoder(settings)
        self._event_type = settings.event_type
        self._clock: Clock = SystemClock()
        self._start_lock = threading.RLock()
        self._closed = False
        self._filesystem = local_filesystem()
        self._directory = directory_at(settings.directory, self._filesystem, self._clock)
        self._is_power_default = settings.durability == "power"
        self._power_checked = not settings.enabled
        if settings.enabled:
            self._directory.ensure_usable()
        self._create_process_state()
        if self._is_power_default and settings.enabled:
            self._check_power()
        _outboxes.add(self)

    def _create_process_state(self) -> None:
        """Make what belongs to one process: again in a forked child, where nothing of the parent's may be used."""
        settings = self.settings
        self._started = False
        self._is_starting = False
        self._busy_accepted = 0
        self._busy_since = -_BUSY_PERIOD_S
        self._runner: Runner | None = None
        self._hooks = Hooks(self.name, settings.before_send, settings.on_drop, settings.on_dead_letter)
        self._ledger = LedgerWriter(self._directory, self._clock)
        evicts = settings.when_full == "drop_oldest"
        batch_bytes = settings.batch_bytes
        if evicts:
            batch_bytes = max(1, min(batch_bytes, settings.max_bytes // FILE_SHARE))
        limits = WriterLimits(settings.batch_size, batch_bytes, settings.max_bytes, settings.max_files)
        inbox = SealerInbox()
        self._writer = Writer(self._directory, limits, inbox.wake)
        self._committer = GroupCommitter(self._directory, self._writer)
        self._sealer = Sealer(
            self._directory,
            self._writer,
            inbox,
            self._clock,
            settings.flush_interval,
            self._notify_runner,
            settings.min_free_bytes,
            committer=self._committer,
            syncs_spare_names=self._is_power_default,
            evicts=evicts,
            on_drops=self._report_drops if self._hooks.has_on_drop else None,
            ledger=self._ledger,
        )
        self._encoder.attach(self._writer, self._hooks)
        door = AppendHooks(
            self._encoder.encode,
            self._event_type,
            EVENT_BYTES_MAX,
            self._resolve_power,
            self._encoder.raise_invalid,
            self._encoder.drop_invalid,
            partial(self._append_or_start, power=False),
            partial(self._append_or_start, events=1, power=True),
            self._is_power_default,
        )
        self._append_event = self.enqueue = self._writer.build_enqueue(door)
        self._start_power_append = self._committer.build_start_commit(door, self._start_power_append_slowly)
        self._start_default_append = self._start_power_append if self._is_power_default else self._append_event
        self._when_full: RaiseWhenFull | BlockWhenFull | None = None
        if settings.when_full == "raise":
            self._when_full = RaiseWhenFull(self.name)
        elif settings.when_full == "block":
            self._when_full = BlockWhenFull(self._writer, self._clock, settings.block_timeout, self._hooks.is_in_hook)
        self._has_no_layers = not (self._hooks.has_before_send or self._hooks.has_on_drop or self._when_full)
        # Each layer is there only where it is asked for: a call more is a tenth of the time of `enqueue`.
        if self._when_full is not None:
            self.enqueue = self._build_enqueue(self._append_event, self._when_full)
        if self._hooks.has_before_send:
            self.enqueue = self._encoder.filter_enqueue(self.enqueue)
        if self._hooks.has_on_drop:
            self.enqueue = self._reporting(self.enqueue)
        self._sinks = build_sinks(settings, self._sink_objects) if settings.enabled and self._delivers else {}

    def enqueue_many(self, events: Iterable[msgspec.Struct], *, durability: Durability | None = None) -> list[Outcome]:
        """Store events in one write, all or none of the valid ones; one outcome for each, in order.

        They stay together in one file. At most 16 MiB in one call; more is `Dropped("invalid")`.
        """
        return self._append_encoded(lambda: self._encoder.encode_records(events), durability)

    def enqueue_json(self, payloads: Iterable[bytes], *, durability: Durability | None = None) -> list[Outcome]:
        """Store events that are JSON already, in one write, all or none of the valid ones; one outcome for each, in order.

        Each must decode as the event type, and have what would otherwise be made up anew each time it is read (`event_id`).
        It is stored byte for byte, unknown members included, but for white space around it and line feeds. They do not
        come past `before_send`. Limits as for `enqueue_many`.
        """
        return self._append_encoded(lambda: self._encoder.encode_json_records(payloads), durability)

    def _append_encoded(
        self, pack: Callable[[], tuple[bytes, list[Dropped | None]]], durability: Durability | None
    ) -> list[Outcome]:
        power = self._is_power_default if durability is None else self._resolve_power(durability)
        try:
            lines, refused = pack()
            count = refused.count(None)
            together = self._append_records(lines, count, power=power) if count else DROPPED["invalid"]
        finally:
            self._report_drops_without_sealer()
        return [together if dropped is None else dropped for dropped in refused]

    def _reporting(self, enqueue: EnqueueFunction) -> EnqueueFunction:
        def enqueue_reporting(event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
            """Store one event, and see to it that `on_drop` hears where it is refused."""
            try:
                return enqueue(event, durability=durability)
            finally:
                self._report_drops_without_sealer()

        return enqueue_reporting

    def _report_drops_without_sealer(self) -> None:
        """Report what no thread of ours will: before the start, and after the end. Never in the middle of an append."""
        if self._hooks.has_on_drop and (self._closed or not self._started) and not self._writer.is_locked_by_this_thread():
            with self._writer.lock:
                totals = dict(self._writer.dropped)
            self._report_drops(totals)

    def _report_drops(self, totals: dict[str, int]) -> None:
        if self.settings.when_full == "block" and not self._closed:
            # These are taken back and tried again; only of who was cancelled meanwhile they stay.
            totals = {reason: total for reason, total in totals.items() if reason not in FULL_REASONS}
        self._hooks.report_drops(totals)

    def _build_enqueue(self, once: EnqueueFunction, when_full: RaiseWhenFull | BlockWhenFull) -> EnqueueFunction:
        def enqueue(event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
            """`Writer.build_enqueue`'s, and what `when_full` makes of a refusal."""
            outcome = once(event, durability=durability)
            return outcome or when_full.on_full(lambda: once(event, durability=durability), outcome, 1)

        return enqueue

    def _append_records(self, lines: bytes, events: int, *, power: bool) -> Outcome:
        if len(lines) > CALL_BYTES_MAX:
            self._encoder.log_invalid(f"{len(lines)} bytes in one call, more than {CALL_BYTES_MAX}")
            return self._writer.drop("invalid", events)

        append = partial(self._append_or_start, lines, events, power=power)
        outcome = append()
        return outcome if outcome or self._when_full is None else self._when_full.on_full(append, outcome, events)

    async def enqueue_async(self, event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
        """`enqueue`, from a coroutine. "process" is too quick to be worth a thread; under "power" many share one sync.

        Cancelling does not withdraw the event.
        """
        if self._has_no_layers:
            answer = self._start_default_append(event) if durability is None else self._start_append(event, durability)
            return await answer if type(answer) is CommitFuture else answer  # type: ignore[return-value]  # mypy: `type() is`
        return await self._enqueue_async_with_hooks(event, durability)

    async def _enqueue_async_with_hooks(self, event: msgspec.Struct, durability: Durability | None) -> Outcome:
        try:
            admitted = self._encoder.apply_before_send(event) if self._hooks.has_before_send else event
            if isinstance(admitted, Dropped):
                return admitted

            async def once() -> Outcome:
                answer = self._start_append(admitted, durability)
                return await answer if isinstance(answer, CommitFuture) else answer

            outcome = await once()
            return outcome if outcome or self._when_full is None else await self._when_full.on_full_async(once, outcome, 1)
        finally:
            self._report_drops_without_sealer()

    def _start_append(self, event: msgspec.Struct, durability: Durability | None) -> CommitFuture | Outcome:
        """What a coroutine gets, or is to await."""
        if durability is None:
            return self._start_default_append(event)
        return (
            self._start_power_append(event)
            if self._resolve_power(durability)
            else self._append_event(event, durability="process")
        )

    def _start_power_append_slowly(self, line: bytes) -> CommitFuture | Outcome:
        """Commit for a coroutine; the first starts the outbox, or finds that it may not."""
        answer = self._committer.start_commit(line, 1)
        if answer is None:
            reason = self._start_or_reason()
            answer = self._committer.start_commit(line, 1) if reason is None else self._writer.drop(reason)
        return answer if answer is not None else self._writer.drop("closed")

    def _resolve_power(self, durability: str) -> bool:
        if durability not in DURABILITIES:
            resolve({"durability": durability})  # raises, and says what is allowed
        if durability == "power" and not self._power_checked:
            self._check_power()
        return durability == "power"

    def _check_power(self) -> None:
        """Once, before the first promise; raises `DirectoryUnusableError`."""
        self._directory.check_power_durability()
        self._power_checked = True
        way_out = "set keep_delivered, and `pillarbox resend` can send again what that loses"
        if self.settings.keep_delivered is not None:
            way_out = "`pillarbox resend` sends again what that loses, from what keep_delivered keeps"
        for sink, text in self._sinks.values():
            if sink.capabilities.survives != "power":
                log.warning(
                    '%s: with durability "power" an event survives here what it does not survive at %s once delivered; %s',
                    self.name,
                    text,
                    way_out,
                )

    def _append_or_start(self, lines: bytes, events: int, *, power: bool) -> Outcome:
        """Append; the first starts the outbox, or finds that it may not. With `power` that waits for the sync too."""
        append = self._committer.commit if power else self._writer.append
        outcome = append(lines, events)
        if outcome is None:
            reason = self._start_or_reason()
            outcome = append(lines, events) if reason is None else self._writer.drop(reason, events)
        return outcome if outcome is not None else self._writer.drop("closed", events)

    def _start_or_reason(self) -> DropReason | None:
        """Start; None where that has succeeded, otherwise what an event is refused for."""
        if not self.settings.enabled:
            return "disabled"
        if self._closed:
            return "closed"
        if self._start():
            return None
        # A signal handler in the middle of the start, or the disk.
        return "would_block" if self._is_starting else "io_error"

    def _start(self) -> bool:
        """Count what is pending and start the threads; False where the directory cannot be listed."""
        with self._start_lock:
            if self._started or not self.settings.enabled or self._closed or self._is_starting:
                return self._started
            self._is_starting = True
            try:
                account = self._directory.disk_usage()
                trouble = ""
                if not self._closed:
                    self._start_with(account)
            except OSError as error:
                trouble = f"the directory cannot be listed: {error}"
            finally:
                self._is_starting = False
        # Logged without the lock: a log handler may itself enqueue.
        if trouble:
            self._encoder.log_invalid(trouble)
        elif account.pending_files:
            log.info("%s: %d files, %d bytes wait", self.name, account.pending_files, account.pending_bytes)
        return self._started

    def _start_with(self, account: DiskUsage) -> None:
        self._directory.seal_after(account.newest_sealed_at)
        self._writer.start(account.pending_bytes, account.pending_files)
        self._sealer.quota.check_free_space()
        self._sealer.start()
        telemetry = instruments()
        telemetry.observe_outbox(self)
        callbacks = DeliveryCallbacks(
            self._writer.release_bytes,
            lambda seconds, sink: telemetry.flush_duration.record(seconds, {"outbox": self.name, **sink_attributes(sink)}),
            self._hooks.report_dead_letter,
            self._hooks.add_dead_letter_failures,
            partial(self._writer.release_bytes, files=0),
        )
        self._runner = build_runner(
            self.settings, self._directory, self._clock, self._ledger, callbacks, self._is_busy, self._sinks
        )
        if self._runner is not None:
            self._runner.start()
        self._started = True

    def _is_busy(self) -> bool:
        """Whether this process has stored events of late; asked by the deliverer only."""
        now, count = self._clock.monotonic(), self._writer.accepted_events
        if count != self._busy_accepted:
            self._busy_accepted, self._busy_since = count, now
        return now - self._busy_since < _BUSY_PERIOD_S

    def _notify_runner(self) -> None:
        if self._runner is not None:
            self._runner.notify()

    def flush(self, timeout: float = 5.0) -> bool:
        """Seal now, and wait until everything accepted so far is settled; False when that took too long."""
        if not self._start():
            return not self.settings.enabled
        clock = self._clock
        deadline = clock.monotonic() + timeout
        if not self._sealer.seal_now("manual", timeout):
            return False
        try:
            first, waiting = self._delivered_files(), self._directory.waiting_batch_ids()
            while waiting:
                before, settled = clock.monotonic(), self._delivered_files()
                waiting &= self._directory.waiting_batch_ids()
                now = clock.monotonic()
                if not waiting:
                    break
                if now >= deadline:
                    return False
                threading.Event().wait(min(deadline - now, _LISTING_TIME_SHARE * (now - before)))
                patience = _POLL_S if settled == first else _GROUP_WAIT_S
                self._wait_for_deliveries(deadline - clock.monotonic(), patience, settled, len(waiting))
        except OSError:
            return False
        return True

    def _delivered_files(self) -> int:
        return sum(sink.flushed_files for sink in self._runner.sinks().values()) if self._runner is not None else 0

    def _wait_for_deliveries(self, left: float, patience: float, settled: int, files: int) -> None:
        """Wait until so many files are settled beside the first `settled`, or for `patience` seconds none is.

        To list the directory any earlier would take time from the deliverer for nothing.
        """
        deadline = self._clock.monotonic() + left
        if self._runner is None:
            threading.Event().wait(max(0.0, min(left, patience)))
            return
        seen = settled
        while left > 0 and seen - settled < files:
            self._runner.wait_for_settlement(seen, min(left, patience))
            before, seen = seen, self._delivered_files()
            if seen == before:
                return
            left = deadline - self._clock.monotonic()

    def stats(self) -> Stats:
        """A snapshot; cheap. Before first use it lists the directory."""
        # First the sinks: the files whose events are counted as delivered do not wait then.
        sinks = self._runner.sinks() if self._runner is not None else {}
        total = combine_stats(sinks)
        accepted, sealed = 0, dict(self._sealer.sealed)
        if self._started:
            # Whatever a listing has missed already and is then told to be gone is counted twice, until the next listing.
            pending_bytes, pending_files, accepted = (max(0, number) for number in self._writer.pending_counts())
        elif self.settings.enabled:
            account = self._directory.disk_usage()
            pending_bytes, pending_files = account.pending_bytes, account.pending_files
        else:
            pending_bytes = pending_files = 0
        return Stats(
            state=total.state,
            durability=self.settings.durability,
            pending_bytes=pending_bytes,
            pending_files=pending_files,
            accepted=accepted,
            dropped=dict(self._writer.dropped),
            sealed=sealed,
            evicted=self._sealer.quota.evicted_events,
            delivered=total.delivered,
            duplicates=total.duplicates,
            dead=total.dead,
            quarantined=total.quarantined,
            discarded=total.discarded,
            flushed_files=total.flushed_files,
            flushed_bytes=total.flushed_bytes,
            failed_flushes=total.failed_flushes,
            rate=total.rate,
            last_error=total.last_error,
            hook_failures=dict(self._hooks.failures),
            sinks={name: sink for name, sink in sinks.items() if name != ONLY_SINK},
        )

    def close(self, timeout: float = 5.0) -> None:
        """Accept nothing more, seal, deliver what can be delivered without waiting; what is left stays on disk.

        Takes little more than `timeout` seconds in the worst case. Done twice, it is as done once.
        """
        with self._start_lock:
            if self._closed:
                return
            self._closed = True
        if not self._started:
            return
        deadline = self._clock.monotonic() + timeout
        if not self._sealer.stop(timeout):
            log.warning("%s: the disk is slow; the active file is adopted at the next start", self.name)
        if self._runner is not None:
            self._runner.notify()
            self._runner.stop(max(0.0, deadline - self._clock.monotonic()))
        self._ledger.write(sync=False)  # what found its lock held before

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        sinks = {name: text for name, (_, text) in self._sinks.items()}
        named = f"sinks={sinks!r}" if sinks and ONLY_SINK not in sinks else f"sink={sinks.get(ONLY_SINK)!r}"
        return f"Outbox({self.name!r}, {named}, event_type={self._event_type.__name__})"

    def _after_fork(self) -> None:
        """In the child: let go of the parent's files, locks and threads without touching what they stand for."""
        _kept_from_parent.append((self._runner, self._sinks))  # an SQLite connection must not even be closed here
        if self._sink_objects:
            # Its connections are the parent's. With a URL the child would have made a sink of its own.
            self._sink_objects, self._delivers = {}, False
            self._encoder.log_invalid(
                "a Sink object does not outlive a fork: this process only stores; give URLs to deliver from here too"
            )
        self._start_lock = threading.RLock()
        self._writer.abandon_after_fork()
        self._directory.reset_after_fork()
        self._filesystem.close_inherited()
        if not self._closed:
            self._create_process_state()


_outboxes: WeakSet[Outbox] = WeakSet()
_kept_from_parent: list[Any] = []


def _after_fork() -> None:
    for outbox in list(_outboxes):
        outbox._after_fork()


def _at_exit() -> None:
    for outbox in list(_outboxes):
        outbox.close(EXIT_TIMEOUT_S)


register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
