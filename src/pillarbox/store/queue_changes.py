"""Makes, renames and removes the queues of several sinks, in an order that a crash at any moment leaves safe.

A queue that is being made is `sink-<name>.adding`, and one that is being removed `sink-<name>.removing`. Neither counts as a
queue. What a process that died left of them is finished by the next one: removals by every start and every recovery
(`finish_removals`), links of a queue that was never completed by whoever holds the lease (`empty_requests`).

A directory is synced before it is renamed. Otherwise a power loss may bring back names that were removed from it, under the new
name: hard links to batches that the outbox directory has again.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.dirscan import ALL_NAMES
from pillarbox.store.ledger_entries import QueueRenamedEntry, ReturnedEntry
from pillarbox.store.reconciliation import LedgerFold, read_ledger
from pillarbox.store.windows import count_records

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import LedgerWriter

_REMOVED: Final = ""  # the new name of a queue that is removed


def request_queue(directory: Directory, sink: str) -> None:
    """Request a queue that starts with the current backlog. Idempotent."""
    directory.filesystem.make_directory(directory.path_of(layout.adding_name(sink)))


def create_requested_queue(directory: Directory, sink: str) -> list[str]:
    """Create the requested queue of a sink, with all batches that wait here or in another queue. Returns their names.

    After a crash it is done again from the beginning.
    """
    filesystem = directory.filesystem
    adding = directory.path_of(layout.adding_name(sink))
    names: dict[str, str] = {}  # by batch id: one queue may have compressed the file and another not
    for source in (directory, *directory.queues()):
        for name in source.batch_names():
            if names.setdefault(layout.batch_id(name), name) != name:
                continue
            try:
                filesystem.link(source.path_of(name), f"{adding}/{name}")
            except (FileNotFoundError, PermissionError):
                del names[layout.batch_id(name)]  # just delivered, or compressed; or another user's
            except FileExistsError:
                pass  # linked from another queue, or by an earlier attempt
    for name in list(filesystem.list_names(adding, ALL_NAMES)):
        if layout.batch_id(name) not in names:  # linked by an earlier attempt, and evicted since
            directory.remove(f"{layout.adding_name(sink)}/{name}")
    directory.rename_subdirectory(layout.adding_name(sink), layout.queue_name(sink))
    return sorted(names.values())


def cancel_queue_request(directory: Directory, sink: str) -> None:
    """Cancel the request for a queue."""
    _remove_subdirectory(directory, sink, layout.adding_name(sink))


def empty_requests(directory: Directory) -> None:
    """Remove the links that a process left which died while it created a requested queue; the requests stay.

    Only the process that holds the lease of the directory may do so: it is the one that creates queues.
    """
    for name in directory.filesystem.subdirectories(directory.path):
        if layout.sink_of_adding(name) is not None:
            _remove_files(directory, name)


def rename_queue(queue: Directory, new: str, ledger: LedgerWriter, clock: Clock) -> None:
    """Make a queue that of another sink. Raises `OSError` where the ledger cannot be written; nothing is renamed then."""
    outbox = _outbox_of(queue)
    _record_rename(ledger, clock, queue.sink, new)
    outbox.rename_subdirectory(layout.queue_name(queue.sink), layout.queue_name(new))


def remove_queue(queue: Directory, ledger: LedgerWriter, clock: Clock, *, return_batches: bool = False) -> None:
    """Remove a queue and everything in it; with `return_batches`, its batches go back to the outbox directory first.

    Nobody may deliver the queue, or, with `return_batches`, fan out, meanwhile. It stops being a queue at once; after a crash
    `finish_removals` removes the rest. Raises `OSError` where the ledger cannot be written; the queue stays then.
    """
    outbox = _outbox_of(queue)
    if return_batches:
        _return_batches(queue, outbox, ledger, clock)
    # Before it is done: otherwise a later queue of that name would miss the batches of this one.
    _record_rename(ledger, clock, queue.sink, _REMOVED)
    _remove_subdirectory(outbox, queue.sink, layout.queue_name(queue.sink))


def finish_removals(directory: Directory) -> None:
    """Remove what is left of queues that were being removed. Another process may do the same at this moment."""
    for name in filter(layout.is_removing_name, directory.filesystem.subdirectories(directory.path)):
        with contextlib.suppress(FileNotFoundError):
            _remove_files(directory, name)
            directory.filesystem.remove_directory(directory.path_of(name))


def _outbox_of(queue: Directory) -> Directory:
    if queue.parent is None:
        raise ValueError(queue.path)
    return queue.parent


def _remove_files(directory: Directory, subdirectory: str) -> None:
    for file in list(directory.filesystem.list_names(directory.path_of(subdirectory), ALL_NAMES)):
        directory.remove(f"{subdirectory}/{file}")


def _remove_subdirectory(directory: Directory, sink: str, name: str) -> None:
    finish_removals(directory)  # of an earlier queue with this name
    directory.rename_subdirectory(name, layout.removing_name(sink))
    finish_removals(directory)


def _record_rename(ledger: LedgerWriter, clock: Clock, sink: str, new: str) -> None:
    ledger.add(QueueRenamedEntry(clock.micros(), sink, new))
    ledger.write_or_raise()


def _return_batches(queue: Directory, outbox: Directory, ledger: LedgerWriter, clock: Clock) -> None:
    """Link the batches of a queue into the outbox directory, enter that into the ledger, and remove them from the queue.

    In this order: if the process dies before the entries, the links in the queue do not count, and everything is done again.
    """
    filesystem = outbox.filesystem
    names = sorted(queue.all_sealed_names())
    outbox_names = outbox.all_sealed_names()
    for name in names:
        with contextlib.suppress(FileExistsError):
            filesystem.link(queue.path_of(name), outbox.path_of(name))
    filesystem.sync_directory(outbox.path)
    fold = LedgerFold(read_ledger(outbox).entries)
    for name in names:
        # A name that the outbox directory had already was never fanned out, or returned by an attempt that was cut short.
        if name not in outbox_names or fold.may_be_fanned_out(layout.batch_id(name)):
            ledger.add(_returned_entry(queue, name, clock.micros()))
    ledger.write_or_raise()
    for name in names:
        queue.remove(name)


def _returned_entry(queue: Directory, name: str, now_micros: int) -> ReturnedEntry:
    try:
        fd = queue.open_existing(name)
        try:
            records, damaged_ranges = count_records(queue.filesystem, name, fd)
        finally:
            queue.filesystem.close(fd)
    except (OSError, FileUnusableError):
        return ReturnedEntry(now_micros, layout.batch_id(name), None)
    return ReturnedEntry(now_micros, layout.batch_id(name), None if damaged_ranges else records)
