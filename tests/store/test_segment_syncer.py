"""Several segments that are made durable in one call, on a real directory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pillarbox.store import reader
from pillarbox.store.directory import Directory, LockedFile
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.record import line
from pillarbox.store.segment import Segment, SegmentSyncer
from pillarbox.testing import ManualClock


class Failing(OsFilesystem):
    """Fails the sync of some files, for good, and counts those of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.failing: set[int] = set()
        self.synced: list[int] = []

    def sync_data(self, fd: int) -> None:
        if fd in self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.synced.append(fd)


class Desk:
    """Some files of a writer, each with two lines, and what is asked of that when one is given up."""

    def __init__(self, path: Path, count: int) -> None:
        self.filesystem = Failing()
        self.outbox_dir = Directory(str(path), self.filesystem, ManualClock())
        self.outbox_dir.ensure_usable()
        self.given_up: list[Segment] = []
        taken, _ = self.outbox_dir.create_each([f"active-w-{number}.ndjson" for number in range(count)])
        self.files = [Segment(one) for one in taken]
        for number, file in enumerate(self.files):
            data = b"".join(line(b'{"n":%d}' % (10 * number + at)) for at in range(2))
            file.bytes, file.events = os.write(file.fd, data), 2
        self.syncs = SegmentSyncer(self.outbox_dir, lambda: file.sync_lock, lambda file, _error: self.given_up.append(file))

    def payloads(self, file: Segment) -> list[bytes]:
        return reader.read_lines(self.filesystem.read_all(file.fd), lambda: None).payloads


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_only_the_segment_whose_sync_failed_is_rewritten(tmp_path: Path, failing: int) -> None:
    """Whichever of several it is."""
    desk = Desk(tmp_path / "outbox", 3)
    before = [file.fd for file in desk.files]
    identities = [os.stat(desk.outbox_dir.path_of(file.locked_file.name)).st_ino for file in desk.files]
    desk.filesystem.failing = {before[failing]}
    (trouble,) = desk.syncs.sync_for_seal(desk.files, lambda _: ())
    assert desk.files[failing].locked_file.name in trouble
    assert desk.given_up == [desk.files[failing]]
    for number, file in enumerate(desk.files):
        assert (os.stat(desk.outbox_dir.path_of(file.locked_file.name)).st_ino == identities[number]) == (number != failing)
        assert desk.payloads(file) == [b'{"n":%d}' % (10 * number + at) for at in range(2)]
        assert (file.synced_bytes, file.is_sealed) == (file.bytes, True)


def test_a_segment_with_leftover_bytes_is_rewritten_without_them(tmp_path: Path) -> None:
    """Otherwise dropped events would be sealed with the accepted ones."""
    desk = Desk(tmp_path / "outbox", 3)
    os.write(desk.files[1].fd, line(b'{"n":"refused"}'))
    desk.files[1].has_leftover = True
    others = [desk.files[0].fd, desk.files[2].fd]
    assert len(desk.syncs.sync_for_seal(desk.files, lambda _: ())) == 1
    assert desk.filesystem.synced[:2] == others
    assert desk.payloads(desk.files[1]) == [b'{"n":10}', b'{"n":11}']
    assert not desk.files[1].has_leftover


def test_where_rewriting_fails_too_a_message_says_so_and_the_others_are_synced(tmp_path: Path) -> None:
    """The segment is sealed with what can be read."""
    desk = Desk(tmp_path / "outbox", 3)
    desk.filesystem.failing = {desk.files[0].fd, *range(desk.files[2].fd + 1, desk.files[2].fd + 20)}  # and new files
    (trouble,) = desk.syncs.sync_for_seal(desk.files, lambda _: ())
    assert "rewriting failed too" in trouble
    assert [file.synced_bytes == file.bytes for file in desk.files] == [False, True, True]
    assert all(file.is_sealed for file in desk.files)


def test_durable_segments_are_not_synced_again(tmp_path: Path) -> None:
    """Nor are sealed ones."""
    desk = Desk(tmp_path / "outbox", 2)
    assert desk.syncs.sync(desk.files[0], lambda _: ()) == ""
    assert desk.syncs.sync_for_seal(desk.files, lambda _: ()) == []
    assert desk.syncs.sync_for_seal(desk.files, lambda _: ()) == []
    assert desk.filesystem.synced == [file.fd for file in desk.files]


def test_where_a_deleted_segment_cannot_be_recreated_the_others_are_sealed_once(tmp_path: Path) -> None:
    """Those before it have been renamed: taken for deleted as well, they would be there twice."""
    desk = Desk(tmp_path / "outbox", 3)
    os.unlink(desk.outbox_dir.path_of(desk.files[1].locked_file.name))
    told: list[LockedFile] = []

    def full(name: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    put = desk.outbox_dir.write_atomically
    desk.outbox_dir.write_atomically = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="full"):
        desk.outbox_dir.seal([file.locked_file for file in desk.files], lambda files, _names: told.extend(files))
    desk.outbox_dir.write_atomically = put  # type: ignore[method-assign]
    assert told == [desk.files[0].locked_file]
    desk.outbox_dir.seal([file.locked_file for file in desk.files[1:]], lambda files, _names: told.extend(files))
    assert told == [file.locked_file for file in desk.files]
    assert len(desk.outbox_dir.batch_names()) == 3


def test_a_failed_close_keeps_no_other_file_open(tmp_path: Path) -> None:
    """The error is ignored: the descriptor is closed."""
    desk = Desk(tmp_path / "outbox", 3)
    fds = [file.fd for file in desk.files]
    os.close(fds[1])
    desk.filesystem.close_each(fds)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
