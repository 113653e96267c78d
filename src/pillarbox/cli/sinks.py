"""`pillarbox sinks`: the queues of several sinks: which there are, one more, one less, another name."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from pillarbox.cli.context import plural, print_json, print_table
from pillarbox.cli.main import ConfigOption, DirectoryOption, ExitCode, JsonOption, app, load_settings, out, require_setting
from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import read_heartbeat
from pillarbox.errors import DirectoryUnusableError, UsageError
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import QueueRenamedEntry
from pillarbox.store.os_filesystem import local_filesystem

if TYPE_CHECKING:
    from collections.abc import Iterator

sinks = typer.Typer(
    name="sinks",
    help="Several sinks, each with a queue of its own: which there are, one more, one less, another name.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(sinks)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="What the sink is called.")]


class SinkQueue(msgspec.Struct, frozen=True, kw_only=True):
    """One of `pillarbox sinks list --json`; bytes and numbers of files."""

    sink: str
    sealed_files: int
    sealed_bytes: int
    dead_files: int
    corrupt_files: int
    delivered_files: int
    state: str  # as its deliverer said last; empty where there was none
    requested: bool  # it is made by the next deliverer that knows it, and begins with what waits


class SinkChange(msgspec.Struct, frozen=True, kw_only=True):
    """What `pillarbox sinks add`, `remove` and `rename` print with --json."""

    sink: str
    done: Literal["requested", "request_cancelled", "removed", "renamed"]
    files: int = 0  # that waited for a sink that is removed
    returned: bool = False  # these files: a single sink has them; otherwise they are given up
    new: str = ""  # another name


@sinks.command("list")
def list_queues(directory: DirectoryOption = None, config: ConfigOption = None, json: JsonOption = False) -> int:
    """Show the queue of each sink. Safe at any time; with one sink there is none."""
    place = _open_directory(directory, config)
    found = [_describe_queue(queue) for queue in place.queues()]
    empty = {"sealed_files": 0, "sealed_bytes": 0, "dead_files": 0, "corrupt_files": 0, "delivered_files": 0}
    found += [SinkQueue(sink=sink, state="", requested=True, **empty) for sink in sorted(place.requested_queues())]
    if json:
        print_json(found)
    elif found:
        figures = [(name, "right") for name in ("files", "bytes", "dead", "damaged")]
        rows = [
            (one.sink, one.sealed_files, f"{one.sealed_bytes:,}", one.dead_files, one.corrupt_files, _queue_state(one))
            for one in found
        ]
        print_table([("sink", "left"), *figures, ("state", "left")], rows)
    else:
        out.print("no queues: this directory has one sink at the most", markup=False)
    return ExitCode.DONE


@sinks.command("add")
def add(name: NameArgument, directory: DirectoryOption = None, config: ConfigOption = None, json: JsonOption = False) -> int:
    """Have a new sink begin with what waits now. Without this, one that is named newly begins with what is sealed then.

    Only notes it: the next process that delivers with this name among its sinks makes the queue.
    """
    place = _open_directory(directory, config)
    if not layout.is_sink_name(name):
        raise UsageError(f"{name!r} is no name of a sink: a-z, 0-9, _ and -, at most 32")
    if name in {queue.sink for queue in place.queues()}:
        raise UsageError(f"{name} has a queue already")
    place.request_queue(name)
    text = f"{name} begins with what waits, once a process delivers to it: --sink {name}=URL"
    return _print_change(SinkChange(sink=name, done="requested"), text, json=json)


@sinks.command("remove")
def remove(
    name: NameArgument,
    directory: DirectoryOption = None,
    config: ConfigOption = None,
    discard: Annotated[bool, typer.Option("--discard", help="Give up what waits for it.")] = False,
    hand_back: Annotated[bool, typer.Option("--hand-back", help="Of the last one: let a single sink have what waits.")] = False,
    json: JsonOption = False,
) -> int:
    """Remove a sink's queue, once nobody delivers to it any more, and say what becomes of what waits there.

    Other sinks keep what waits for them. Dead letters and quarantine in it are to be replayed, repaired or purged before.
    """
    place = _open_directory(directory, config)
    place.finish_queue_removals()
    if name in place.requested_queues():
        place.cancel_queue_request(name)
        return _print_change(SinkChange(sink=name, done="request_cancelled"), f"{name} is not asked for any more", json=json)
    with _lock_queue(place, name, alone=hand_back) as queue:
        found = queue.disk_usage()
        if found.dead_files or found.corrupt_files:
            kept = f"{plural(found.dead_files, 'file')} of dead letters and {plural(found.corrupt_files, 'file')} of quarantine"
            raise UsageError(f"{queue.path} keeps {kept}: pillarbox dead and pillarbox quarantine -d {queue.path} first")
        files = plural(found.sealed_files, "file")
        if found.sealed_files and not (discard or hand_back):
            waits = f"{files} {'waits' if found.sealed_files == 1 else 'wait'} for {name}"
            last = ", --hand-back lets a single sink have that" if len(place.queues()) == 1 else ""
            raise UsageError(f"{waits}: --discard gives that up{last}")
        if hand_back:
            if len(place.queues()) > 1:
                raise UsageError("--hand-back is for the last queue: the other sinks have what waits, or had it")
            queue.return_batches()
        _log_rename(place, name, "")
        queue.remove_queue()
    what = "handed back" if hand_back else "given up"
    text = f"{name} removed" + (f"; {files} {what}" if found.sealed_files else "")
    return _print_change(SinkChange(sink=name, done="removed", files=found.sealed_files, returned=hand_back), text, json=json)


@sinks.command("rename")
def rename(
    name: NameArgument,
    new: Annotated[str, typer.Argument(metavar="NEW", help="What it is called from now on.")],
    directory: DirectoryOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Give a sink's queue another name, once nobody delivers to it any more."""
    place = _open_directory(directory, config)
    if not layout.is_sink_name(new):
        raise UsageError(f"{new!r} is no name of a sink: a-z, 0-9, _ and -, at most 32")
    if new in place.requested_queues() | {queue.sink for queue in place.queues()}:
        raise UsageError(f"{new} has a queue already, or was asked for")
    with _lock_queue(place, name) as queue:
        _log_rename(place, name, new)
        queue.rename_queue(new)
    return _print_change(SinkChange(sink=name, done="renamed", new=new), f"{name} is {new} now", json=json)


def _print_change(changed: SinkChange, text: str, *, json: bool) -> int:
    if json:
        print_json(changed)
    else:
        out.print(text, markup=False)
    return ExitCode.DONE


def _log_rename(place: Directory, name: str, to: str) -> None:
    """Before: otherwise what was handed over to the old queue would be missing in a later one of its name."""
    clock = SystemClock()
    ledger = LedgerWriter(place, clock)
    ledger.add(QueueRenamedEntry(clock.micros(), name, to))
    if not ledger.write(sync=True):
        raise DirectoryUnusableError(place.path, "has a ledger that cannot be written now", "make room, and try it again")


def _open_directory(directory: str | None, config: str | None) -> Directory:
    settings = load_settings(config, directory=directory)
    require_setting(settings, "directory", "DIR")
    place = Directory(settings.directory, local_filesystem(), SystemClock())
    try:
        place.disk_usage()
    except OSError as error:
        raise DirectoryUnusableError(place.path, f"cannot be listed: {error.strerror}", "name an outbox directory") from None
    return place


def _describe_queue(queue: Directory) -> SinkQueue:
    found, beat = queue.disk_usage(), read_heartbeat(queue)
    return SinkQueue(
        sink=queue.sink,
        sealed_files=found.sealed_files,
        sealed_bytes=found.sealed_bytes,
        dead_files=found.dead_files,
        corrupt_files=found.corrupt_files,
        delivered_files=found.delivered_files,
        state=str(beat.state) if beat is not None else "",
        requested=False,
    )


def _queue_state(queue: SinkQueue) -> str:
    return "asked for, begins with what waits" if queue.requested else queue.state or "nobody has delivered to it so far"


@contextmanager
def _lock_queue(place: Directory, name: str, *, alone: bool = False) -> Iterator[Directory]:
    """A queue that nobody delivers as long as this lasts, and `alone` nobody hands files over either."""
    queue = next((one for one in place.queues() if one.sink == name), None)
    if queue is None:
        there = ", ".join(one.sink for one in place.queues()) or "none"
        raise UsageError(f"{name} has no queue here; there are: {there}")
    held = []
    try:
        for where in (place, queue) if alone else (queue,):
            taken = where.acquire_lock_file(layout.DELIVER_LOCK)
            if taken is None:
                raise UsageError(f"a process delivers {where.path}: start it again without {name} among its sinks, or stop it")
            held.append(taken)
        yield queue
    finally:
        for taken in held:
            place.filesystem.close(taken.fd)
