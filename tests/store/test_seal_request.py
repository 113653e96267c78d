"""`seal.request`, by which a command asks the writers to seal: on a real directory, after a power loss, on a failing disk."""

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
    """A writer whose sealer has run once, with room for many events in a segment."""
    setup = WriterSetup(tmp_path / "box", batch_size=1000)
    setup.sealer.step()
    return setup


def step_after_poll_interval(setup: WriterSetup) -> None:
    """Run the sealer when its next poll is due."""
    setup.clock.advance(REQUEST_POLL_S)
    setup.sealer.step()


def active_and_sealed(setup: WriterSetup) -> tuple[int, int]:
    """The numbers of non-empty active and of sealed files."""
    account = setup.outbox_dir.disk_usage()
    return account.active_files, account.sealed_files


def check(setup: WriterSetup) -> None:
    """Check all counts and files, after the request file was removed."""
    Path(setup.outbox_dir.path_of(layout.SEAL_REQUEST)).unlink()
    setup.check()


def test_a_request_seals_the_active_segment_within_a_quarter_of_a_second(setup: WriterSetup) -> None:
    """It is sealed once, with the reason "manual"."""
    setup.put()
    assert setup.sealer.step() <= REQUEST_POLL_S
    request_seal(setup.outbox_dir, setup.clock)
    step_after_poll_interval(setup)
    assert active_and_sealed(setup) == (0, 1)
    assert setup.sealer.sealed["manual"] == 1
    setup.put()
    step_after_poll_interval(setup)
    step_after_poll_interval(setup)
    assert active_and_sealed(setup) == (1, 1)
    check(setup)


def test_a_request_directly_after_another_is_handled(setup: WriterSetup) -> None:
    """Even within one tick of the clock."""
    for number in range(1, 4):
        setup.put()
        request_seal(setup.outbox_dir, setup.clock)
        step_after_poll_interval(setup)
        assert active_and_sealed(setup) == (0, number)
    assert len((Path(setup.outbox_dir.path) / layout.SEAL_REQUEST).read_bytes().splitlines()) == 1


def test_a_writer_ignores_requests_from_before_its_start(tmp_path: Path) -> None:
    """A request while there are no events does not seal the next segment early."""
    setup = WriterSetup(tmp_path / "box", batch_size=1000)
    request_seal(setup.outbox_dir, setup.clock)
    setup.sealer.step()
    setup.put()
    step_after_poll_interval(setup)
    assert active_and_sealed(setup) == (1, 0)
    request_seal(setup.outbox_dir, setup.clock)
    step_after_poll_interval(setup)
    request_seal(setup.outbox_dir, setup.clock)
    step_after_poll_interval(setup)
    setup.put()
    step_after_poll_interval(setup)
    assert active_and_sealed(setup) == (1, 1)


def test_an_idle_sealer_does_not_poll_for_requests(setup: WriterSetup) -> None:
    """An idle process is not woken more often."""
    assert setup.sealer.step() > REQUEST_POLL_S


def test_the_request_file_is_read_once_in_a_poll_interval(setup: WriterSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sealer of a busy writer runs hundreds of times a second."""
    opened: list[str] = []
    original = setup.disk.open_existing

    def open_existing(path: str) -> int:
        opened.append(path)
        return original(path)

    monkeypatch.setattr(setup.disk, "open_existing", open_existing)
    for _ in range(100):
        setup.put()
        setup.sealer.step()
        setup.clock.advance(REQUEST_POLL_S / 50)
    assert len([path for path in opened if path.endswith(layout.SEAL_REQUEST)]) <= 3


def test_a_request_during_an_append_is_handled_after_it(setup: WriterSetup) -> None:
    """The sealer tries again the next time it runs."""
    setup.put()
    request_seal(setup.outbox_dir, setup.clock)
    with setup.writer.lock:
        limit, setup.writer._limit = setup.writer._limit, -1  # as during an append
        setup.writer._append_interrupted = False
        assert not setup.writer.rotate("manual")
        setup.writer._limit = limit
    step_after_poll_interval(setup)
    assert active_and_sealed(setup) == (0, 1)
    check(setup)


@pytest.mark.parametrize("planted", ["link", "directory", "pipe", "large", "rubbish"])
def test_a_planted_request_file_does_not_affect_writers(setup: WriterSetup, planted: str) -> None:
    """It does not block, is not followed, and is read up to a limit. The command gets an error."""
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
    step_after_poll_interval(setup)
    setup.put()
    if planted in ("link", "directory", "pipe"):
        assert active_and_sealed(setup) == (1, 0)
        with pytest.raises((FileUnusableError, IsADirectoryError)):
            request_seal(setup.outbox_dir, setup.clock)
    else:
        request_seal(setup.outbox_dir, setup.clock)
        assert path.stat().st_size < 200
        step_after_poll_interval(setup)
        assert active_and_sealed(setup)[0] == 0
    if planted == "directory":
        path.rmdir()
        path.touch()
    check(setup)


class SimulatedWriterProcess:
    """A writer process on a simulated disk."""

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

    def step_after_poll_interval(self) -> None:
        self.clock.advance(REQUEST_POLL_S)
        self.sealer.step()


def count_events(disk: Disk) -> int:
    """The number of events in the files of a disk."""
    return sum(
        data.count(b"\n") for path, data in disk.files.items() if layout.kind_of(path.rpartition("/")[2]) is not Kind.OTHER
    )


def test_the_next_request_is_handled_in_every_state_after_a_power_loss() -> None:
    """The request file may be torn, filled with NUL bytes, old or missing. Batches are kept, and the next request seals."""
    disk, clock = Disk(), ManualClock()
    first = SimulatedWriterProcess(CrashFilesystem(disk), clock)
    model, applied = DurabilityModel(), 0
    for sealed in range(1, 4):
        first.writer.append(LINE, 1)
        request_seal(first.outbox_dir, clock)
        first.step_after_poll_interval()
        for op in disk.trace[applied:]:
            model.apply(op)
        applied = len(disk.trace)
        for state in model.states(tears=(1, -1)):
            disk_after = Disk(state)
            second = SimulatedWriterProcess(CrashFilesystem(disk_after), ManualClock())
            assert count_events(disk_after) == sealed
            second.writer.append(LINE, 1)
            request_seal(second.outbox_dir, second.clock)
            second.step_after_poll_interval()
            assert (count_events(disk_after), second.writer.active_segment()) == (sealed + 1, None)


@pytest.mark.parametrize("verb", ["open_existing", "read_at"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
def test_an_unreadable_request_file_does_not_prevent_sealing(tmp_path: Path, verb: str, code: int) -> None:
    """Segments are still sealed by age. The request is handled once the file is readable."""
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
    assert outbox_dir.disk_usage().sealed_files == 2  # the earlier request, which could not be read


@pytest.mark.parametrize("verb", ["open_lock_file", "overwrite"])
def test_a_command_that_cannot_write_its_request_gets_the_error(tmp_path: Path, verb: str) -> None:
    """It leaves no descriptor open."""
    real = OsFilesystem()
    outbox_dir = Directory(
        str(tmp_path / "box"), FaultFilesystem(real, Fault(verb, 1, errno.ENOSPC, permanent=True)), ManualClock()
    )
    outbox_dir.ensure_usable()
    with pytest.raises(OSError, match="No space"):
        request_seal(outbox_dir, ManualClock())
    assert real._open_fds == set()
