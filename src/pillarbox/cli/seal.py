"""`pillarbox seal`: make the running writers of a directory seal their segments, and wait until they have."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pillarbox.admin.status import describe_worker, heartbeat_age_s
from pillarbox.admin.text import counted
from pillarbox.cli.options import DirectoryOptions, JsonOption, QuietOption, expand_options
from pillarbox.cli.output import ExitCode, err, out, print_json
from pillarbox.cli.signals import interrupt_on_sigterm
from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import HEARTBEAT_STALE_AFTER_S, read_heartbeat
from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.store import layout, sealer
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory

_POLL_S: Final = 0.05
_LISTING_SHARE: Final = 10  # listing the directory takes at most a tenth of the time
_REQUEST_AGAIN_S: Final = 2.0  # between two requests: a writer may have missed the first
_ORPHAN_CHECK_S: Final = 1.0  # between two checks whether the writer of an unsealed segment is dead
_SEGMENT_KINDS: Final = frozenset({Kind.ACTIVE, Kind.LEGACY_ACTIVE})

TimeoutOption = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Seconds to wait.", min=0.1)]


class SealResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox seal --json`; names of files."""

    directory: str  # the outbox directory
    sealed: list[str]  # names of the segments that are sealed now
    unsealed: list[str]  # names of the segments that are not
    orphaned: list[str]  # which of the unsealed segments belong to dead writers
    reason: str  # why segments are unsealed; "" if none is
    seconds: float  # how long the command took


class SealContext:
    """The directory that a command waits for, and until when. Reading it creates nothing."""

    def __init__(self, settings: Settings, timeout: float, *, quiet: bool) -> None:
        interrupt_on_sigterm()
        self.clock = SystemClock()
        self.directory = directory_at(settings.directory, local_filesystem(), self.clock)
        self.started_at = self.clock.monotonic()
        self.deadline = self.started_at + timeout
        self.timeout = timeout
        self._quiet = quiet

    @property
    def seconds(self) -> float:
        """How long the command has run."""
        return round(self.clock.monotonic() - self.started_at, 3)

    def directories_with(self, batches: set[str]) -> dict[str, Directory]:
        """The directories, by sink, in which one of these batches is pending; "" is the outbox directory itself.

        A batch that is not fanned out yet is pending for every sink.
        """
        with self._translate_errors():
            by_sink = {directory.sink: directory for directory in (self.directory, *self.directory.queues())}
            pending = {sink: directory for sink, directory in by_sink.items() if _sealed_batches(directory) & batches}
        return by_sink if "" in pending else pending

    def describe_workers(self, directories: dict[str, Directory]) -> str:
        """The delivery workers of these directories, by sink, and their states."""
        descriptions = []
        for sink, directory in directories.items():
            heartbeat = read_heartbeat(directory)
            description = describe_worker(heartbeat, heartbeat_age_s(heartbeat, self.clock))
            descriptions.append(f"{sink}: {description}" if sink else description)
        return "; ".join(descriptions)

    def has_live_worker(self) -> bool:
        """Whether a delivery worker is alive: it recovers the segments of dead writers."""
        heartbeat = read_heartbeat(self.directory)
        return heartbeat is not None and heartbeat.age_s(self.clock) <= HEARTBEAT_STALE_AFTER_S

    def active_segments(self) -> set[str]:
        """The names of the active segments that are not empty."""
        with self._translate_errors():
            files = self.directory.filesystem.list_files(self.directory.path)
            return {name for name, size in files if size and layout.kind_of(name) in _SEGMENT_KINDS}

    def pending_batches(self) -> set[str]:
        """The ids of the batches that a sink has not delivered yet."""
        with self._translate_errors():
            return self.directory.waiting_batch_ids()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DirectoryUnusableError(
                self.directory.path, f"cannot be listed: {error.strerror}", "name an outbox directory"
            ) from None

    def poll_until_deadline(self) -> Iterator[bool]:
        """Pause between two polls, longer if listing the directory takes long; ends at the deadline."""
        while True:
            before = self.clock.monotonic()
            yield True
            now = self.clock.monotonic()
            if now >= self.deadline:
                return
            pause = max(_POLL_S, _LISTING_SHARE * (now - before))
            threads.pause(min(pause, self.deadline - now))

    @contextmanager
    def show_progress(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar on a terminal; yields a function to call with the number of files that are left."""
        columns = (SpinnerColumn(), TextColumn(title), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} files"))
        hidden = self._quiet or not err.is_terminal
        with Progress(*columns, TimeElapsedColumn(), console=err, disable=hidden, transient=True) as display:
            task = display.add_task(title, total=total)
            yield lambda left: display.update(task, completed=total - left)


def seal_directory(context: SealContext) -> SealResult:
    """Request a seal, and wait until the segments that were active then are sealed."""
    requested = unsealed = context.active_segments()
    orphaned: set[str] = set()
    next_request, next_check = 0.0, context.started_at + _ORPHAN_CHECK_S
    with context.show_progress("seal", len(requested)) as show:
        for _ in context.poll_until_deadline():
            now = context.clock.monotonic()
            if unsealed and now >= next_request:
                _request_seal(context)
                next_request = now + _REQUEST_AGAIN_S
            unsealed = unsealed & context.active_segments() if unsealed else unsealed
            show(len(unsealed))
            if unsealed and now >= next_check:
                orphaned = {name for name in unsealed if _is_orphaned(context.directory, name)}
                next_check = now + _ORPHAN_CHECK_S
            orphaned &= unsealed
            if not unsealed or (unsealed == orphaned and not context.has_live_worker()):
                break
    return SealResult(
        directory=context.directory.path,
        sealed=sorted(requested - unsealed),
        unsealed=sorted(unsealed),
        orphaned=sorted(orphaned),
        reason=_unsealed_reason(len(unsealed), len(orphaned), context.timeout),
        seconds=context.seconds,
    )


def _request_seal(context: SealContext) -> None:
    try:
        sealer.request_seal(context.directory, context.clock)
    except OSError as error:
        path = context.directory.path_of(layout.SEAL_REQUEST)
        remedy = "run as the owner of the directory, or free disk space"
        raise DirectoryUnusableError(path, f"cannot be written: {error.strerror}", remedy) from None


def _is_orphaned(directory: Directory, name: str) -> bool:
    """Whether the writer of a segment is dead, which is so if its lock is free."""
    try:
        locked_file = directory.lock_existing(name)
    except (OSError, FileUnusableError):
        return False
    if locked_file is None:
        return False
    directory.filesystem.close(locked_file.fd)
    return True


def _unsealed_reason(unsealed: int, orphaned: int, timeout: float) -> str:
    reasons = []
    if orphaned:
        it = "it" if orphaned == 1 else "them"
        reasons.append(
            f"{counted(orphaned, 'segment')} of dead writers; the next start of an application or of pillarbox deliver "
            f"recovers {it}"
        )
    if unsealed > orphaned:
        count = counted(unsealed - orphaned, "segment")
        reasons.append(f"{count} not sealed after {timeout:g} s: the writer hangs, its disk is slow, or its version is older")
    return "; ".join(reasons)


def _sealed_batches(directory: Directory) -> set[str]:
    return {layout.batch_id(name) for name in directory.all_sealed_names()}


@expand_options
def seal(options: DirectoryOptions, timeout: TimeoutOption = 10.0, quiet: QuietOption = False, json: JsonOption = False) -> int:
    """Make all writers seal their segments.

    Waits until they have; exits with 1 if a segment is still unsealed after --timeout seconds, and says why. Running writers
    notice the request, a file named seal.request, within half a second. This command cannot seal the segment of a dead writer;
    it reports that.
    """
    result = seal_directory(SealContext(options.load_settings(), timeout, quiet=quiet))
    if json:
        print_json(result)
    else:
        sealed = f"sealed {counted(len(result.sealed), 'segment')}"
        out.print(sealed if result.sealed or result.unsealed else "nothing to seal")
        if result.reason:
            out.print(result.reason)
    return ExitCode.PARTIAL if result.unsealed else ExitCode.DONE
