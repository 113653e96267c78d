"""Syncing several segments in one call, on a real directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from pillarbox.store import reader
from pillarbox.store.directory import Directory, LockedFile
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.record import line
from pillarbox.store.segment import Segment, SegmentSyncer
from pillarbox.testing import ManualClock


class FailingSyncFilesystem(OsFilesystem):
    """Fails every sync of some files, and records the syncs of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.failing: set[int] = set()
        self.synced: list[int] = []

    def sync_data(self, fd: int) -> None:
        if fd in self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.synced.append(fd)


class SyncerSetup:
    """Segments with two lines each, their syncer, and the segments to which it stopped the appends."""

    def __init__(self, path: Path, count: int) -> None:
        self.filesystem = FailingSyncFilesystem()
        self.outbox_dir = Directory(str(path), self.filesystem, ManualClock())
        self.outbox_dir.ensure_usable()
        self.stopped: list[Segment] = []
        locked_files, _ = self.outbox_dir.create_each([f"active-w-{number}.ndjson" for number in range(count)])
        self.files = [Segment(locked_file) for locked_file in locked_files]
        for number, file in enumerate(self.files):
            data = b"".join(line(b'{"n":%d}' % (10 * number + at)) for at in range(2))
            file.bytes, file.events = os.write(file.fd, data), 2
        self.syncer = SegmentSyncer(self.outbox_dir, lambda: file.sync_lock, lambda file, _error: self.stopped.append(file))

    def payloads(self, file: Segment) -> list[bytes]:
        return reader.read_lines(self.filesystem.read_all(file.fd), lambda: None).payloads


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_only_the_segment_whose_sync_failed_is_rewritten(tmp_path: Path, failing: int) -> None:
    """The others are only synced."""
    setup = SyncerSetup(tmp_path / "outbox", 3)
    fds = [file.fd for file in setup.files]
    inodes = [os.stat(setup.outbox_dir.path_of(file.locked_file.name)).st_ino for file in setup.files]
    setup.filesystem.failing = {fds[failing]}
    (message,) = setup.syncer.sync_for_seal(setup.files, lambda _: ())
    assert setup.files[failing].locked_file.name in message
    assert setup.stopped == [setup.files[failing]]
    for number, file in enumerate(setup.files):
        assert (os.stat(setup.outbox_dir.path_of(file.locked_file.name)).st_ino == inodes[number]) == (number != failing)
        assert setup.payloads(file) == [b'{"n":%d}' % (10 * number + at) for at in range(2)]
        assert (file.synced_bytes, file.is_sealed) == (file.bytes, True)


def test_a_segment_with_leftover_bytes_is_rewritten_without_them(tmp_path: Path) -> None:
    """Otherwise dropped events would be sealed with the accepted ones."""
    setup = SyncerSetup(tmp_path / "outbox", 3)
    os.write(setup.files[1].fd, line(b'{"n":"dropped"}'))
    setup.files[1].has_leftover = True
    other_fds = [setup.files[0].fd, setup.files[2].fd]
    assert len(setup.syncer.sync_for_seal(setup.files, lambda _: ())) == 1
    assert setup.filesystem.synced[:2] == other_fds
    assert setup.payloads(setup.files[1]) == [b'{"n":10}', b'{"n":11}']
    assert not setup.files[1].has_leftover


def test_if_rewriting_fails_too_the_message_says_so_and_the_others_are_synced(tmp_path: Path) -> None:
    """The segment is sealed with the lines that can be read."""
    setup = SyncerSetup(tmp_path / "outbox", 3)
    setup.filesystem.failing = {setup.files[0].fd, *range(setup.files[2].fd + 1, setup.files[2].fd + 20)}  # and new files
    (message,) = setup.syncer.sync_for_seal(setup.files, lambda _: ())
    assert "rewriting failed too" in message
    assert [file.synced_bytes == file.bytes for file in setup.files] == [False, True, True]
    assert all(file.is_sealed for file in setup.files)


def test_durable_segments_are_not_synced_again(tmp_path: Path) -> None:
    """Sealed segments are not synced again either."""
    setup = SyncerSetup(tmp_path / "outbox", 2)
    assert setup.syncer.sync(setup.files[0], lambda _: ()) == ""
    assert setup.syncer.sync_for_seal(setup.files, lambda _: ()) == []
    assert setup.syncer.sync_for_seal(setup.files, lambda _: ()) == []
    assert setup.filesystem.synced == [file.fd for file in setup.files]


def test_if_a_deleted_segment_cannot_be_recreated_the_others_are_sealed_once(tmp_path: Path) -> None:
    """The segments before it are renamed already. If they counted as deleted too, they would be recreated and exist twice."""
    setup = SyncerSetup(tmp_path / "outbox", 3)
    os.unlink(setup.outbox_dir.path_of(setup.files[1].locked_file.name))
    reported: list[LockedFile] = []

    def fail(name: str, data: bytes | Iterable[bytes]) -> None:
        raise OSError(errno.ENOSPC, "full")

    write_atomically = setup.outbox_dir.write_atomically
    setup.outbox_dir.write_atomically = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="full"):
        setup.outbox_dir.seal([file.locked_file for file in setup.files], lambda files, _names: reported.extend(files))
    setup.outbox_dir.write_atomically = write_atomically  # type: ignore[method-assign]
    assert reported == [setup.files[0].locked_file]
    setup.outbox_dir.seal([file.locked_file for file in setup.files[1:]], lambda files, _names: reported.extend(files))
    assert reported == [file.locked_file for file in setup.files]
    assert len(setup.outbox_dir.batch_names()) == 3


def test_a_failed_close_does_not_prevent_closing_other_files(tmp_path: Path) -> None:
    """The error is ignored, because the descriptor is closed anyway."""
    setup = SyncerSetup(tmp_path / "outbox", 3)
    fds = [file.fd for file in setup.files]
    os.close(fds[1])
    setup.filesystem.close_each(fds)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
