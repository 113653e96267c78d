"""`seal.request`: how a command reaches the writers, on a real directory, after a power loss, and on a failing disk."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import Filesystem
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.recovery import recover
from pillarbox.store.sealer import REQUEST_POLL_S, Sealer, SealerInbox, request_seal
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock
from pillarbox.testing.crash import CrashFilesystem, Disk
from pillarbox.testing.durability_model import DurabilityModel
from pillarbox.testing.fault import Fault, FaultFilesystem
from tests.store.writer_scenarios import WriterSetup

LINE = b'{"event":{"n":1}}\n'
OUTBOX_PATH = "/outbox"


@pytest.fixture
def setup(tmp_path: Path) -> WriterSetup:
    """A writer whose sealer has had its first round, with room for many events in a file."""
    made = WriterSetup(tmp_path / "box", batch_size=1000)
    made.sealer.step()
    return made


def later(setup: WriterSetup) -> None:
    """The next time that the sealer looks."""
    setup.clock.advance(REQUEST_POLL_S)
    setup.sealer.step()


def active_and_sealed(setup: WriterSetup) -> tuple[int, int]:
    """How many files of these kinds hold something."""
    account = setup.outbox_dir.disk_usage()
    return account.active_files, account.sealed_files


def check(setup: WriterSetup) -> None:
    """Every event is where it belongs."""
    Path(setup.outbox_dir.path_of(layout.SEAL_REQUEST)).unlink()
    setup.check()


def test_a_request_seals_the_active_segment_within_a_quarter_of_a_second(setup: WriterSetup) -> None:
    """Once, with the reason "manual"."""
    setup.put()
    assert setup.sealer.step() <= REQUEST_POLL_S
    request_seal(setup.outbox_dir, setup.clock)
    later(setup)
    assert active_and_sealed(setup) == (0, 1)
    assert setup.sealer.sealed["manual"] == 1
    setup.put()
    later(setup)
    later(setup)
    assert active_and_sealed(setup) == (1, 1)
    check(setup)


def test_a_request_directly_after_another_one_counts(setup: WriterSetup) -> None:
    """Within one tick of the clock too."""
    for number in range(1, 4):
        setup.put()
        request_seal(setup.outbox_dir, setup.clock)
        later(setup)
        assert active_and_sealed(setup) == (0, number)
    assert len((Path(setup.outbox_dir.path) / layout.SEAL_REQUEST).read_bytes().splitlines()) == 1


def test_a_writer_ignores_requests_from_before_its_start(tmp_path: Path) -> None:
    """And a request during an idle time does not seal the next segment early."""
    setup = WriterSetup(tmp_path / "box", batch_size=1000)
    request_seal(setup.outbox_dir, setup.clock)
    setup.sealer.step()
    setup.put()
    later(setup)
    assert active_and_sealed(setup) == (1, 0)
    request_seal(setup.outbox_dir, setup.clock)
    later(setup)
    request_seal(setup.outbox_dir, setup.clock)
    later(setup)
    setup.put()
    later(setup)
    assert active_and_sealed(setup) == (1, 1)


def test_an_idle_sealer_does_not_poll_for_requests(setup: WriterSetup) -> None:
    """An idle process sleeps as long as before."""
    assert setup.sealer.step() > REQUEST_POLL_S


def test_rounds_in_close_succession_read_the_file_once(setup: WriterSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy writer has hundreds of rounds a second."""
    opened: list[str] = []
    real = setup.disk.open_existing

    def open_existing(path: str) -> int:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(setup.disk, "open_existing", open_existing)
    for _ in range(100):
        setup.put()
        setup.sealer.step()
        setup.clock.advance(REQUEST_POLL_S / 50)
    assert len([path for path in opened if path.endswith(layout.SEAL_REQUEST)]) <= 3


def test_a_request_during_an_append_is_handled_after_it(setup: WriterSetup) -> None:
    """The sealer tries again in its next round."""
    setup.put()
    request_seal(setup.outbox_dir, setup.clock)
    with setup.writer.lock:
        limit, setup.writer._limit = setup.writer._limit, -1  # as an append that is under way leaves it
        setup.writer._append_interrupted = False
        assert not setup.writer.rotate("manual")
        setup.writer._limit = limit
    later(setup)
    assert active_and_sealed(setup) == (0, 1)
    check(setup)


@pytest.mark.parametrize("planted", ["link", "directory", "pipe", "large", "rubbish"])
def test_a_planted_request_file_harms_no_writer(setup: WriterSetup, planted: str) -> None:
    """It neither blocks, nor is followed, nor is read without a bound; the command gets an error."""
    path = Path(setup.outbox_dir.path_of(layout.SEAL_REQUEST))
    setup.put()
    if planted == "link":
        path.symlink_to("/dev/zero")
    elif planted == "directory":
        path.mkdir()
    elif planted == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"x" * 10_000_000 if planted == "large" else b"\0\xff{")
    later(setup)
    setup.put()
    if planted in ("link", "directory", "pipe"):
        assert active_and_sealed(setup) == (1, 0)
        with pytest.raises((FileUnusableError, IsADirectoryError)):
            request_seal(setup.outbox_dir, setup.clock)
    else:
        request_seal(setup.outbox_dir, setup.clock)
        assert path.stat().st_size < 200
        later(setup)
        assert active_and_sealed(setup)[0] == 0
    if planted == "directory":
        path.rmdir()
        path.touch()
    check(setup)


class Process:
    """A process that writes, on a disk of the test's."""

    def __init__(self, disk: Filesystem, clock: ManualClock) -> None:
        numbers = itertools.count()
        self.clock = clock
        self.outbox_dir = Directory(OUTBOX_PATH, disk, clock, lambda: f"{id(self)}-{next(numbers)}")
        self.outbox_dir.ensure_usable()
        recover(self.outbox_dir)
        inbox = SealerInbox()
        self.writer = Writer(self.outbox_dir, WriterLimits(1000, 10**6, 2**20), inbox.wake)
        self.sealer = Sealer(self.outbox_dir, self.writer, inbox, clock, 60.0, lambda: None, min_free_bytes=0)
        self.writer.start(0, 0)
        self.sealer.step()

    def later(self) -> None:
        self.clock.advance(REQUEST_POLL_S)
        self.sealer.step()


def held(disk: Disk) -> int:
    """How many events are on a disk, in files that mean something."""
    return sum(
        data.count(b"\n") for path, data in disk.files.items() if layout.kind_of(path.rpartition("/")[2]) is not Kind.OTHER
    )


def test_whatever_a_power_loss_leaves_of_a_request_the_next_one_is_handled() -> None:
    """Torn, of NUL bytes, old, or missing: sealed batches are kept, and a segment is sealed on request."""
    disk, clock = Disk(), ManualClock()
    first = Process(CrashFilesystem(disk), clock)
    survivors, looked = DurabilityModel(), 0
    for sealed in range(1, 4):
        first.writer.append(LINE, 1)
        request_seal(first.outbox_dir, clock)
        first.later()
        for op in disk.trace[looked:]:
            survivors.apply(op)
        looked = len(disk.trace)
        for state in survivors.states(tears=(1, -1)):
            left = Disk(state)
            again = Process(CrashFilesystem(left), ManualClock())
            assert held(left) == sealed
            again.writer.append(LINE, 1)
            request_seal(again.outbox_dir, again.clock)
            again.later()
            assert (held(left), again.writer.active_segment()) == (sealed + 1, None)


@pytest.mark.parametrize("verb", ["open_existing", "read_at"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
def test_an_unreadable_request_file_does_not_prevent_sealing(tmp_path: Path, verb: str, code: int) -> None:
    """Segments are sealed by age as before, and nothing is logged."""
    clock = ManualClock()
    disk = FaultFilesystem(OsFilesystem())
    outbox_dir = Directory(str(tmp_path / "box"), disk, clock)
    outbox_dir.ensure_usable()
    inbox = SealerInbox()
    writer = Writer(outbox_dir, WriterLimits(1000, 10**6, 2**20), inbox.wake)
    sealer = Sealer(outbox_dir, writer, inbox, clock, 1.0, lambda: None, min_free_bytes=0)
    writer.start(0, 0)
    sealer.step()
    writer.append(LINE, 1)
    request_seal(outbox_dir, clock)
    disk.counter.faults = (Fault(verb, 1, code, permanent=True),)
    disk.counter.counts[verb] = 0
    clock.advance(REQUEST_POLL_S)
    sealer.step()
    assert writer.active_segment() is not None
    clock.advance(2.0)
    sealer.step()
    assert outbox_dir.disk_usage().sealed_files == 1
    writer.append(LINE, 1)
    disk.counter.clear_faults()
    clock.advance(REQUEST_POLL_S)
    sealer.step()
    assert outbox_dir.disk_usage().sealed_files == 2  # the request of before, which it could not see


@pytest.mark.parametrize("verb", ["open_lock_file", "overwrite"])
def test_a_command_that_cannot_write_its_request_gets_the_error(tmp_path: Path, verb: str) -> None:
    """No descriptor stays open."""
    real = OsFilesystem()
    outbox_dir = Directory(
        str(tmp_path / "box"), FaultFilesystem(real, Fault(verb, 1, errno.ENOSPC, permanent=True)), ManualClock()
    )
    outbox_dir.ensure_usable()
    with pytest.raises(OSError, match="No space"):
        request_seal(outbox_dir, ManualClock())
    assert real._open_fds == set()
