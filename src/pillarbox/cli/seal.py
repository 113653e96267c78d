"""`pillarbox seal` and `pillarbox flush`: have the writers of a directory seal what they hold, and wait until that is done."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pillarbox.admin.status import describe_worker, heartbeat_age_s
from pillarbox.cli.main import (
    ConfigOption,
    DirectoryOption,
    ExitCode,
    JsonOption,
    QuietOption,
    app,
    err,
    interrupt_on_sigterm,
    load_settings,
    out,
    require_setting,
)
from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import read_heartbeat
from pillarbox.delivery.state import HEARTBEAT_STALE_AFTER_S
from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.store import layout, sealer
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.store.directory import Directory

_POLL_S: Final = 0.05
_LISTING_SHARE: Final = 10  # listing the directory takes a tenth of the time at most
_REQUEST_AGAIN_S: Final = 2.0  # a request that a writer has missed, for whatever reason, is made again
_ORPHAN_CHECK_S: Final = 1.0  # before it is asked whether anybody holds a file that stays
_SEGMENT_KINDS: Final = frozenset({Kind.ACTIVE, Kind.LEGACY_ACTIVE})

TimeoutOption = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Give up after so long.", min=0.1)]


class SealResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox seal --json`; names of files."""

    directory: str
    sealed: list[str]  # active files that are sealed now
    unsealed: list[str]  # those that are not
    orphaned: list[str]  # of these, what a dead writer left: the deliverer or the next start adopts it
    reason: str  # why something is left; "" where nothing is
    seconds: float


class FlushResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox flush --json`; numbers of sealed files, which are one batch each."""

    directory: str
    batches: int  # that waited when everything was sealed
    pending_batches: int  # of these, what waits still
    unsealed: list[str]  # active files that were not sealed
    pending_sinks: list[str]  # of several destinations, those for which files wait still
    reason: str  # why something is left; "" where nothing is
    seconds: float


class SealContext:
    """The directory that is waited for, and until when. Looking at it creates nothing."""

    def __init__(self, config: str | None, directory: str | None, timeout: float, *, quiet: bool) -> None:
        interrupt_on_sigterm()
        settings = load_settings(config, directory=directory)
        require_setting(settings, "directory", "DIR")
        self.clock = SystemClock()
        self.directory = directory_at(settings.directory, local_filesystem(), self.clock)
        self.started_at = self.clock.monotonic()
        self.deadline = self.started_at + timeout
        self.timeout = timeout
        self._quiet = quiet

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return round(self.clock.monotonic() - self.started_at, 3)

    def pending_at(self, batches: set[str]) -> dict[str, Directory]:
        """Where any of them waits, by the name of the destination; "" is the directory, from which they go to several."""
        with self._listing_errors():
            places = {place.sink: place for place in (self.directory, *self.directory.queues())}
            left = {sink: place for sink, place in places.items() if _pending_batches(place) & batches}
        return places if "" in left else left  # what is handed over to nobody yet waits for all of them

    def describe_workers(self, places: dict[str, Directory]) -> str:
        """Who delivers there, and how that goes."""
        beats = {name: read_heartbeat(place) for name, place in places.items()}
        each = ((f"{name}: " if name else "", beat) for name, beat in beats.items())
        return "; ".join(f"{name}{describe_worker(beat, heartbeat_age_s(beat, self.clock))}" for name, beat in each)

    def has_live_worker(self) -> bool:
        """Whether somebody delivers the directory, and so adopts what dead writers leave."""
        beat = read_heartbeat(self.directory)
        return beat is not None and self.clock.micros() - beat.at_micros <= HEARTBEAT_STALE_AFTER_S * 1e6

    def active_segments(self) -> set[str]:
        """The active files that hold something."""
        with self._listing_errors():
            listing = self.directory.filesystem.list_files(self.directory.path)
            return {name for name, size in listing if size and layout.kind_of(name) in _SEGMENT_KINDS}

    def pending_batches(self) -> set[str]:
        """The batches that are sealed and not settled, here or at one of several destinations."""
        with self._listing_errors():
            return self.directory.waiting_batch_ids()

    @contextmanager
    def _listing_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"cannot be listed: {error.strerror}"
            raise DirectoryUnusableError(self.directory.path, problem, "name an outbox directory") from None

    def poll_until_deadline(self) -> Iterator[bool]:
        """Pause between looks; ends with the time. Listing a large directory is done as seldom as it takes long."""
        while True:
            before = self.clock.monotonic()
            yield True
            now = self.clock.monotonic()
            if now >= self.deadline:
                return
            pause = max(_POLL_S, _LISTING_SHARE * (now - before))
            threading.Event().wait(min(pause, self.deadline - now))

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar on a terminal; called with how many are left."""
        columns = (SpinnerColumn(), TextColumn(what), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} files"))
        hidden = self._quiet or not err.is_terminal
        with Progress(*columns, TimeElapsedColumn(), console=err, disable=hidden, transient=True) as display:
            task = display.add_task(what, total=total)
            yield lambda left: display.update(task, completed=total - left)


def seal_directory(site: SealContext) -> SealResult:
    """Ask, and wait until what was active then is sealed."""
    asked = left = site.active_segments()
    nobodys: set[str] = set()
    next_ask, next_check = 0.0, site.started_at + _ORPHAN_CHECK_S
    with site.progress("seal", len(asked)) as show:
        for _ in site.poll_until_deadline():
            now = site.clock.monotonic()
            if left and now >= next_ask:
                _request_seal(site)
                next_ask = now + _REQUEST_AGAIN_S
            left = left & site.active_segments() if left else left
            show(len(left))
            if left and now >= next_check:
                nobodys = {name for name in left if _is_orphaned(site.directory, name)}
                next_check = now + _ORPHAN_CHECK_S
            nobodys &= left
            if not left or (left == nobodys and not site.has_live_worker()):
                break
    return SealResult(
        directory=site.directory.path,
        sealed=sorted(asked - left),
        unsealed=sorted(left),
        orphaned=sorted(nobodys),
        reason=_unsealed_reason(len(left), len(nobodys), site.timeout),
        seconds=site.seconds,
    )


def _request_seal(site: SealContext) -> None:
    try:
        sealer.request_seal(site.directory, site.clock)
    except OSError as error:
        path = site.directory.path_of(layout.SEAL_REQUEST)
        raise DirectoryUnusableError(
            path, f"cannot be written: {error.strerror}", "run as the directory's owner, make room"
        ) from None


def _is_orphaned(place: Directory, name: str) -> bool:
    """Whether the writer of an active file is dead. A lock for a moment tells, as it does whoever adopts."""
    try:
        taken = place.lock_existing(name)
    except (OSError, FileUnusableError):
        return False
    if taken is None:
        return False
    place.filesystem.close(taken.fd)
    return True


def _unsealed_reason(left: int, nobodys: int, timeout: float) -> str:
    reasons = []
    if nobodys:
        reasons.append(f"{_segments(nobodys)} held by nobody: the next start adopts it, or pillarbox deliver")
    if left > nobodys:
        held = _segments(left - nobodys)
        reasons.append(f"{held} not sealed after {timeout:g} s: the writer hangs, its disk is slow, or it is an older version")
    return "; ".join(reasons)


def _segments(count: int) -> str:
    return f"{count:,} active file{'' if count == 1 else 's'}"


@app.command("seal")
def seal(
    directory: DirectoryOption = None,
    timeout: TimeoutOption = 10.0,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> int:
    """Have all writers seal what they hold, and wait until they have. Exit code 1 where something is left, and why.

    Reaches the running writers within half a second by a file, seal.request, which it writes as the directory's owner. What a
    dead writer left cannot be sealed by this: it says so.
    """
    site = SealContext(config, directory, timeout, quiet=quiet)
    done = seal_directory(site)
    if json:
        _print_json(done)
    else:
        out.print(f"sealed {_segments(len(done.sealed))}" if done.sealed or done.unsealed else "nothing to seal", markup=False)
        if done.reason:
            out.print(done.reason, markup=False)
    return ExitCode.PARTIAL if done.unsealed else ExitCode.DONE


@app.command("flush")
def flush(
    directory: DirectoryOption = None,
    timeout: TimeoutOption = 30.0,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> int:
    """Have all writers seal what they hold, and wait until everything sealed till then is settled at every destination.

    It delivers nothing itself. Exit code 1 where something is left after --timeout seconds: the output says who delivers,
    and how that goes.
    """
    site = SealContext(config, directory, timeout, quiet=quiet)
    sealed = seal_directory(site)
    asked = left = site.pending_batches()
    if not sealed.unsealed:
        left = _wait_for_delivery(site, asked)
    where = site.pending_at(left)
    reason = sealed.reason
    if not sealed.unsealed and left:
        reason = f"not delivered after {timeout:g} s; deliverer: {site.describe_workers(where)}"
    done = FlushResult(
        directory=site.directory.path,
        batches=len(asked),
        pending_batches=len(left),
        unsealed=sealed.unsealed,
        pending_sinks=sorted(filter(None, where)),
        reason=reason,
        seconds=site.seconds,
    )
    if json:
        _print_json(done)
    else:
        settled = f"{len(asked) - len(left):,} of {len(asked):,} files settled"
        out.print(f"{settled}; {reason}" if reason else "nothing of it waits any more", markup=False)
    return ExitCode.PARTIAL if reason else ExitCode.DONE


def _pending_batches(place: Directory) -> set[str]:
    return {layout.batch_id(name) for name in place.all_sealed_names()}


def _wait_for_delivery(site: SealContext, asked: set[str]) -> set[str]:
    """What of it is left when the time is over."""
    left = before = asked
    with site.progress("deliver", len(asked)) as show:
        for _ in site.poll_until_deadline():
            found = site.pending_batches()
            left = left & (found | before)  # gone is what two looks do not show: a file may get another name while one is taken
            before = found
            show(len(left))
            if not left:
                break
    return left


def _print_json(done: SealResult | FlushResult) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(done), indent=2).decode() + "\n")
