"""A fixed part of the comparison of the durability model with the kernel, and planted differences, which must be found."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import pytest

from pillarbox.testing import durability_model
from pillarbox.testing.crash import Op
from tests.crash import block_device
from tests.crash.simulation import OUTBOX_PATH

SECONDS = 13.0
CUTS_MIN = 50


@pytest.fixture(autouse=True)
def machine(caplog: pytest.LogCaptureFixture) -> None:
    """Skip without the devices and commands that the tests need, and reduce the log of the store."""
    block_device.need(devices=("/dev/loop-control",), commands=("mkfs.ext4", "mkfs.xfs", "losetup", "mount"))
    caplog.set_level(logging.CRITICAL, logger="pillarbox")


@pytest.mark.parametrize("filesystem", block_device.MAKERS)
def test_every_state_after_a_cut_is_admitted_by_the_model_and_loses_no_promised_event(filesystem: str, tmp_path: Path) -> None:
    """The power is cut after any operation of histories of the real code, and of random operations."""
    report = block_device.run(filesystem, SECONDS, 20262, tmp_path, cuts_min=CUTS_MIN)
    print(report)  # noqa: T201 - shown if the test fails
    assert report.cuts >= CUTS_MIN
    assert 0 < report.raw < report.cuts
    assert report.lost_something > report.cuts // 10


def test_a_sync_that_does_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The syncs of the trace are not done on the real file system."""
    do = block_device.TraceReplay.do
    monkeypatch.setattr(
        block_device.TraceReplay, "do", lambda replay, op: None if op.verb.startswith("sync") else do(replay, op)
    )
    with pytest.raises(block_device.BlockDeviceViolation, match="does not admit"):
        block_device.run("ext4", SECONDS, 1, tmp_path, cuts_min=CUTS_MIN)


def test_a_model_that_does_not_know_of_nul_bytes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ext4 writes a file's new size ahead of its data."""
    after = durability_model._contents_after

    def without(*arguments: object) -> tuple[set[bytes], set[bytes]]:
        made, torn = after(*arguments)  # type: ignore[arg-type]
        return {one for one in made if b"\0" not in one}, {one for one in torn if b"\0" not in one}

    monkeypatch.setattr(durability_model, "_contents_after", without)
    with pytest.raises(block_device.BlockDeviceViolation, match="does not admit"):
        block_device.run("ext4", SECONDS, 2, tmp_path, cuts_min=CUTS_MIN)


@pytest.mark.parametrize("filesystem", block_device.MAKERS)
def test_a_truncation_may_leave_nul_bytes_under_the_old_size(filesystem: str, tmp_path: Path) -> None:
    """The kernel clears the rest of the page. If the page is written back without the journal, the old size has NUL bytes."""
    path = f"{OUTBOX_PATH}/a"
    trace = [Op("found", path, 1, data=b"x" * 100), Op("truncate", path, 1, 40)]
    with block_device.LoopDevice(filesystem, tmp_path) as medium:
        file = medium.folder / "a"
        file.write_bytes(b"x" * 100)
        medium.write_back()
        fd = os.open(file, os.O_RDWR)
        os.ftruncate(fd, 40)
        medium.write_back_data(fd)
        medium.shut_down(flush_log=False)
        os.close(fd)
        medium.remount()
        assert file.read_bytes() == b"x" * 40 + bytes(60)
    assert durability_model.DurabilityModel(trace).admits({path: b"x" * 40 + bytes(60)})


def test_a_missing_requirement_skips_a_test_and_fails_it_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names what is missing."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"needs /dev/missing, mkfs\.missing"):
        block_device.need(devices=("/dev/missing",), commands=("mkfs.missing",))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must have /dev/missing"):
        block_device.need(devices=("/dev/missing",))


def test_a_replay_that_diverges_from_its_trace_is_found(tmp_path: Path) -> None:
    """Otherwise the state would be compared with that of another history."""
    with block_device.LoopDevice("ext4", tmp_path) as medium:
        root = medium.folder / "root"
        root.mkdir()
        replay = block_device.TraceReplay(medium, root, random.Random(1))
        replay.do(Op("create", f"{OUTBOX_PATH}/a", 1))
        with pytest.raises(block_device.BlockDeviceViolation, match="diverges"):
            replay.do(Op("write", f"{OUTBOX_PATH}/a", 1, 7, b"x"))
        replay.close()
