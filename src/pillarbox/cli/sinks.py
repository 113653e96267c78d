"""`pillarbox sinks`: the queues of several sinks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
import typer

from pillarbox.admin.text import counted
from pillarbox.cli.options import CONTEXT_SETTINGS, DirectoryOptions, JsonOption, expand_options
from pillarbox.cli.output import ExitCode, out, print_json, print_table
from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import read_heartbeat
from pillarbox.errors import DirectoryUnusableError, UsageError
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queue_changes import cancel_queue_request, finish_removals, remove_queue, rename_queue, request_queue

if TYPE_CHECKING:
    from collections.abc import Iterator

sinks = typer.Typer(
    name="sinks",
    help="List, add, rename or remove the queues of sinks.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT_SETTINGS,
)

_NAME_RULE: Final = "use 1 to 32 of the characters a-z, 0-9, _ and -"

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the sink.")]


class SinkQueue(msgspec.Struct, frozen=True, kw_only=True):
    """One queue in `pillarbox sinks list --json`; bytes and numbers of files."""

    sink: str  # name of the sink
    sealed_files: int  # number of pending batches
    sealed_bytes: int  # bytes of pending batches
    dead_files: int  # number of batches with dead letters
    quarantine_files: int  # number of batches with damaged byte ranges
    delivered_files: int  # number of retained batches
    state: str  # state of its delivery worker; "" if it never had one
    requested: bool  # `sinks add` requested the queue; the next process that delivers to the sink creates it


class SinkChange(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `--json` of `pillarbox sinks add`, `remove` and `rename`."""

    sink: str  # name of the sink
    done: Literal["requested", "request_cancelled", "removed", "renamed"]  # what was changed
    files: int = 0  # number of pending batches of a removed sink
    returned: bool = False  # they were returned to the outbox; otherwise they were deleted
    new: str = ""  # new name of a renamed sink


@sinks.command("list")
@expand_options
def list_queues(options: DirectoryOptions, json: JsonOption = False) -> int:
    """List the queue of each sink.

    With a single sink there are no queues. Safe at any time: takes no lock and changes nothing.
    """
    directory = _open_directory(options)
    queues = [_describe_queue(queue) for queue in directory.queues()]
    empty = {"sealed_files": 0, "sealed_bytes": 0, "dead_files": 0, "quarantine_files": 0, "delivered_files": 0}
    queues += [SinkQueue(sink=sink, state="", requested=True, **empty) for sink in sorted(directory.requested_queues())]
    if json:
        print_json(queues)
    elif queues:
        numbers = [(name, "right") for name in ("pending", "bytes", "dead", "quarantined")]
        rows = [
            (
                queue.sink,
                queue.sealed_files,
                f"{queue.sealed_bytes:,}",
                queue.dead_files,
                queue.quarantine_files,
                _queue_state(queue),
            )
            for queue in queues
        ]  # fmt: skip
        print_table([("sink", "left"), *numbers, ("state", "left")], rows)
    else:
        out.print("no queues: this outbox has no more than one sink")
    return ExitCode.DONE


@sinks.command("add")
@expand_options
def add(*, name: NameArgument, options: DirectoryOptions, json: JsonOption = False) -> int:
    """Give a new sink the current backlog.

    Without this command, a new sink receives only batches that are sealed from then on. The next process that delivers with
    this name among its sinks creates the queue.
    """
    directory = _open_directory(options)
    if not layout.is_sink_name(name):
        raise UsageError(f"{name!r} is not a name; {_NAME_RULE}")
    if name in {queue.sink for queue in directory.queues()}:
        raise UsageError(f"{name} already has a queue")
    request_queue(directory, name)
    text = f"{name} will start with the current backlog; deliver to it with --sink {name}=URL"
    return _print_change(SinkChange(sink=name, done="requested"), text, json=json)


@sinks.command("remove")
@expand_options
def remove(
    *,
    name: NameArgument,
    options: DirectoryOptions,
    discard: Annotated[bool, typer.Option("--discard", help="Delete the queued batches.")] = False,
    return_batches: Annotated[
        bool, typer.Option("--return-batches", help="Return the queued batches to the outbox (last sink only).")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Remove the queue of a sink.

    No process may deliver to the sink meanwhile. The queues of other sinks do not change. Replay, repair or purge the dead
    letters and the quarantine of the queue first.
    """
    directory = _open_directory(options)
    finish_removals(directory)
    if name in directory.requested_queues():
        cancel_queue_request(directory, name)
        return _print_change(SinkChange(sink=name, done="request_cancelled"), f"request for {name} cancelled", json=json)
    with _lock_queue(directory, name, exclusive=return_batches) as queue:
        usage = queue.disk_usage()
        if usage.dead_files or usage.corrupt_files:
            files = f"{counted(usage.dead_files, 'file')} of dead letters, {counted(usage.corrupt_files, 'file')} of quarantine"
            commands = f"pillarbox dead list -d {queue.path}, pillarbox quarantine list -d {queue.path}"
            raise UsageError(f"{queue.path} still has {files}; replay, repair or purge them first: {commands}")
        pending = counted(usage.sealed_files, "batch", "batches")
        is_last = len(directory.queues()) == 1
        if usage.sealed_files and not (discard or return_batches):
            alternative = ", or --return-batches to return them to the outbox" if is_last else ""
            raise UsageError(f"{name} has {pending} pending; give --discard to delete them{alternative}")
        if return_batches and not is_last:
            raise UsageError("--return-batches is for the last sink; the queues of other sinks have these batches too")
        clock = SystemClock()
        remove_queue(queue, LedgerWriter(directory, clock), clock, return_batches=return_batches)
    outcome = "returned to the outbox" if return_batches else "deleted"
    text = f"removed {name}" + (f"; {pending} {outcome}" if usage.sealed_files else "")
    change = SinkChange(sink=name, done="removed", files=usage.sealed_files, returned=return_batches)
    return _print_change(change, text, json=json)


@sinks.command("rename")
@expand_options
def rename(
    *,
    name: NameArgument,
    new: Annotated[str, typer.Argument(metavar="NEW", help="New name of the sink.")],
    options: DirectoryOptions,
    json: JsonOption = False,
) -> int:
    """Rename the queue of a sink.

    No process may deliver to the sink meanwhile.
    """
    directory = _open_directory(options)
    if not layout.is_sink_name(new):
        raise UsageError(f"{new!r} is not a name; {_NAME_RULE}")
    if new in directory.requested_queues() | {queue.sink for queue in directory.queues()}:
        raise UsageError(f"{new} already has a queue, or a request for one")
    with _lock_queue(directory, name) as queue:
        clock = SystemClock()
        rename_queue(queue, new, LedgerWriter(directory, clock), clock)
    return _print_change(SinkChange(sink=name, done="renamed", new=new), f"renamed {name} to {new}", json=json)


def _print_change(change: SinkChange, text: str, *, json: bool) -> int:
    if json:
        print_json(change)
    else:
        out.print(text)
    return ExitCode.DONE


def _open_directory(options: DirectoryOptions) -> Directory:
    directory = Directory(options.load_settings().directory, local_filesystem(), SystemClock())
    try:
        directory.disk_usage()
    except OSError as error:
        raise DirectoryUnusableError(
            directory.path, f"cannot be listed: {error.strerror}", "name an outbox directory"
        ) from None
    return directory


def _describe_queue(queue: Directory) -> SinkQueue:
    usage, heartbeat = queue.disk_usage(), read_heartbeat(queue)
    return SinkQueue(
        sink=queue.sink,
        sealed_files=usage.sealed_files,
        sealed_bytes=usage.sealed_bytes,
        dead_files=usage.dead_files,
        quarantine_files=usage.corrupt_files,
        delivered_files=usage.delivered_files,
        state=str(heartbeat.state) if heartbeat is not None else "",
        requested=False,
    )


def _queue_state(queue: SinkQueue) -> str:
    return "requested; will start with the current backlog" if queue.requested else queue.state or "no delivery worker yet"


@contextmanager
def _lock_queue(directory: Directory, name: str, *, exclusive: bool = False) -> Iterator[Directory]:
    """The queue of a sink, locked against delivery; `exclusive`: no process may fan out batches either."""
    queue = next((queue for queue in directory.queues() if queue.sink == name), None)
    if queue is None:
        known = ", ".join(queue.sink for queue in directory.queues()) or "none"
        raise UsageError(f"{name} has no queue here; the queues are: {known}")
    locked_files = []
    try:
        for locked_dir in (directory, queue) if exclusive else (queue,):
            locked_file = locked_dir.acquire_lock_file(layout.DELIVER_LOCK)
            if locked_file is None:
                raise UsageError(f"a process delivers {locked_dir.path}: stop it, or restart it without {name} among its sinks")
            locked_files.append(locked_file)
        yield queue
    finally:
        for locked_file in locked_files:
            directory.filesystem.close(locked_file.fd)
