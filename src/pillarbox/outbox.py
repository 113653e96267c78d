"""`Outbox`, the class that an application uses.

It creates the parts (encoder, writer, group committer, sealer, delivery runner), starts and stops them, and creates new ones in
a forked child. The parts are in `codec.py`, `store/` and `delivery/`.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from pillarbox import lifecycle
from pillarbox._native import CommitFuture
from pillarbox.awaiting import run_on_thread
from pillarbox.background import Activity, BackgroundWork, DropReporter, RunnerLink
from pillarbox.backpressure import FULL_REASONS, BlockWhenFull, RaiseWhenFull, check_event_loop, with_when_full
from pillarbox.clock import Clock, SystemClock
from pillarbox.codec import Codec, EventEncoder
from pillarbox.delivery.build import build_runner, build_sinks, check_delivery_settings, warn_of_volatile_sinks
from pillarbox.delivery.runner import ONLY_SINK
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.errors import ConfigurationError, DirectoryUnusableError
from pillarbox.event import EVENT_BYTES_MAX, TrackingEvent
from pillarbox.flush import wait_until_delivered
from pillarbox.forks import check_fork, was_forked_in_c
from pillarbox.hooks import Hooks, with_drop_reports
from pillarbox.lifecycle import OutboxMeta
from pillarbox.log_records import prepare_log_relay
from pillarbox.outcome import DROPPED, DURABILITIES, Dropped, DropReason, Durability, Outcome
from pillarbox.settings import Settings, resolve, sink_and_sinks_error
from pillarbox.sinks.base import Sink
from pillarbox.snapshot import take_snapshot
from pillarbox.store.append_hooks import AppendHooks, EnqueueFunction
from pillarbox.store.group_commit import GroupCommitter
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.open_files import close_unknown_files
from pillarbox.store.os_filesystem import absolute_path, local_filesystem, working_directory
from pillarbox.store.queues import directory_at
from pillarbox.store.quota import FILE_SHARE
from pillarbox.store.room import reclaim_space
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.system import threads
from pillarbox.system.originals import blocked_threads_problem
from pillarbox.telemetry import instruments, sink_attributes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from os import PathLike
    from types import TracebackType
    from typing import Self

    import msgspec

    from pillarbox.delivery.dead_letter import DeadLetter
    from pillarbox.delivery.runner import Runner
    from pillarbox.stats import Stats
    from pillarbox.store.usage import DiskUsage

log = logging.getLogger("pillarbox")

CALL_BYTES_MAX: Final = 16 * 2**20  # bytes of one call of `enqueue_many`: they are written at once, and read back in one batch
_START_POLL_S: Final = 0.001  # between two checks whether another greenlet has started the outbox


class Outbox(metaclass=OutboxMeta):
    """A durable outbox in a directory: it stores events on the local disk and delivers them in the background.

    The directory is created and checked at once. At first use (`enqueue`, `flush` or `with`) the outbox takes over what earlier
    writers left and starts its threads. It may be shared between threads and used after a fork. Use it as a context manager
    (`with` or `async with`), or call `close`; at the exit of the program open outboxes are closed.

    Args:
        directory: Path of the outbox directory. Several processes may use one directory.
        sink: Where to deliver: a URL, or a `Sink` object. None: only store; another process delivers.
        event_type: Type of the events: `TrackingEvent` or any `msgspec.Struct` with a field `event_id`.
        sinks: Several sinks by name, in place of `sink`. Each gets every event.
        **settings: All other settings, described in `docs/reference/settings.md`.

    Raises:
        ConfigurationError: A setting is unknown or has a value that is not allowed.
        DirectoryUnusableError: The directory cannot be created, read or written, or cannot keep `durability="power"`.
        SinkUnusableError: The package that the sink needs is not installed.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
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
        retry_after_max: float = 3600.0,
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
        # `resolve` takes settings by name, and those are the parameters. First statement: nothing else is local yet.
        keywords: dict[str, object] = locals() | others
        del keywords["self"], keywords["others"]
        if sink is not None and not isinstance(sink, (str, Sink)):
            raise ConfigurationError("sink", None, "the call", f"sink: use a URL, a Sink or None, not {type(sink).__name__}")
        keywords["sink"] = sink if isinstance(sink, str) else None
        sink_objects = {ONLY_SINK: sink} if isinstance(sink, Sink) else {}
        if sink_objects and sinks is not None:
            raise sink_and_sinks_error("the call")
        self._initialize(resolve(keywords), sink_objects)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Make an outbox from settings that `resolve` returned. Raises the errors of the constructor."""
        outbox = cls.__new__(cls)
        outbox._initialize(settings, {})
        return outbox

    def _initialize(self, settings: Settings, sink_objects: dict[str, Sink]) -> None:
        if settings.enabled and not settings.directory:
            raise ConfigurationError("directory", None, "the call", "no directory; pass the path of one")
        self._sink_objects = sink_objects | {name: sink for name, sink in settings.sinks.items() if not isinstance(sink, str)}
        check_delivery_settings(settings, self._sink_objects)
        self.settings = settings
        self.name = settings.directory
        self._delivers = settings.deliver != "external"
        self._codec = Codec(settings.event_type, trusted=settings.trusted)
        self._event_type = settings.event_type
        self._clock: Clock = SystemClock()
        self._start_lock = threads.RLock()
        self._closed = False
        self._filesystem = local_filesystem()
        self._working_directory = working_directory()  # what relative paths refer to, even if it changes later
        self._directory = directory_at(absolute_path(settings.directory), self._filesystem, self._clock)
        self._is_power_default = settings.durability == "power"
        self._power_checked = not settings.enabled
        if settings.enabled:
            self._directory.ensure_usable()
        self._create_process_state()
        if self._is_power_default and settings.enabled:
            self._check_power()
        lifecycle.add_outbox(self)

    def _create_process_state(self) -> None:
        """Create the parts that belong to one process. A forked child calls this too, because it must not use its parent's."""
        settings = self.settings
        self._started = False
        self._is_starting, self._starter = False, 0
        self._start_problem = ""  # the logged reason why the outbox could not start
        self._link = RunnerLink()
        self._hooks = Hooks(self.name, settings.before_send, settings.on_drop, settings.on_dead_letter)
        self._ledger = LedgerWriter(self._directory, self._clock)
        evicts = settings.when_full == "drop_oldest"
        batch_bytes = min(settings.batch_bytes, max(1, settings.max_bytes // FILE_SHARE)) if evicts else settings.batch_bytes
        limits = WriterLimits(settings.batch_size, batch_bytes, settings.max_bytes, settings.max_files)
        inbox = SealerInbox()
        self._writer = Writer(self._directory, limits, inbox.wake)
        self._committer = GroupCommitter(self._directory, self._writer)
        self._activity = Activity(self._writer, self._clock)
        self._drop_reporter = DropReporter(self._hooks, blocks_when_full=settings.when_full == "block")
        self._sealer = Sealer(
            self._directory,
            self._writer,
            inbox,
            self._clock,
            settings.flush_interval,
            self._link.notify,
            settings.min_free_bytes,
            committer=self._committer,
            syncs_spare_names=self._is_power_default,
            evicts=evicts,
            on_drops=self._drop_reporter.report if self._hooks.has_on_drop else None,
            ledger=self._ledger,
            uncounted_drops=FULL_REASONS if settings.when_full == "block" else (),
        )
        self._background = BackgroundWork(
            self.name, self._clock, self._sealer, self._link, self._committer, self._ledger, self._drop_reporter
        )
        self._directory.reclaim_space = partial(reclaim_space, self._directory, self._sealer.remove_spares)
        self._encoder = EventEncoder(settings, self._codec, self._writer, self._hooks, self._start)
        self._enqueue = self._compose_enqueue()
        self._shadow_enqueue()
        delivers = settings.enabled and self._delivers
        self._sinks = build_sinks(settings, self._sink_objects, self._working_directory) if delivers else {}

    def _compose_enqueue(self) -> EnqueueFunction:
        """Build `enqueue` from the layers that this outbox needs, innermost first.

        A layer that is not needed is left out: one more Python call is a tenth of the time of `enqueue`.
        """
        settings, hooks = self.settings, self._hooks
        # Encode and check the event. One function for each outcome, so that the writer's closure calls nothing else.
        append_hooks = AppendHooks(
            encode=self._encoder.encode,
            event_type=self._event_type,
            event_bytes_max=EVENT_BYTES_MAX,
            is_power=self._resolve_power,
            raise_invalid=self._encoder.raise_invalid,
            drop_invalid=self._encoder.drop_invalid,
            append_unstarted=partial(self._append_or_start, power=False),
            commit=partial(self._append_or_start, events=1, power=True),
            power_by_default=self._is_power_default,
        )
        # Store: append the record ("process"), or wait for the group's fsync ("power"). Compiled if the extension is there.
        enqueue = self._append_event = self._writer.build_enqueue(append_hooks)
        # The same for coroutines, which await the fsync: `enqueue_async`.
        self._start_power_append = self._committer.build_start_commit(append_hooks, self._start_power_append_slowly)
        self._start_default_append = self._start_power_append if self._is_power_default else self._append_event
        # when_full: "block" and "raise" act on a drop. "drop_newest" needs no layer, and "drop_oldest" is the sealer's.
        self._when_full: RaiseWhenFull | BlockWhenFull | None = None
        if settings.when_full == "raise":
            self._when_full = RaiseWhenFull(self.name)
        elif settings.when_full == "block":
            self._when_full = BlockWhenFull(self._writer, self._clock, settings.block_timeout, hooks.is_in_hook)
        if self._when_full is not None:
            enqueue = with_when_full(enqueue, self._when_full)
        # before_send: change or filter the event, once, before all attempts to store it.
        if hooks.has_before_send:
            enqueue = self._encoder.with_before_send(enqueue)
        # on_drop: report a drop, outermost because each of the other layers can drop the event.
        if hooks.has_on_drop:
            enqueue = with_drop_reports(enqueue, self._report_drops_without_sealer)
        self._has_no_layers = enqueue is self._append_event
        return enqueue

    def _shadow_enqueue(self) -> None:
        """Let this instance's `enqueue` skip the method, which costs a call, unless a subclass or a patch replaced it."""
        if type(self).enqueue is _enqueue_method:
            self.enqueue = self._enqueue  # type: ignore[method-assign]
        else:
            vars(self).pop("enqueue", None)

    def enqueue(self, event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
        """Store one event.

        Takes a few microseconds with durability "process"; with "power" it waits for an fsync. Safe to call from any thread
        and from a signal handler. With `when_full="block"` it may wait up to `block_timeout` seconds for room.

        Args:
            event: The event, of exactly the type `event_type`.
            durability: "process" or "power". None: the setting.

        Returns:
            `Enqueued(durability)` when the event is stored, or `Dropped(reason)` when it is not. `Dropped` is falsy.

        Raises:
            InvalidEventError: The event is invalid; only with `on_invalid="raise"`.
            OutboxFullError: There is no room; only with `when_full="raise"`.
            ConfigurationError: There is no such durability.
            DirectoryUnusableError: The directory does not support "power"; only at the first event with "power".
        """
        return self._enqueue(event, durability=durability)

    def enqueue_many(self, events: Iterable[msgspec.Struct], *, durability: Durability | None = None) -> list[Outcome]:
        """Store events in one write: all of the valid ones, or none.

        They stay together in one batch. One call may have 16 MiB of records; with more, each event is `Dropped("invalid")`.
        `durability` and the errors raised are those of `enqueue`.

        Returns:
            One outcome for each event, in order.
        """
        return self._append_encoded(lambda: self._encoder.encode_many(events), durability)

    def enqueue_json(self, payloads: Iterable[bytes], *, durability: Durability | None = None) -> list[Outcome]:
        """Store events that are JSON already in one write: all of the valid ones, or none.

        Each payload must decode as the event type, and must have the fields that would otherwise get a new value at each
        decoding, such as `event_id`. It is stored byte for byte, with unknown fields, except for surrounding white space and
        line feeds. `before_send` is not called. Limits, `durability` and the errors raised are those of `enqueue_many`.

        Returns:
            One outcome for each payload, in order.
        """
        return self._append_encoded(lambda: self._encoder.encode_many_json(payloads), durability)

    def _append_encoded(
        self, encode: Callable[[], tuple[bytes, list[Dropped | None]]], durability: Durability | None
    ) -> list[Outcome]:
        check_fork()
        power = self._is_power_default if durability is None else self._resolve_power(durability)
        try:
            lines, drops = encode()
            count = drops.count(None)
            outcome = self._append_records(lines, count, power=power) if count else DROPPED["invalid"]
        finally:
            self._report_drops_without_sealer()
        return [outcome if dropped is None else dropped for dropped in drops]

    def _append_records(self, lines: bytes, events: int, *, power: bool) -> Outcome:
        if len(lines) > CALL_BYTES_MAX:
            self._encoder.log_invalid(f"{len(lines)} bytes in one call; the limit is {CALL_BYTES_MAX}")
            return self._writer.drop("invalid", events)
        append = partial(self._append_or_start, lines, events, power=power)
        outcome = append()
        return outcome if outcome or self._when_full is None else self._when_full.on_full(append, outcome, events)

    def _report_drops_without_sealer(self) -> None:
        """Report drops while the sealer thread is not running; never in the middle of an append."""
        if (self._closed or not self._started) and not self._writer.is_locked_by_this_thread():
            self._sealer.report_drops()

    async def enqueue_async(self, event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
        """Store one event from a coroutine.

        Durability "process" writes inline, because that is faster than a thread. With "power" the event loop runs while
        many coroutines share one fsync. Cancelling does not withdraw the event. Arguments, outcomes and errors are those of
        `enqueue`, and `RuntimeError` where it would have to wait on a loop that is not asyncio's.
        """
        try:
            if self._has_no_layers:
                answer = self._start_default_append(event) if durability is None else self._start_append(event, durability)
                return await answer if type(answer) is CommitFuture else answer  # type: ignore[return-value]  # mypy: `type() is`
            return await self._enqueue_async_with_layers(event, durability)
        except RuntimeError:
            check_event_loop()
            raise

    async def _enqueue_async_with_layers(self, event: msgspec.Struct, durability: Durability | None) -> Outcome:
        """The layers of `_compose_enqueue`, awaited."""
        try:
            admitted = self._encoder.apply_before_send(event) if self._hooks.has_before_send else event
            if isinstance(admitted, Dropped):
                return admitted

            async def append() -> Outcome:
                answer = self._start_append(admitted, durability)
                return await answer if isinstance(answer, CommitFuture) else answer

            outcome = await append()
            return outcome if outcome or self._when_full is None else await self._when_full.on_full_async(append, outcome, 1)
        finally:
            self._report_drops_without_sealer()

    def _start_append(self, event: msgspec.Struct, durability: Durability | None) -> CommitFuture | Outcome:
        """The outcome, or what the coroutine must await for it."""
        if durability is None:
            return self._start_default_append(event)
        if self._resolve_power(durability):
            return self._start_power_append(event)
        return self._append_event(event, durability="process")

    def _start_power_append_slowly(self, line: bytes) -> CommitFuture | Outcome:
        """Start a commit for a coroutine; also start the outbox if this is its first event."""
        answer = self._committer.start_commit(line, 1)
        if answer is None:
            reason = self._start_or_reason()
            answer = self._committer.start_commit(line, 1) if reason is None else self._drop_unstored(reason, 1)
        return answer if answer is not None else self._writer.drop("closed")

    def _append_or_start(self, lines: bytes, events: int, *, power: bool) -> Outcome:
        """Append records, with `power` until they are fsynced; start the outbox if these are its first."""
        append = self._committer.commit if power else self._writer.append
        outcome = append(lines, events)
        if outcome is None:
            reason = self._start_or_reason()
            outcome = append(lines, events) if reason is None else self._drop_unstored(reason, events)
        return outcome if outcome is not None else self._writer.drop("closed", events)

    def _drop_unstored(self, reason: DropReason, events: int) -> Dropped:
        """Drop events of an outbox that is closed or could not start, and whose sealer does not report them."""
        dropped = self._writer.drop(reason, events)
        self._report_drops_without_sealer()
        return dropped

    def _resolve_power(self, durability: str) -> bool:
        if durability not in DURABILITIES:
            resolve({"durability": durability})  # raises ConfigurationError
        if durability == "power" and not self._power_checked:
            self._check_power()
        return durability == "power"

    def _check_power(self) -> None:
        """Check, before the first event with "power", that the directory supports it; raises `DirectoryUnusableError`."""
        self._directory.check_power_durability()
        self._power_checked = True
        warn_of_volatile_sinks(self.settings, self._sinks)

    def _start_or_reason(self) -> DropReason | None:
        """Start the outbox if it is not started; returns None, or why an event must be dropped."""
        if not self.settings.enabled:
            return "disabled"
        if self._closed:
            return "closed"
        if self._start():
            return None
        # Not started: this is a signal handler that interrupted the start, or the directory cannot be listed.
        return "would_block" if self._is_starting else "io_error"

    def _start(self) -> bool:
        """Count the pending batches and start the threads; False if that is impossible, and then nothing runs."""
        check_fork()
        if self._started:
            return True
        while self._is_starting and self._starter != threads.caller_id():  # another greenlet, which the lock does not stop
            threads.pause(_START_POLL_S)
        with self._start_lock:
            if self._started or not self.settings.enabled or self._closed or self._is_starting:
                return self._started
            self._starter, self._is_starting = threads.caller_id(), True
            try:
                attempted, problem = "list the directory", ""
                usage = self._directory.disk_usage_at_start()
                if not self._closed:
                    attempted = "start its parts"
                    problem = self._start_parts(usage)
            except OSError as error:
                problem = f"cannot {attempted}: {error}"
            except DirectoryUnusableError as error:
                problem = str(error)
            finally:
                self._is_starting = False
        # Logged without the lock: a log handler may itself enqueue.
        if not problem and blocked_threads_problem():
            log.error("%s: %s", self.name, blocked_threads_problem())
        if problem and problem != self._start_problem:
            self._start_problem = problem
            log.error("%s: drops events until it can start: %s", self.name, problem)
        elif not problem and usage.pending_files:
            noun = "file" if usage.pending_files == 1 else "files"
            log.info("%s: %d %s with %d bytes pending", self.name, usage.pending_files, noun, usage.pending_bytes)
        return self._started

    def _start_parts(self, usage: DiskUsage) -> str:
        """Start the threads, and then the writer. Returns the problem if that is impossible, otherwise ""."""
        prepare_log_relay()
        self._directory.seal_after(usage.newest_sealed_at)
        self._sealer.quota.check_free_space()
        try:
            self._sealer.start()
        except RuntimeError as error:
            return f"{error}: see the limits of processes and threads (ulimit -u, pids.max)"
        runner = self._build_runner()
        if runner is not None:
            try:
                runner.start()
            except RuntimeError as error:
                self._sealer.cancel_start()
                return f"{error}: see the limits of processes and threads (ulimit -u, pids.max)"
        self._link.runner = runner
        self._writer.start(usage.pending_bytes, usage.pending_files)
        self._sealer.run_rounds()
        instruments().observe_outbox(self)
        self._started, self._start_problem = True, ""
        return ""

    def _build_runner(self) -> Runner | None:
        name, duration = self.name, instruments().flush_duration
        callbacks = DeliveryCallbacks(
            self._writer.release_bytes,
            lambda seconds, sink: duration.record(seconds, {"outbox": name, **sink_attributes(sink)}),
            self._hooks.report_dead_letter,
            self._hooks.add_dead_letter_failures,
            partial(self._writer.release_bytes, files=0),
            self._activity.is_busy,
        )
        return build_runner(
            self.settings, self._directory, self._clock, self._ledger, callbacks, self._sinks, self._working_directory
        )

    def flush(self, timeout: float = 5.0) -> bool:
        """Seal now, and wait until all events accepted so far are delivered or dead-lettered.

        Args:
            timeout: How long to wait, in seconds.

        Returns:
            False if that took longer than `timeout`, or the directory could not be listed.
        """
        if not self._start():
            return not self.settings.enabled
        clock = self._clock
        deadline = clock.monotonic() + timeout
        if not self._sealer.seal_now("manual", timeout):
            return False
        return wait_until_delivered(self._directory, self._link.runner, clock, deadline)

    async def aflush(self, timeout: float = 5.0) -> bool:  # noqa: ASYNC109 - as `flush`
        """`flush` for coroutines: the event loop runs meanwhile."""
        return await run_on_thread(partial(self.flush, timeout))

    def stats(self) -> Stats:
        """A snapshot; cheap. Before first use it lists the directory."""
        check_fork()
        return take_snapshot(
            self.settings,
            self._directory,
            self._writer,
            self._sealer,
            self._ledger,
            self._link.runner.sinks() if self._link.runner is not None else {},
            self._hooks.failures,
            self._start_problem,
            started=self._started,
        )

    def close(self, timeout: float = 5.0) -> None:
        """Stop accepting events, seal, and deliver what can be delivered without waiting; the rest stays on disk.

        A second call does nothing.

        Args:
            timeout: How long to deliver, in seconds. It takes little longer at most.
        """
        if self._begin_close():
            self._finish_close(timeout)

    async def aclose(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - as `close`
        """`close` for coroutines: the event loop runs meanwhile. Cancelling does not stop it."""
        if self._begin_close():
            await run_on_thread(partial(self._finish_close, timeout))

    def _begin_close(self) -> bool:
        """Stop accepting events, and start to seal. Returns False if there is nothing to close."""
        check_fork()
        with self._start_lock:
            if self._closed:
                return False
            self._closed = True
            self._drop_reporter.blocks_when_full = False
        if self._started:
            self._background.request_end()
        else:
            self._background.record_last_drops()
        return self._started

    def _finish_close(self, timeout: float) -> None:
        self._background.end(timeout)

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await run_on_thread(self._start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self.__dict__.get("_started") and not self._closed:
            lifecycle.end_dropped(self._background)

    def __repr__(self) -> str:
        sinks = {name: text for name, (_, text) in self._sinks.items()}
        named = f"sinks={sinks!r}" if sinks and ONLY_SINK not in sinks else f"sink={sinks.get(ONLY_SINK)!r}"
        return f"Outbox({self.name!r}, {named}, event_type={self._event_type.__name__})"

    def _reset_after_fork(self) -> None:
        """In the child: drop the parent's files, locks and threads without closing or releasing them."""
        lifecycle.keep_from_parent(self._link.runner, self._sinks)  # SQLite forbids even to close a parent's connection
        if self._sink_objects:
            # The connections of the object are the parent's. If the sink is a URL, the child makes its own.
            self._sink_objects, self._delivers = {}, False
            log.warning("%s: a sink object cannot be used after fork; this process only stores events", self.name)
        self._start_lock = threads.RLock()
        self._writer.abandon_after_fork()
        self._directory.reset_after_fork()
        self._filesystem.close_inherited()
        if was_forked_in_c():
            close_unknown_files(self._directory.path)
        self._create_process_state()


_enqueue_method: Final = Outbox.enqueue
