"""A writer with its hot path and its sealer on a real directory, and the scenarios that the tests interrupt."""

from __future__ import annotations

import errno
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pillarbox.clock import Clock
from pillarbox.outcome import DROPPED, ENQUEUED, Outcome
from pillarbox.store import layout, reader, record
from pillarbox.store.append_hooks import AppendHooks
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock

INNER = 1000  # numbers of events that a handler stores begin here
LIMITS = {"batch_size": 3, "batch_bytes": 10**6, "max_bytes": 2**20}


class Numbered(msgspec.Struct):
    """An event."""

    n: int


class WriteFaultFilesystem(OsFilesystem):
    """Syncs nothing. Its next write may be short, fail, or be interrupted after some bytes."""

    short: int | None = None
    error: int = 0
    interrupted: int | None = None
    meanwhile: Callable[[], object] | None = None  # called after a part of the next write

    def __init__(self) -> None:
        super().__init__()
        self.synced: list[int] = []

    def sync_data(self, fd: int) -> None:
        self.synced.append(fd)

    def sync_directory(self, path: str) -> None:
        pass

    def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
        if self.error:
            code, self.error = self.error, 0
            raise OSError(code, os.strerror(code))
        if self.short is not None:
            count, self.short = self.short, None
            return os.write(fd, data[:count])
        if self.meanwhile is not None:
            callback, self.meanwhile = self.meanwhile, None
            count = os.write(fd, data[:7])
            callback()
            return count + os.write(fd, data[count:])
        if self.interrupted is not None:
            count, self.interrupted = self.interrupted, None
            os.write(fd, data[:count])
            raise KeyboardInterrupt
        return os.write(fd, data)


class WriterSetup:
    """A writer with its hot path and its sealer, and the events that were attempted, accepted and dropped."""

    def __init__(self, folder: Path, clock: Clock | None = None, *, compiled: bool = True, **limits: int) -> None:
        self.disk = WriteFaultFilesystem()
        self.clock = ManualClock()
        self.outbox_dir = Directory(str(folder), self.disk, clock or self.clock)
        self.outbox_dir.ensure_usable()
        writer_limits = WriterLimits(**(LIMITS | limits))
        inbox = SealerInbox()
        self.writer = Writer(self.outbox_dir, writer_limits, inbox.wake)
        self.sealer = Sealer(self.outbox_dir, self.writer, inbox, clock or self.clock, 1.0, lambda: None, min_free_bytes=0)
        self.writer.start(0, 0)
        self.next_number = itertools.count().__next__
        self.next_inner = itertools.count(INNER).__next__
        self.attempted: list[int] = []
        self.accepted: list[int] = []
        self.refused: list[Outcome] = []
        self.garbage_at: list[str] = []
        self.kept: list[object] = []
        self.over = False
        self.make_room: Callable[[], object] = lambda: None
        encode = msgspec.json.Encoder().encode
        self.enqueue = self.writer.build_enqueue(
            AppendHooks(
                encode, Numbered, 1000, self._never, self._never, self._never, self._begin, self._never, power_by_default=False
            )
        )
        if not compiled:
            self.enqueue = getattr(self.enqueue, "__wrapped__", self.enqueue)

    def _never(self, *_args: object) -> Any:
        raise AssertionError

    def _begin(self, _line: bytes, _events: int) -> Outcome:
        return DROPPED["closed"]

    def put(self, number: int | None = None) -> Outcome:
        """Store an event through the hot path."""
        number = self.next_number() if number is None else number
        self.attempted.append(number)
        outcome = self.enqueue(Numbered(number))
        if outcome:
            self.accepted.append(number)
        else:
            self.refused.append(outcome)
        return outcome

    def put_inner(self) -> None:
        """Store an event as a signal handler, finalizer or log handler does."""
        self.put(self.next_inner())

    def put_many(self, count: int) -> None:
        """Store events as `enqueue_many` does."""
        numbers = [self.next_number() for _ in range(count)]
        self.attempted += numbers
        if self.writer.append(b"".join(record.line(b'{"n":%d}' % number) for number in numbers), count):
            self.accepted += numbers

    def files(self) -> dict[str, bytes]:
        """The contents of all files in the directory, by name."""
        return {name: Path(self.outbox_dir.path_of(name)).read_bytes() for name in sorted(os.listdir(self.outbox_dir.path))}

    def check_balance(self) -> None:
        """Check that the counts of the writer are those of the files."""
        contents = [data for data in self.files().values() if data]
        lines = sum(data.count(b"\n") for data in contents)
        counts = self.writer.pending_counts()
        assert counts == (sum(map(len, contents)), len(contents), lines), (
            f"the writer counts {counts}; the files are {contents}"
        )

    def check(self) -> None:
        """Check that the next appends work, the counts are right, and every accepted event is stored exactly once."""
        self.disk.error, self.disk.short, self.disk.interrupted = 0, None, None
        self.make_room()
        assert self.put() == ENQUEUED
        self.check_balance()
        self.sealer.step()
        assert self.put() == ENQUEUED
        self.check_balance()
        self.sealer.seal_remaining()
        files = self.files()
        payloads: list[int] = []
        for name, data in files.items():
            contents = reader.read_lines(data, lambda: None)
            assert (name, contents.damaged) == (name, [])
            assert data == b"" or (layout.kind_of(name) is layout.Kind.SEALED and data.endswith(b"\n"))
            payloads += [msgspec.json.decode(payload)["n"] for payload in contents.payloads]
        counts = Counter(payloads)
        assert set(self.accepted) <= set(counts) <= set(self.attempted)
        assert set(counts.values()) == {1}
        # An interrupt may lose the descriptor of a new file; the next start removes empty files.
        assert sum(not data for data in files.values()) <= 1


# Scenarios: each prepares a setup, and returns the action that is interrupted.

Scenario = Callable[[WriterSetup], Callable[[], object]]


def first_append(setup: WriterSetup) -> Callable[[], object]:
    return setup.put


def plain_append(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    return setup.put


def append_of_several_events(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    return lambda: setup.put_many(2)


def append_that_fills_the_segment(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.sealer.step()  # creates the spare
    setup.put()
    return setup.put


def append_that_uses_the_last_spare_and_continues(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.sealer.step()
    return lambda: [setup.put() for _ in range(6)]


def append_that_creates_the_next_segment(setup: WriterSetup) -> Callable[[], object]:
    setup.writer.limits = setup.writer.limits._replace(batch_bytes=80)
    setup.put()
    setup.put()
    return setup.put


def append_with_a_short_write(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.disk.short = 7
    return setup.put


def slow_append_with_a_short_write(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.disk.short = 7
    return lambda: setup.put_many(2)


def append_that_fails(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.disk.error = errno.ENOSPC
    return setup.put


def append_after_an_interrupt(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.disk.interrupted = 7
    with pytest.raises(KeyboardInterrupt):
        setup.put()
    return setup.put


def append_after_an_interrupt_behind_the_write(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.disk.interrupted = 1000
    with pytest.raises(KeyboardInterrupt):
        setup.put()
    return setup.put


def append_above_max_bytes(setup: WriterSetup) -> Callable[[], object]:
    setup.writer.start(LIMITS["max_bytes"] - 50, 1)
    setup.put()
    setup.make_room = lambda: setup.writer.release_bytes(LIMITS["max_bytes"] - 50)
    return setup.put


def rotation_by_flush(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    return lambda: (setup.writer.rotate("manual"), setup.put())


def rotation_by_flush_to_a_spare(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.sealer.step()
    return lambda: (setup.writer.rotate("manual"), setup.put())


def sealer_step_that_creates_spares(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    return setup.sealer.step


def sealer_step_that_seals_by_age(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.sealer.step()
    setup.clock.advance(10)
    return setup.sealer.step


def sealer_step_that_seals(setup: WriterSetup) -> Callable[[], object]:
    for _ in range(4):
        setup.put()
        setup.sealer.step()
    setup.writer.rotate("manual")
    return setup.sealer.step


def sealer_step_that_adds_spares_to_others(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.sealer.step()
    for count in (3, 7):
        for _ in range(count):
            setup.put()
        last = setup.writer.active_segment()
        if count == 3:
            setup.sealer.step()
    assert (last is not None and last[1], len(setup.writer._spares)) == (2, 1)  # the next append uses the last spare
    return setup.sealer.step


def delivery_of_a_batch(setup: WriterSetup) -> Callable[[], object]:
    setup.put()
    setup.writer.start(100, 1)
    setup.writer.pending_files += 1
    return lambda: setup.writer.release_bytes(100)


CALLERS: list[Scenario] = [
    first_append,
    plain_append,
    append_of_several_events,
    append_that_fills_the_segment,
    append_that_uses_the_last_spare_and_continues,
    append_that_creates_the_next_segment,
    append_with_a_short_write,
    slow_append_with_a_short_write,
    append_that_fails,
    append_after_an_interrupt,
    append_after_an_interrupt_behind_the_write,
    append_above_max_bytes,
    rotation_by_flush,
    rotation_by_flush_to_a_spare,
]
# The threads of the sealer and of the delivery worker receive no signals, but garbage may be collected in any thread.
THREADS: list[Scenario] = [
    sealer_step_that_creates_spares,
    sealer_step_that_seals_by_age,
    sealer_step_that_seals,
    sealer_step_that_adds_spares_to_others,
    delivery_of_a_batch,
]
