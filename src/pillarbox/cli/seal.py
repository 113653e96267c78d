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
from pillarbox.cli.app import (
    ConfigOption,
    DirectoryOption,
    Exit,
    JsonOption,
    QuietOption,
    app,
    err,
    out,
    require,
    settings_from,
    stop_on_sigterm,
)
from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import last_heartbeat
from pillarbox.delivery.state import HEARTBEAT_STALE_AFTER_S
from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.store import layout, request
from pillarbox.store.filesystem import os_filesystem
from pillarbox.store.layout import Kind
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.store.directory import Directory

_LOOK_S: Final = 0.05
_LISTING_SHARE: Final = 10  # listing the directory takes a tenth of the time at most
_AGAIN_S: Final = 2.0  # a request that a writer has missed, for whatever reason, is made again
_HELD_S: Final = 1.0  # before it is asked whether anybody holds a file that stays
_ACTIVE: Final = frozenset({Kind.ACTIVE, Kind.LEGACY_ACTIVE})

TimeoutOption = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Give up after so long.", min=0.1)]


class Sealed(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox seal --json`; names of files."""

    directory: str
    sealed: list[str]  # active files that are sealed now
    left: list[str]  # those that are not
    held_by_nobody: list[str]  # of these, what a dead writer left: the deliverer or the next start adopts it
    reason: str  # why something is left; "" where nothing is
    seconds: float


class Flushed(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox flush --json`; numbers of sealed files, which are one batch each."""

    directory: str
    files: int  # that waited when everything was sealed
    left_files: int  # of these, what waits still
    left_active: list[str]  # active files that were not sealed
    left_sinks: list[str]  # of several destinations, those for which files wait still
    reason: str  # why something is left; "" where nothing is
    seconds: float


class Site:
    """The directory that is waited for, and until when. Looking at it creates nothing."""

    def __init__(self, config: str | None, directory: str | None, timeout: float, *, quiet: bool) -> None:
        stop_on_sigterm()
        settings = settings_from(config, directory=directory)
        require(settings, "directory", "DIR")
        self.clock = SystemClock()
        self.place = directory_at(settings.directory, os_filesystem(), self.clock)
        self.began = self.clock.monotonic()
        self.deadline = self.began + timeout
        self.timeout = timeout
        self._quiet = quiet

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return round(self.clock.monotonic() - self.began, 3)

    def left_at(self, batches: set[str]) -> dict[str, Directory]:
        """Where any of them waits, by the name of the destination; "" is the directory, from which they go to several."""
        with self._listing():
            places = {place.sink: place for place in (self.place, *self.place.queues())}
            left = {sink: place for sink, place in places.items() if _batches(place) & batches}
        return places if "" in left else left  # what is handed over to nobody yet waits for all of them

    def deliverers(self, places: dict[str, Directory]) -> str:
        """Who delivers there, and how that goes."""
        beats = {name: last_heartbeat(place) for name, place in places.items()}
        each = ((f"{name}: " if name else "", beat) for name, beat in beats.items())
        return "; ".join(f"{name}{describe_worker(beat, heartbeat_age_s(beat, self.clock))}" for name, beat in each)

    def is_delivered_here(self) -> bool:
        """Whether somebody delivers the directory, and so adopts what dead writers leave."""
        beat = last_heartbeat(self.place)
        return beat is not None and self.clock.micros() - beat.at_micros <= HEARTBEAT_STALE_AFTER_S * 1e6

    def active(self) -> set[str]:
        """The active files that hold something."""
        with self._listing():
            listing = self.place.filesystem.list_files(self.place.path)
            return {name for name, size in listing if size and layout.kind_of(name) in _ACTIVE}

    def waiting(self) -> set[str]:
        """The batches that are sealed and not settled, here or at one of several destinations."""
        with self._listing():
            return self.place.waiting_batch_ids()

    @contextmanager
    def _listing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"cannot be listed: {error.strerror}"
            raise DirectoryUnusableError(self.place.path, problem, "name an outbox directory") from None

    def looks(self) -> Iterator[bool]:
        """Pause between looks; ends with the time. Listing a large directory is done as seldom as it takes long."""
        while True:
            before = self.clock.monotonic()
            yield True
            now = self.clock.monotonic()
            if now >= self.deadline:
                return
            pause = max(_LOOK_S, _LISTING_SHARE * (now - before))
            threading.Event().wait(min(pause, self.deadline - now))

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar on a terminal; called with how many are left."""
        columns = (SpinnerColumn(), TextColumn(what), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} files"))
        hidden = self._quiet or not err.is_terminal
        with Progress(*columns, TimeElapsedColumn(), console=err, disable=hidden, transient=True) as display:
            task = display.add_task(what, total=total)
            yield lambda left: display.update(task, completed=total - left)


def _seal(site: Site) -> Sealed:
    """Ask, and wait until what was active then is sealed."""
    asked = left = site.active()
    nobodys: set[str] = set()
    next_ask, next_check = 0.0, site.began + _HELD_S
    with site.progress("seal", len(asked)) as show:
        for _ in site.looks():
            now = site.clock.monotonic()
            if left and now >= next_ask:
                _ask(site)
                next_ask = now + _AGAIN_S
            left = left & site.active() if left else left
            show(len(left))
            if left and now >= next_check:
                nobodys = {name for name in left if _is_nobodys(site.place, name)}
                next_check = now + _HELD_S
            nobodys &= left
            if not left or (left == nobodys and not site.is_delivered_here()):
                break
    return Sealed(
        directory=site.place.path,
        sealed=sorted(asked - left),
        left=sorted(left),
        held_by_nobody=sorted(nobodys),
        reason=_why_unsealed(len(left), len(nobodys), site.timeout),
        seconds=site.seconds,
    )


def _ask(site: Site) -> None:
    try:
        request.request_seal(site.place, site.clock)
    except OSError as error:
        path = site.place.path_of(layout.SEAL_REQUEST)
        raise DirectoryUnusableError(
            path, f"cannot be written: {error.strerror}", "run as the directory's owner, make room"
        ) from None


def _is_nobodys(place: Directory, name: str) -> bool:
    """Whether the writer of an active file is dead. A lock for a moment tells, as it does whoever adopts."""
    try:
        taken = place.lock_existing(name)
    except (OSError, FileUnusableError):
        return False
    if taken is None:
        return False
    place.filesystem.close(taken.fd)
    return True


def _why_unsealed(left: int, nobodys: int, timeout: float) -> str:
    reasons = []
    if nobodys:
        reasons.append(f"{_files(nobodys)} held by nobody: the next start adopts it, or pillarbox deliver")
    if left > nobodys:
        held = _files(left - nobodys)
        reasons.append(f"{held} not sealed after {timeout:g} s: the writer hangs, its disk is slow, or it is an older version")
    return "; ".join(reasons)


def _files(count: int) -> str:
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
    site = Site(config, directory, timeout, quiet=quiet)
    done = _seal(site)
    if json:
        _print_json(done)
    else:
        out.print(f"sealed {_files(len(done.sealed))}" if done.sealed or done.left else "nothing to seal", markup=False)
        if done.reason:
            out.print(done.reason, markup=False)
    return Exit.PARTLY if done.left else Exit.DONE


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
    site = Site(config, directory, timeout, quiet=quiet)
    sealed = _seal(site)
    asked = left = site.waiting()
    if not sealed.left:
        left = _wait_for_delivery(site, asked)
    where = site.left_at(left)
    reason = sealed.reason
    if not sealed.left and left:
        reason = f"not delivered after {timeout:g} s; deliverer: {site.deliverers(where)}"
    done = Flushed(
        directory=site.place.path,
        files=len(asked),
        left_files=len(left),
        left_active=sealed.left,
        left_sinks=sorted(filter(None, where)),
        reason=reason,
        seconds=site.seconds,
    )
    if json:
        _print_json(done)
    else:
        settled = f"{len(asked) - len(left):,} of {len(asked):,} files settled"
        out.print(f"{settled}; {reason}" if reason else "nothing of it waits any more", markup=False)
    return Exit.PARTLY if reason else Exit.DONE


def _batches(place: Directory) -> set[str]:
    return {layout.batch_id(name) for name in place.all_sealed_names()}


def _wait_for_delivery(site: Site, asked: set[str]) -> set[str]:
    """What of it is left when the time is over."""
    left = before = asked
    with site.progress("deliver", len(asked)) as show:
        for _ in site.looks():
            found = site.waiting()
            left = left & (found | before)  # gone is what two looks do not show: a file may get another name while one is taken
            before = found
            show(len(left))
            if not left:
                break
    return left


def _print_json(done: Sealed | Flushed) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(done), indent=2).decode() + "\n")
