"""`Outbox`: what an application holds. Thin: it owns entrance, writer, sealer and deliverer, and begins and ends them."""

from __future__ import annotations

import atexit
import logging
import threading
from functools import partial
from os import register_at_fork
from typing import TYPE_CHECKING, Any, Final, Literal
from weakref import WeakSet

from pillarbox.backpressure import FULL, Blocking, Raising
from pillarbox.clock import Clock, SystemClock
from pillarbox.codec import Entrance
from pillarbox.delivery.deliverer import ONLY, together
from pillarbox.delivery.runner import check_delivery, deliverer_for, destinations
from pillarbox.delivery.settlement import Callbacks
from pillarbox.errors import ConfigurationError
from pillarbox.event import EVENT_BYTES_MAX, TrackingEvent
from pillarbox.hooks import Hooks
from pillarbox.outcome import DROPPED, DURABILITIES, Dropped, DropReason, Durability, Outcome
from pillarbox.settings import EITHER, Settings, resolve
from pillarbox.sinks.base import Sink
from pillarbox.store.door import Door, Enqueue
from pillarbox.store.filesystem import real_filesystem
from pillarbox.store.group_commit import Committer
from pillarbox.store.ledger import Ledger
from pillarbox.store.queues import directory_at
from pillarbox.store.quota import FILE_SHARE
from pillarbox.store.sealer import Sealer
from pillarbox.store.speed import Waiter
from pillarbox.store.writer import Limits, Writer
from pillarbox.telemetry import Stats, instruments, of_sink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType
    from typing import Self

    import msgspec

    from pillarbox.delivery.deliverer import Deliverer
    from pillarbox.delivery.settlement import DeadLetter
    from pillarbox.store.usage import Account

log = logging.getLogger("pillarbox")

MANY_BYTES_MAX: Final = 16 * 2**20  # one call of `enqueue_many`: it becomes one write, and is read as one batch
EXIT_TIMEOUT_S: Final = 2.0  # how long the end of the program may wait for a last delivery
_BUSY_S: Final = 10.0  # how long after an event the deliverer goes on giving the interpreter away every few records
_POLL_S: Final = 0.05  # between two looks of `flush` where another process delivers
_GROUPS_S: Final = 0.25  # the same where this one does: files are settled in groups, the next one within so long
_LISTING_SHARE: Final = 10  # `flush` lists the directory for a tenth of its time at most


class Outbox:
    """A durable outbox in a directory.

    The directory is checked and made now (`DirectoryUnusable` if it cannot be); threads start, and what an earlier writer left
    is adopted, at first use: `enqueue`, `flush`, or entering it as a context manager. `sink` is a URL, a `Sink`, or None: only
    store, and another process delivers. Instead of it, `sinks` names several. Raises `ConfigurationError` for a setting that is
    not allowed.
    """

    # `enqueue(event, *, durability=None)` -> `Enqueued` once the operating system has the event, `Dropped(reason)` where it is
    # refused. It is no method, for one call less is a twentieth of its time: `Writer.build_enqueue` has it.
    enqueue: Enqueue

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
        outage_after: int = 3,
        max_rate: float | None = None,
        live_share: float = 0.0,
        max_age: float | None = None,
        compress_after: float | None = None,
        max_dead_bytes: int = 64 * 2**20,
        max_quarantine_bytes: int = 64 * 2**20,
        when_kept_full: Literal["park", "discard"] = "park",
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
            raise ConfigurationError("sink", sink, "the call", "a URL, a Sink, or None")
        keywords["sink"] = sink if isinstance(sink, str) else None
        given = {ONLY: sink} if isinstance(sink, Sink) else {}
        if given and sinks is not None:
            raise ConfigurationError("sinks", "...", "the call", EITHER)
        self._set_up(resolve(keywords), given)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """An outbox with settings that `resolve` has checked, from the environment or a TOML file for example."""
        outbox = cls.__new__(cls)
        outbox._set_up(settings, {})
        return outbox

    def _set_up(self, settings: Settings, given: dict[str, Sink]) -> None:
        if settings.enabled and not settings.directory:
            raise ConfigurationError("directory", "", "the default", "the path of a directory")
        self._given = given | {name: sink for name, sink in settings.sinks.items() if not isinstance(sink, str)}
        check_delivery(settings, self._given)
        self.settings = settings
        self.name = settings.directory
        self._delivers = settings.deliver != "external"
        self._entrance = Entrance(settings)
        self._event_type = settings.event_type
        self._clock: Clock = SystemClock()
        self._starting = threading.RLock()
        self._closed = False
        self._filesystem = real_filesystem()
        self._directory = directory_at(settings.directory, self._filesystem, self._clock)
        self._power = settings.durability == "power"
        self._power_checked = not settings.enabled
        if settings.enabled:
            self._directory.open()
        self._arm()
        if self._power and settings.enabled:
            self._check_power()
        _outboxes.add(self)

    def _arm(self) -> None:
        """Make what belongs to one process: again in a forked child, where nothing of the parent's may be used."""
        settings = self.settings
        self._started = False
        self._start_under_way = False
        self._busy_count = 0
        self._busy_at = -_BUSY_S
        self._delivery: Deliverer | None = None
        self._hooks = Hooks(self.name, settings.before_send, settings.on_drop, settings.on_dead_letter)
        self._ledger = Ledger(self._directory, self._clock)
        evicts = settings.when_full == "drop_oldest"
        self._sealer = Sealer(
            self._directory,
            self._clock,
            settings.flush_interval,
            self._notify_deliverer,
            settings.min_free_bytes,
            evicts=evicts,
            on_drops=self._report_drops if self._hooks.hears_of_drops else None,
            ledger=self._ledger,
        )
        batch_bytes = settings.batch_bytes
        if evicts:
            batch_bytes = max(1, min(batch_bytes, settings.max_bytes // FILE_SHARE))
        limits = Limits(settings.batch_size, batch_bytes, settings.max_bytes, settings.max_files)
        self._writer = Writer(self._directory, limits, self._sealer.wake)
        self._committer = Committer(self._directory, self._writer)
        self._sealer.attach(self._writer, self._committer, enters=self._power)
        self._entrance.attach(self._writer, self._hooks)
        door = Door(
            self._entrance.encode,
            self._event_type,
            EVENT_BYTES_MAX,
            self._is_power,
            self._entrance.refuse,
            self._entrance.invalid,
            partial(self._append, power=False),
            partial(self._append, events=1, power=True),
            self._power,
        )
        self._enqueue_once = self.enqueue = self._writer.build_enqueue(door)
        self._begin_power = self._committer.build_begin(door, self._begin_slowly)
        self._begin_default = self._begin_power if self._power else self._enqueue_once
        self._when_full: Raising | Blocking | None = None
        if settings.when_full == "raise":
            self._when_full = Raising(self.name)
        elif settings.when_full == "block":
            self._when_full = Blocking(self._writer, self._clock, settings.block_timeout, self._hooks.is_within)
        self._is_bare = not (self._hooks.filters or self._hooks.hears_of_drops or self._when_full)
        # Each layer is there only where it is asked for: a call more is a tenth of the time of `enqueue`.
        if self._when_full is not None:
            self.enqueue = self._build_enqueue(self._enqueue_once, self._when_full)
        if self._hooks.filters:
            self.enqueue = self._entrance.filtering(self.enqueue)
        if self._hooks.hears_of_drops:
            self.enqueue = self._reporting(self.enqueue)
        self._sinks = destinations(settings, self._given) if settings.enabled and self._delivers else {}

    def enqueue_many(self, events: Iterable[msgspec.Struct], *, durability: Durability | None = None) -> list[Outcome]:
        """Store events in one write, all or none of the valid ones; one outcome for each, in order.

        They stay together in one file. At most 16 MiB in one call; more is `Dropped("invalid")`.
        """
        return self._store_together(lambda: self._entrance.records(events), durability)

    def enqueue_json(self, payloads: Iterable[bytes], *, durability: Durability | None = None) -> list[Outcome]:
        """Store events that are JSON already, in one write, all or none of the valid ones; one outcome for each, in order.

        Each must decode as the event type, and have what would otherwise be made up anew each time it is read (`event_id`).
        It is stored byte for byte, unknown members included, but for white space around it and line feeds. They do not
        come past `before_send`. Limits as for `enqueue_many`.
        """
        return self._store_together(lambda: self._entrance.records_of_json(payloads), durability)

    def _store_together(
        self, pack: Callable[[], tuple[bytes, list[Dropped | None]]], durability: Durability | None
    ) -> list[Outcome]:
        power = self._power if durability is None else self._is_power(durability)
        try:
            lines, refused = pack()
            count = refused.count(None)
            together = self._append_many(lines, count, power=power) if count else DROPPED["invalid"]
        finally:
            self._report_unheard_drops()
        return [together if dropped is None else dropped for dropped in refused]

    def _reporting(self, enqueue: Enqueue) -> Enqueue:
        def enqueue_reporting(event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
            """Store one event, and see to it that `on_drop` hears where it is refused."""
            try:
                return enqueue(event, durability=durability)
            finally:
                self._report_unheard_drops()

        return enqueue_reporting

    def _report_unheard_drops(self) -> None:
        """Report what no thread of ours will: before the start, and after the end. Never in the middle of an append."""
        if self._hooks.hears_of_drops and (self._closed or not self._started) and not self._writer.is_entered():
            with self._writer.lock:
                totals = dict(self._writer.dropped)
            self._report_drops(totals)

    def _report_drops(self, totals: dict[str, int]) -> None:
        if self.settings.when_full == "block" and not self._closed:
            # These are taken back and tried again; only of who was cancelled meanwhile they stay.
            totals = {reason: total for reason, total in totals.items() if reason not in FULL}
        self._hooks.drops(totals)

    def _build_enqueue(self, once: Enqueue, when_full: Raising | Blocking) -> Enqueue:
        def enqueue(event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
            """`Writer.build_enqueue`'s, and what `when_full` makes of a refusal."""
            outcome = once(event, durability=durability)
            return outcome or when_full.retry(lambda: once(event, durability=durability), outcome, 1)

        return enqueue

    def _append_many(self, lines: bytes, events: int, *, power: bool) -> Outcome:
        if len(lines) > MANY_BYTES_MAX:
            self._entrance.explain(f"{len(lines)} bytes in one call, more than {MANY_BYTES_MAX}")
            return self._writer.refuse("invalid", events)

        append = partial(self._append, lines, events, power=power)
        outcome = append()
        return outcome if outcome or self._when_full is None else self._when_full.retry(append, outcome, events)

    async def enqueue_async(self, event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
        """`enqueue`, from a coroutine. "process" is too quick to be worth a thread; under "power" many share one sync.

        Cancelling does not withdraw the event.
        """
        if self._is_bare:
            answer = self._begin_default(event) if durability is None else self._begin(event, durability)
            return await answer if type(answer) is Waiter else answer  # type: ignore[return-value]  # mypy: `type() is`
        return await self._enqueue_async_with_hooks(event, durability)

    async def _enqueue_async_with_hooks(self, event: msgspec.Struct, durability: Durability | None) -> Outcome:
        try:
            admitted = self._entrance.admit(event) if self._hooks.filters else event
            if isinstance(admitted, Dropped):
                return admitted

            async def once() -> Outcome:
                answer = self._begin(admitted, durability)
                return await answer if isinstance(answer, Waiter) else answer

            outcome = await once()
            return outcome if outcome or self._when_full is None else await self._when_full.retry_async(once, outcome, 1)
        finally:
            self._report_unheard_drops()

    def _begin(self, event: msgspec.Struct, durability: Durability | None) -> Waiter | Outcome:
        """What a coroutine gets, or is to await."""
        if durability is None:
            return self._begin_default(event)
        return self._begin_power(event) if self._is_power(durability) else self._enqueue_once(event, durability="process")

    def _begin_slowly(self, line: bytes) -> Waiter | Outcome:
        """Commit for a coroutine; the first starts the outbox, or finds that it may not."""
        answer = self._committer.commit_async(line, 1)
        if answer is None:
            reason = self._why_not_started()
            answer = self._committer.commit_async(line, 1) if reason is None else self._writer.refuse(reason)
        return answer if answer is not None else self._writer.refuse("closed")

    def _is_power(self, durability: str) -> bool:
        if durability not in DURABILITIES:
            resolve({"durability": durability})  # raises, and says what is allowed
        if durability == "power" and not self._power_checked:
            self._check_power()
        return durability == "power"

    def _check_power(self) -> None:
        """Once, before the first promise; raises `DirectoryUnusable`."""
        self._directory.check_power()
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

    def _append(self, lines: bytes, events: int, *, power: bool) -> Outcome:
        """Append; the first starts the outbox, or finds that it may not. With `power` that waits for the sync too."""
        append = self._committer.commit if power else self._writer.append
        outcome = append(lines, events)
        if outcome is None:
            reason = self._why_not_started()
            outcome = append(lines, events) if reason is None else self._writer.refuse(reason, events)
        return outcome if outcome is not None else self._writer.refuse("closed", events)

    def _why_not_started(self) -> DropReason | None:
        """Start; None where that has succeeded, otherwise what an event is refused for."""
        if not self.settings.enabled:
            return "disabled"
        if self._closed:
            return "closed"
        if self._start():
            return None
        # A signal handler in the middle of the start, or the disk.
        return "would_block" if self._start_under_way else "io_error"

    def _start(self) -> bool:
        """Count what is pending and start the threads; False where the directory cannot be listed."""
        with self._starting:
            if self._started or not self.settings.enabled or self._closed or self._start_under_way:
                return self._started
            self._start_under_way = True
            try:
                account = self._directory.account()
                trouble = ""
                if not self._closed:
                    self._start_with(account)
            except OSError as error:
                trouble = f"the directory cannot be listed: {error}"
            finally:
                self._start_under_way = False
        # Logged without the lock: a log handler may itself enqueue.
        if trouble:
            self._entrance.explain(trouble)
        elif account.pending_files:
            log.info("%s: %d files, %d bytes wait", self.name, account.pending_files, account.pending_bytes)
        return self._started

    def _start_with(self, account: Account) -> None:
        self._directory.note_stamp(account.newest_stamp)
        self._writer.start(account.pending_bytes, account.pending_files)
        self._sealer.capacity.look_at_space()
        self._sealer.start()
        telemetry = instruments()
        telemetry.add(self)
        callbacks = Callbacks(
            self._writer.release,
            lambda seconds, sink: telemetry.flush_duration.record(seconds, {"outbox": self.name, **of_sink(sink)}),
            self._hooks.dead_letter,
            self._hooks.dead_letter_failures,
            partial(self._writer.release, files=0),
        )
        self._delivery = deliverer_for(
            self.settings, self._directory, self._clock, self._ledger, callbacks, self._busy, self._sinks
        )
        if self._delivery is not None:
            self._delivery.start()
        self._started = True

    def _busy(self) -> bool:
        """Whether this process has stored events of late; asked by the deliverer only."""
        now, count = self._clock.monotonic(), self._writer.accepted
        if count != self._busy_count:
            self._busy_count, self._busy_at = count, now
        return now - self._busy_at < _BUSY_S

    def _notify_deliverer(self) -> None:
        if self._delivery is not None:
            self._delivery.notify()

    def flush(self, timeout: float = 5.0) -> bool:
        """Seal now, and wait until everything accepted so far is settled; False when that took too long."""
        if not self._start():
            return not self.settings.enabled
        clock = self._clock
        deadline = clock.monotonic() + timeout
        if not self._sealer.seal_now("manual", timeout):
            return False
        try:
            first, waiting = self._settled_files(), self._directory.waiting()
            while waiting:
                before, settled = clock.monotonic(), self._settled_files()
                waiting &= self._directory.waiting()
                now = clock.monotonic()
                if not waiting:
                    break
                if now >= deadline:
                    return False
                threading.Event().wait(min(deadline - now, _LISTING_SHARE * (now - before)))
                patience = _POLL_S if settled == first else _GROUPS_S
                self._wait_for_settlement(deadline - clock.monotonic(), patience, settled, len(waiting))
        except OSError:
            return False
        return True

    def _settled_files(self) -> int:
        return sum(sink.flushed_files for sink in self._delivery.sinks().values()) if self._delivery is not None else 0

    def _wait_for_settlement(self, left: float, patience: float, settled: int, files: int) -> None:
        """Wait until so many files are settled beside the first `settled`, or for `patience` seconds none is.

        To list the directory any earlier would take time from the deliverer for nothing.
        """
        deadline = self._clock.monotonic() + left
        if self._delivery is None:
            threading.Event().wait(max(0.0, min(left, patience)))
            return
        seen = settled
        while left > 0 and seen - settled < files:
            self._delivery.wait_for_settlement(seen, min(left, patience))
            before, seen = seen, self._settled_files()
            if seen == before:
                return
            left = deadline - self._clock.monotonic()

    def stats(self) -> Stats:
        """A snapshot; cheap. Before first use it lists the directory."""
        # First the sinks: the files whose events are counted as delivered do not wait then.
        sinks = self._delivery.sinks() if self._delivery is not None else {}
        total = together(sinks)
        accepted, sealed = 0, dict(self._sealer.sealed)
        if self._started:
            # Whatever a listing has missed already and is then told to be gone is counted twice, until the next listing.
            pending_bytes, pending_files, accepted = (max(0, number) for number in self._writer.pending())
        elif self.settings.enabled:
            account = self._directory.account()
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
            evicted=self._sealer.capacity.evicted,
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
            sinks={name: sink for name, sink in sinks.items() if name != ONLY},
        )

    def close(self, timeout: float = 5.0) -> None:
        """Accept nothing more, seal, deliver what can be delivered without waiting; what is left stays on disk.

        Takes little more than `timeout` seconds in the worst case. Done twice, it is as done once.
        """
        with self._starting:
            if self._closed:
                return
            self._closed = True
        if not self._started:
            return
        deadline = self._clock.monotonic() + timeout
        if not self._sealer.stop(timeout):
            log.warning("%s: the disk is slow; the active file is adopted at the next start", self.name)
        if self._delivery is not None:
            self._delivery.notify()
            self._delivery.stop(max(0.0, deadline - self._clock.monotonic()))
        self._ledger.write(sync=False)  # what found its lock held before

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        sinks = {name: text for name, (_, text) in self._sinks.items()}
        named = f"sinks={sinks!r}" if sinks and ONLY not in sinks else f"sink={sinks.get(ONLY)!r}"
        return f"Outbox({self.name!r}, {named}, event_type={self._event_type.__name__})"

    def _after_fork(self) -> None:
        """In the child: let go of the parent's files, locks and threads without touching what they stand for."""
        _abandoned.append((self._delivery, self._sinks))  # an SQLite connection must not even be closed here
        if self._given:
            # Its connections are the parent's. With a URL the child would have made a sink of its own.
            self._given, self._delivers = {}, False
            self._entrance.explain(
                "a Sink object does not outlive a fork: this process only stores; give URLs to deliver from here too"
            )
        self._starting = threading.RLock()
        self._writer.abandon()
        self._directory.renew()
        self._filesystem.close_inherited()
        if not self._closed:
            self._arm()


_outboxes: WeakSet[Outbox] = WeakSet()
_abandoned: list[Any] = []


def _after_fork() -> None:
    for outbox in list(_outboxes):
        outbox._after_fork()


def _at_exit() -> None:
    for outbox in list(_outboxes):
        outbox.close(EXIT_TIMEOUT_S)


register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
