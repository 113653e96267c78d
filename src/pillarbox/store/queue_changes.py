"""Creates, renames and removes the queues of several sinks, in an order that is safe if the process dies at any moment.

The directory of a queue that is being created is `sink-<name>.adding`, and that of one being removed `sink-<name>.removing`.
Neither counts as a queue. If the process dies, another one cleans up: every start and every recovery completes removals
(`finish_removals`), and the holder of the lease removes the links of a queue that was not completed (`remove_request_links`).

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

_REMOVED: Final = ""  # the new name in the ledger entry of a queue that is removed


def request_queue(directory: Directory, sink: str) -> None:
    """Request a queue that starts with the current backlog. Idempotent."""
    directory.filesystem.make_directory(directory.path_of(layout.adding_name(sink)))


def create_requested_queue(directory: Directory, sink: str) -> list[str]:
    """Create the requested queue of a sink, with all pending batches of the outbox and of other queues. Returns their names.

    After a crash or an `OSError`, the next call starts again from the beginning.
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
            except FileNotFoundError:
                del names[layout.batch_id(name)]  # just delivered or compressed
            except PermissionError:
                if any(name == counted for counted, _ in filesystem.list_files(source.path)):
                    raise
                del names[layout.batch_id(name)]  # owned by another user
            except FileExistsError:
                pass  # linked from another queue, or by an earlier attempt
    for name in list(filesystem.list_names(adding, ALL_NAMES)):
        if layout.batch_id(name) not in names:  # linked by an earlier attempt, and evicted after it
            directory.remove(f"{layout.adding_name(sink)}/{name}")
    directory.rename_subdirectory(layout.adding_name(sink), layout.queue_name(sink))
    return sorted(names.values())


def cancel_queue_request(directory: Directory, sink: str) -> None:
    """Cancel the request for a queue."""
    _remove_subdirectory(directory, sink, layout.adding_name(sink))


def remove_request_links(directory: Directory) -> None:
    """Remove the links of a process that died while it created a requested queue. The requests stay.

    Only the holder of the lease may call this, because it is the one that creates queues.
    """
    for name in directory.filesystem.subdirectories(directory.path):
        if layout.sink_of_adding(name) is not None:
            _remove_files(directory, name)


def rename_queue(queue: Directory, new: str, ledger: LedgerWriter, clock: Clock) -> None:
    """Give a queue to another sink. Raises `OSError` if the ledger cannot be written; then nothing is renamed."""
    outbox = _outbox_of(queue)
    _record_rename(ledger, clock, queue.sink, new)
    outbox.rename_subdirectory(layout.queue_name(queue.sink), layout.queue_name(new))


def remove_queue(queue: Directory, ledger: LedgerWriter, clock: Clock, *, return_batches: bool = False) -> None:
    """Remove a queue and everything in it; with `return_batches`, its batches go back to the outbox directory first.

    Meanwhile no process may deliver the queue or, with `return_batches`, fan out. The first rename ends the queue; after a
    crash `finish_removals` removes the rest. Raises `OSError` if the ledger cannot be written; then the queue stays.
    """
    outbox = _outbox_of(queue)
    if return_batches:
        _return_batches(queue, outbox, ledger, clock)
    # Before the removal: otherwise `verify` would count the batches of this queue as missing from a later one of its name.
    _record_rename(ledger, clock, queue.sink, _REMOVED)
    _remove_subdirectory(outbox, queue.sink, layout.queue_name(queue.sink))


def finish_removals(directory: Directory) -> None:
    """Complete the removal of queues. Another process may do the same at the same time."""
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
    """Link the batches of a queue into the outbox directory, add ledger entries for them, and remove them from the queue.

    If the process dies before the entries are written, the batches still belong to the queue, and the next attempt repeats all.
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
        # A batch that the outbox directory already had was never fanned out, or was linked by an attempt that was interrupted.
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
