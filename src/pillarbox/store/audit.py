"""Looks whether a directory's account balances, while writers and a deliverer run. Locks, creates and adopts nothing.

The ledger is read before and after the files. A batch that is gone from the second look must have an entry that says why, for
entries are written before files go; one that appears meanwhile is left out.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout, reader
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import entries_of
from pillarbox.store.reconciliation import (
    HANDED_OVER,
    OF_A_BATCH,
    OF_A_QUEUE,
    Account,
    Entry,
    Evicted,
    Found,
    Settled,
    Shared,
    Wrong,
    account,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.store.directory import Directory

_LOOKS: Final = 5  # what is out of step because somebody was at work is in step the next time
_BETWEEN_LOOKS_S: Final = 0.2
_COUNTED: Final = frozenset({Kind.ACTIVE, Kind.LEGACY_ACTIVE, Kind.SEALED, Kind.DEAD})
_UNREADABLE: Final = Found(0, 1)  # how many records a file holds that cannot be read, nobody knows


class Audit(NamedTuple):
    """What was found."""

    account: Account
    unread_entries: int  # lines of the ledger that this version does not know, or that are damaged
    unreadable: list[str]  # files

    @property
    def balances(self) -> bool:
        """Whether everything is accounted for; what cannot be read is not."""
        return self.account.balances and not self.unreadable


def audit_queues(
    directory: Directory, whole: Audit, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> dict[str, Audit]:
    """The accounts of several sinks, by name, after the one of the directory they share. Raises `OSError`.

    What was handed over to a sink must be in its account: who hands over writes there first. What else it has accepted, because
    it was sent or went in again, says nothing of that.
    """
    found: dict[str, Audit] = {}
    for queue in directory.queues():
        one = audit(queue, progress)
        handed = sum(row.accepted_max for row in one.account.writers if row.writer in OF_A_QUEUE)
        missing = whole.account.shared.get(queue.sink, 0) - handed
        if missing > 0:
            one.account.wrong.append(Wrong("", HANDED_OVER, missing, "handed over, and not in the account of the sink"))
        found[queue.sink] = one
    return found


def audit(directory: Directory, progress: Callable[[int, int], None] = lambda _done, _total: None) -> Audit:
    """The account of a directory; `progress(done, total)` is called with bytes that were read. Raises `OSError`."""
    known: dict[str, Found] = {}
    found = _look(directory, progress, known)
    for _ in range(_LOOKS - 1):
        if found.balances:
            break
        threading.Event().wait(_BETWEEN_LOOKS_S)
        found = _look(directory, progress, known)
    return found


def _look(directory: Directory, progress: Callable[[int, int], None], known: dict[str, Found]) -> Audit:
    """One look; sealed files never change, so that those in `known`, which is added to, are not read again."""
    before, _ = _entries(directory)
    # Twice, as in `Directory.waiting`: what is compressed meanwhile must not be missing.
    listing = sorted(dict(entry for _ in range(2) for entry in directory.filesystem.listing(directory.path)).items())
    total = sum(size for name, size in listing if layout.kind_of(name) in _COUNTED)
    found: dict[str, Found] = {}
    active: dict[str, Found] = {}
    dead: dict[str, int] = {}
    unreadable: list[str] = []
    done = 0
    for name, size in listing:
        kind = layout.kind_of(name)
        if kind not in _COUNTED:
            continue
        progress(done, total)
        done += size
        if name in known:
            found[layout.batch_id(name)] = known[name]
            continue
        try:
            if kind is Kind.SEALED:
                known[name] = found[layout.batch_id(name)] = _sealed(directory, name)
                continue
            data = _read(directory, name)
        except FileNotFoundError:
            continue
        except (OSError, FileUnusableError):
            unreadable.append(name)
            data = None
            if kind is Kind.SEALED:
                found[layout.batch_id(name)] = _UNREADABLE
        if kind is Kind.DEAD:
            dead[layout.batch_id(name).removeprefix("dead-")] = 0 if data is None else data.count(b"\n")
        elif kind is not Kind.SEALED:
            writer = layout.writer_of(name)
            active[name] = Found(0, 1, writer) if data is None else _found(name, data[: data.rfind(b"\n") + 1], writer)
    progress(total, total)
    entries, unread = _entries(directory)
    there = {name for name, _ in directory.filesystem.listing(directory.path)}
    still_active = [file for name, file in active.items() if name in there]
    ignored = _batches(entries) - _batches(before) - found.keys()
    settled = {entry.batch for entry in entries if isinstance(entry, (Settled, Shared, Evicted))}
    # Those of a batch that is not settled yet are written before the ledger has them.
    kept = sum(count for batch, count in dead.items() if batch in settled or batch not in found)
    return Audit(account(entries, found, still_active, ignored, kept), unread, unreadable)


def _entries(directory: Directory) -> tuple[list[Entry], int]:
    return entries_of(directory.read_bytes(layout.LEDGER))


def _batches(entries: list[Entry]) -> set[str]:
    return {entry.batch for entry in entries if isinstance(entry, OF_A_BATCH)}


def _read(directory: Directory, name: str) -> bytes:
    fd = directory.open_found(name)
    try:
        return directory.filesystem.read_all(fd)
    finally:
        directory.filesystem.close(fd)


def _sealed(directory: Directory, name: str) -> Found:
    try:
        return _found(name, _read(directory, name))
    except FileNotFoundError:  # gone, or compressed meanwhile
        name = layout.compressed_name(name)
        return _found(name, _read(directory, name))


def _found(name: str, data: bytes, writer: str = "") -> Found:
    contents, _ = reader.read_file(name, data, lambda: None)
    return Found(len(contents.payloads), len(contents.spans), writer)
