"""`pillarbox doctor`, run as a user runs it, and its probes on file systems that break their promises."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import pytest

from pillarbox.admin.doctor import DoctorFinding, DoctorLimits, run_checks
from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import Lease
from pillarbox.stats import State
from pillarbox.store import layout, sealer
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import DirectoryInfo, Filesystem
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.testing import ManualClock
from pillarbox.testing.fault import Fault, FaultFilesystem
from tests.cli.test_commands import CLEAN, PILLARBOX, event_line, run
from tests.conftest import create_unusable_file
from tests.crash.block_device import mounted, need

LIMITS = DoctorLimits(power=False, max_bytes=10**9, max_files=1000, min_free_bytes=0, evicts=False)
LINE = b"a line\n"
Findings = dict[str, list[tuple[bool, str]]]
# Runs the command with a fixed clock, so that its start-up time does not matter.
WITH_FIXED_CLOCK = """
import sys
from pillarbox.cli import doctor
from pillarbox.cli.main import run
now = int(sys.argv.pop(1))
doctor.SystemClock.micros = lambda _: now
run()
"""


def by_check(findings: Iterable[DoctorFinding]) -> Findings:
    """The (ok, text) pairs of the findings, by the name of the check."""
    findings_by_check: Findings = {}
    for ok, check, text, _ in findings:
        findings_by_check.setdefault(check, []).append((ok, text))
    return findings_by_check


def doctor(
    *arguments: object, cwd: Path, environ: dict[str, str] | None = None, now_micros: int | None = None
) -> tuple[int, Findings]:
    """Run `pillarbox doctor`; return its exit code and its findings."""
    command = PILLARBOX if now_micros is None else [PILLARBOX[0], "-c", WITH_FIXED_CLOCK, str(now_micros)]
    completed = subprocess.run(
        [*command, "doctor", *map(str, arguments), "--json"],
        cwd=cwd, env=CLEAN | (environ or {}), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert completed.stderr == b""
    return completed.returncode, by_check(DoctorFinding(**finding) for finding in json.loads(completed.stdout))


def failed_checks(findings: Findings) -> set[str]:
    """The names of the checks with a finding that is not ok."""
    return {check for check, lines in findings.items() for ok, _ in lines if not ok}


def check_directory(
    path: Path, disk: Filesystem | None = None, limits: DoctorLimits = LIMITS, clock: ManualClock | None = None
) -> Findings:
    """Run the checks on a directory, with a file system and a clock of the test."""
    used_clock = clock or ManualClock()
    numbers = itertools.count()
    return by_check(
        run_checks(Directory(str(path), disk or OsFilesystem(), used_clock, lambda: f"{next(numbers)}"), used_clock, limits)
    )


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """An empty outbox directory."""
    (tmp_path / "box").mkdir(mode=0o700)
    return tmp_path / "box"


def test_a_healthy_directory_passes_all_checks_and_is_not_changed(tmp_path: Path) -> None:
    """The exit code is 0, existing files are untouched, and no probe file is left."""
    run("enqueue", "-d", "box", cwd=tmp_path, stdin=b"".join(map(event_line, range(700))))
    (tmp_path / "box" / "active.ndjson").write_bytes(b"")
    (tmp_path / "box" / "active-dead-1.ndjson").write_bytes(b"torn")
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in (tmp_path / "box").iterdir()}
    newest = max(filter(None, map(layout.sealed_at, before)))
    code, findings = doctor("-d", "box", cwd=tmp_path, now_micros=newest)
    assert (code, failed_checks(findings)) == (0, set())
    assert {file.name: (file.stat().st_ino, file.read_bytes()) for file in (tmp_path / "box").iterdir()} == before
    for check in (
        "create",
        "append",
        "lock",
        "rename",
        "fsync",
        "directory fsync",
        "hard link",
        "delete",
        "free space",
        "clock",
    ):
        assert check in findings
    assert re.search(r"takes [\d.]+ ms \(median of \d+\)", findings["fsync"][0][1])


def test_the_text_output_has_a_line_for_each_finding(box: Path) -> None:
    """Each starts with ok or BAD, and a bad one says what to do."""
    box.chmod(0o755)
    completed = run("doctor", "-d", "box", "--durability", "process", cwd=box.parent)
    assert completed.returncode == 1
    lines = completed.stdout.decode().splitlines()
    assert lines[0] == 'box, durability "process"'
    assert "  BAD  mode: 755 gives other users access to the events: run chmod 700 box" in lines
    assert "  ok   lock: flock grants a lock once, and releases it when the file is closed" in lines
    assert all(line.startswith(("  ok   ", "  BAD  ")) for line in lines[1:])


def test_a_missing_directory_is_not_created(tmp_path: Path) -> None:
    """The finding names mkdir. A file with the name of the directory is not touched."""
    (tmp_path / "file").write_text("mine")
    assert "mkdir" in doctor("-d", "box", cwd=tmp_path)[1]["directory"][0][1]
    code, findings = doctor("-d", "file", cwd=tmp_path)
    assert (code, failed_checks(findings)) == (1, {"directory"})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_doctor_without_a_directory_is_a_usage_error(tmp_path: Path) -> None:
    """The exit code is 2, unless the environment names the directory."""
    assert run("doctor", cwd=tmp_path).returncode == 2
    assert run("doctor", "-d", "box", "--durability", "for ever", cwd=tmp_path).returncode == 2
    assert doctor(cwd=tmp_path, environ={"PILLARBOX_DIRECTORY": "box"})[0] == 1


def test_on_tmpfs_durability_power_fails_and_process_passes(tmp_path: Path) -> None:
    """A tmpfs is mounted for this test."""
    need(commands=("mount", "umount"))
    with mounted(tmp_path / "memory", "-t", "tmpfs", "-o", "mode=700,size=10m", "none") as outbox_dir:
        assert doctor("-d", outbox_dir, "--durability", "process", "-c", "p.toml", cwd=settings_file(tmp_path))[0] == 0
        code, findings = doctor("-d", outbox_dir, "--durability", "power", cwd=tmp_path)
        assert (code, failed_checks(findings)) == (1, {"filesystem"})
        assert "tmpfs" in findings["filesystem"][0][1]
        assert list(outbox_dir.iterdir()) == []


def settings_file(folder: Path) -> Path:
    (folder / "p.toml").write_text("[outbox]\nmin_free_bytes = 0\n")
    return folder


def test_a_full_volume_is_reported_with_a_remedy(tmp_path: Path) -> None:
    """The probe file cannot be written, and none is left."""
    need(commands=("mount", "umount"))
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "mode=700,size=64k", "none") as outbox_dir:
        with open(outbox_dir / "filler", "wb", buffering=0) as filler:
            while filler.write(b"x" * 4096) == 4096 and filler.tell() < 64 * 1024:
                pass
        _, findings = doctor("-d", outbox_dir, cwd=tmp_path)
        assert "append" in failed_checks(findings)
        assert "free space on the volume" in findings["append"][0][1]
        assert [file.name for file in outbox_dir.iterdir()] == ["filler"]


def test_a_read_only_file_system_is_reported(tmp_path: Path) -> None:
    """Even root cannot write to it."""
    need(commands=("mount", "umount"))
    with mounted(tmp_path / "fixed", "-t", "tmpfs", "-o", "ro,mode=700", "none") as outbox_dir:
        code, findings = doctor("-d", outbox_dir, cwd=tmp_path)
        assert (code, failed_checks(findings)) == (1, {"directory"})


def test_unusable_files_with_names_of_the_store_are_reported(box: Path) -> None:
    """Symbolic links, second hard links, pipes and directories. Files with other names are ignored."""
    outside = box.parent / "outside"
    outside.write_bytes(b"mine")
    (box / "active-x-1.ndjson").symlink_to(outside)
    (box / "sealed-1.ndjson").symlink_to("nowhere")
    (box / "deliver.lock").symlink_to(outside)
    (box / "dead-x.ndjson").mkdir()
    os.mkfifo(box / "active.ndjson")
    create_unusable_file("hardlink", box / "dead-y.ndjson", outside)
    (box / "holiday.jpg").symlink_to(outside)
    code, findings = doctor("-d", box, cwd=box.parent)
    assert (code, failed_checks(findings)) == (1, {"mode", "files"})
    texts = sorted(text.removeprefix(f"{box}/").partition(",")[0] for _, text in findings["files"])
    assert texts == [
        "active-x-1.ndjson is a symbolic link",
        "active.ndjson is not a regular file",
        "dead-x.ndjson is a directory",
        "dead-y.ndjson has a second hard link",
        "deliver.lock is a symbolic link",
        "sealed-1.ndjson is a symbolic link",
    ]
    assert outside.read_bytes() == b"mine"


def test_no_advice_deletes_a_regular_file_of_the_store(box: Path) -> None:
    """It may contain accepted events. The command for a second hard link keeps them, and can be pasted into a shell."""
    batch = box / "sealed-0000000000000001-u; echo.ndjson"
    batch.write_bytes(LINE)
    box.chmod(0o770)  # somebody else may have made the links
    (box / "notes").hardlink_to(batch)
    segment = box / "active-w-1.ndjson"
    segment.write_bytes(LINE)
    (box / "copy").hardlink_to(segment)
    texts = [text for _, text in check_directory(box)["files"]]
    assert len(texts) == 2
    assert not re.search(r"\b(remove|delete|rm|unlink)\b", " ".join(texts))
    (of_segment,) = (text for text in texts if text.startswith(str(segment)))
    assert "stop the application that writes it, then " in of_segment
    for text in texts:
        subprocess.run(["sh", "-euc", text.partition("a file of its own: ")[2]], check=True, timeout=60)
    assert check_directory(box)["files"] == [(True, "the store can use every file that has one of its names")]
    assert (batch.read_bytes(), segment.read_bytes()) == (LINE, LINE)


STORE_NAMES = ("active-w-1.ndjson", "active.ndjson", "sealed-0000000000000001-a b.ndjson", "dead-x.ndjson", "corrupt-x.ndjson")


def give_away(path: Path) -> None:
    os.chown(path, 12345, 12345)


def link_elsewhere(path: Path) -> None:
    (path.parent.parent / f"elsewhere-{path.name}").hardlink_to(path)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", STORE_NAMES)
@pytest.mark.parametrize("spoil", [give_away, link_elsewhere, replace_by_fifo, replace_by_link])
def test_advice_for_a_file_of_the_store_never_loses_it(box: Path, name: str, spoil: Callable[[Path], None]) -> None:
    """Whatever is wrong with it; a command in the advice makes the store use the file again, with the same content."""
    file = box / name
    file.write_bytes(LINE)
    box.chmod(0o777 if spoil is link_elsewhere else 0o700)  # a second link is a snapshot's where nobody else could have made it
    spoil(file)
    ((ok, text),) = check_directory(box)["files"]
    assert not ok
    assert not re.search(r"\b(remove|delete|rm|unlink|truncate)\b", text)
    command = text.rpartition(": ")[2]
    if spoil in (replace_by_fifo, replace_by_link):
        assert command == "move it to another directory"  # it is no file of the store
        return
    subprocess.run(["sh", "-euc", command], check=True, timeout=60)
    assert check_directory(box)["files"] == [(True, "the store can use every file that has one of its names")]
    assert file.read_bytes() == LINE


def test_of_many_unusable_files_the_first_are_named_and_the_others_counted(box: Path) -> None:
    """The output is bounded."""
    for number in range(50):
        (box / f"sealed-{number}.ndjson").symlink_to("nowhere")
    assert len(check_directory(box)["files"]) == 21
    assert check_directory(box)["files"][-1] == (False, "and 30 more")


def test_files_and_directories_of_another_user_are_reported(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of the directory may delete the files in it."""
    (box / "active-x-1.ndjson").write_bytes(b"")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    findings = check_directory(box)
    assert f"a file that was just created belongs to user {owner}" in findings["lock"][0][1]
    assert f"belongs to user {owner}" in findings["owner"][0][1]
    assert f"active-x-1.ndjson belongs to user {owner}" in findings["files"][0][1]


def test_a_batch_from_the_future_means_that_the_clock_stepped_back(box: Path) -> None:
    """The finding says by how much."""
    clock = ManualClock()
    (box / layout.sealed_name(clock.micros() - 5_000_000, "x")).write_bytes(LINE)
    assert check_directory(box, clock=clock)["clock"] == [(True, "the newest batch was sealed 5 s ago")]
    clock.step(-3605)
    ((ok, text),) = check_directory(box, clock=clock)["clock"]
    assert (ok, "3,600 s in the future" in text) == (False, True)


def test_reached_limits_are_reported(box: Path) -> None:
    """Bytes, files and free space. With eviction, the finding says that the oldest events are evicted."""
    for number in range(7):
        (box / layout.sealed_name(number, "x")).write_bytes(LINE)
    at_limits = check_directory(box, limits=LIMITS._replace(max_bytes=49, max_files=7, min_free_bytes=2**60))
    assert failed_checks(at_limits) == {"pending bytes", "pending files", "free space"}
    assert "no new event is accepted" in at_limits["pending bytes"][0][1]
    assert failed_checks(check_directory(box, limits=LIMITS._replace(max_bytes=50, max_files=8))) == set()
    evicting = check_directory(box, limits=LIMITS._replace(max_bytes=56, max_files=8, evicts=True))
    assert failed_checks(evicting) == {"pending bytes", "pending files"}
    assert "the oldest events are evicted" in evicting["pending files"][0][1]


@pytest.mark.parametrize(
    ("state", "age_s", "stamp_age_s", "passes"),
    [
        (None, 0, None, True),
        (None, 0, 290, True),
        (None, 0, 301, False),
        (State("idle"), 1, None, True),
        (State("idle"), 3600, None, True),
        (State("idle"), 3600, 301, False),
        (State("idle"), 3600, 290, True),
        (State("waiting", "503"), 1, 60, False),
        (State("stopped", "no such table"), 1, 60, False),
        (State("degraded", "the quarantine cannot be written"), 1, 60, False),
    ],
)
def test_the_state_of_the_delivery_worker_is_reported(
    box: Path, state: State | None, age_s: int, stamp_age_s: int | None, *, passes: bool
) -> None:
    """Without a worker, the check fails only if a batch has been pending for too long."""
    now = SystemClock().micros()
    if stamp_age_s is not None:
        (box / layout.sealed_name(now - stamp_age_s * 1_000_000, "x")).write_bytes(LINE)
    if state is not None:
        clock = ManualClock(now - age_s * 1_000_000, SystemClock().monotonic() - age_s)
        lease = Lease(Directory(str(box), OsFilesystem(), clock), "sqlite:///x.db", clock)
        assert lease.acquire()
        lease.write_heartbeat(state, 0, "", now=True)
        lease.release()
    code, findings = doctor("-d", box, cwd=box.parent, now_micros=now)
    assert (code, failed_checks(findings)) == ((0, set()) if passes else (1, {"delivery"}))
    ((_, text),) = findings["delivery"]
    assert ("0 batches pending" if stamp_age_s is None else "1 batch pending") in text
    if state is not None:
        assert state.reason in text or age_s > 10


class UnreliableFilesystem(OsFilesystem):
    """A file system with one operation that does not do what it promises."""

    def __init__(self, broken: str) -> None:
        super().__init__()
        self._broken = broken

    def inspect_directory(self, path: str) -> DirectoryInfo | None:
        facts = super().inspect_directory(path)
        return facts if facts is None or self._broken != "medium" else facts._replace(filesystem_type="nfs4")

    def create(self, path: str) -> int:
        if self._broken == "create" and os.path.exists(path):
            return self.open_lock_file(path)
        fd = super().create(path)
        if self._broken == "append":
            self.close(fd)
            fd = self._open(path, os.O_RDWR)
        return fd

    def lock(self, fd: int) -> bool:
        return self._broken == "twice" or (self._broken != "never" and super().lock(fd))

    def rename(self, source: str, target: str) -> None:  # type: ignore[override]  # the real one is a function of os
        if self._broken != "rename":
            return os.rename(source, target)
        Path(target).write_bytes(Path(source).read_bytes())
        return os.unlink(source)


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        ("medium", "filesystem"),
        ("create", "create"),
        ("append", "append"),
        ("twice", "lock"),
        ("never", "lock"),
        ("rename", "rename"),
    ],
)
def test_an_operation_that_breaks_its_promise_is_reported(box: Path, broken: str, check: str) -> None:
    """The probes try each operation."""
    findings = check_directory(box, UnreliableFilesystem(broken))
    assert check in failed_checks(findings)
    assert list(box.iterdir()) == []


@pytest.mark.parametrize(
    ("operation", "check"),
    [
        ("inspect_directory", "directory"),
        ("create", "create"),
        ("lock", "lock"),
        ("write_all", "append"),
        ("rename", "rename"),
        ("sync_data", "fsync"),
        ("sync_directory", "directory fsync"),
        ("unlink", "delete"),
        ("disk_space", "directory"),
        ("list_files", "delete"),
    ],
)
def test_a_failing_operation_is_reported_with_a_remedy(box: Path, operation: str, check: str) -> None:
    """Probe files are deleted if that is possible."""
    disk = FaultFilesystem(OsFilesystem(), Fault(operation, 1, errno.EIO, permanent=True))
    findings = check_directory(box, disk)
    assert check in failed_checks(findings) or "directory" in failed_checks(findings)
    texts = [text for lines in findings.values() for ok, text in lines if not ok]
    assert any("the kernel log shows its errors" in text for text in texts), texts
    assert operation in ("unlink", "list_files") or list(box.iterdir()) == []


def test_an_implausibly_fast_fsync_fails_for_durability_power_only(box: Path) -> None:
    """The clock of the test stands still, so every fsync takes no time."""
    assert failed_checks(check_directory(box)) == set()
    findings = check_directory(box, limits=LIMITS._replace(power=True))
    assert failed_checks(findings) in ({"fsync"}, {"filesystem"})  # the second one if the tests run on a tmpfs


def test_missing_hard_links_fail_only_if_they_are_needed(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single sink needs none."""

    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(OsFilesystem, "link", staticmethod(refuse))
    findings = check_directory(box)
    assert failed_checks(findings) == set()
    assert findings["hard link"] == [(True, "cannot be created (Operation not permitted); a single sink needs none")]
    findings = check_directory(box, limits=LIMITS._replace(needs_hard_links=True))
    assert failed_checks(findings) == {"hard link"}


def test_the_checks_close_all_file_descriptors(box: Path) -> None:
    """So they release their locks, too."""
    disk = OsFilesystem()
    check_directory(box, disk)
    assert disk._open_fds == set()


def test_probe_files_are_deleted_after_an_interruption(box: Path) -> None:
    """The interruption comes while fsync is measured."""

    class Interrupted(ManualClock):
        def monotonic(self) -> float:
            assert list(box.iterdir()) != []
            raise KeyboardInterrupt

    disk = OsFilesystem()
    with pytest.raises(KeyboardInterrupt):
        check_directory(box, disk, clock=Interrupted())
    assert (list(box.iterdir()), disk._open_fds) == ([], set())


def test_probe_files_are_deleted_even_if_the_deletion_is_interrupted(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is interrupted."""
    disk, interrupt_after = OsFilesystem(), [3, 5, 1]
    original_unlink = disk.unlink

    def unlink(path: str) -> None:
        if interrupt_after:
            interrupt_after[0] -= 1
            if interrupt_after[0] == 0:
                interrupt_after.pop(0)
                raise KeyboardInterrupt
        original_unlink(path)

    monkeypatch.setattr(disk, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        check_directory(box, disk)
    assert (list(box.iterdir()), interrupt_after) == ([], [])


def test_sigint_leaves_no_file_behind(box: Path) -> None:
    """SIGINT may come at any moment; the exit code is 130."""
    for _ in range(3):
        process = subprocess.Popen(
            [*PILLARBOX, "doctor", "-d", "box"], cwd=box.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CLEAN
        )
        try:
            while not list(box.iterdir()) and process.poll() is None:
                pass
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (list(box.iterdir()), err) == ([], b"")
        assert process.returncode == 130 or out


def test_limits_of_dead_letters_and_quarantine_are_reported(box: Path) -> None:
    """Before they are reached, with the command that makes room."""
    (box / "dead-a.ndjson").write_bytes(b"x" * 90)
    (box / "corrupt-a.ndjson").write_bytes(b"x" * 50)
    limits = LIMITS._replace(max_dead_bytes=100, max_quarantine_bytes=100)
    findings = check_directory(box, limits=limits)
    assert failed_checks(findings) == {"dead letters"}
    assert "pillarbox dead list" in findings["dead letters"][0][1]
    assert findings["quarantine"] == [(True, "50 of 100 bytes (max_quarantine_bytes)")]
    assert failed_checks(check_directory(box, limits=limits._replace(max_dead_bytes=1000, max_quarantine_bytes=50))) == {
        "quarantine"
    }


def test_a_low_limit_of_open_files_is_reported(box: Path) -> None:
    """The limit is set with ulimit in a shell."""
    completed = subprocess.run(
        ["bash", "-c", f"ulimit -n 100; {' '.join(PILLARBOX)} doctor -d box --json"],
        cwd=box.parent, env=CLEAN, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    findings = by_check(DoctorFinding(**finding) for finding in json.loads(completed.stdout))
    assert (completed.returncode, failed_checks(findings)) == (1, {"open files"})
    assert "ulimit -n 1024" in findings["open files"][0][1]


def test_the_seal_request_is_checked(box: Path) -> None:
    """Its content must be a valid request; the finding says when it was made."""
    clock = ManualClock()
    assert check_directory(box, clock=clock)["seal request"] == [(True, "no seal was requested yet")]
    sealer.request_seal(Directory(str(box), OsFilesystem(), clock), clock)
    clock.advance(90)
    assert check_directory(box, clock=clock)["seal request"] == [(True, "the last seal was requested 90 s ago")]
    (box / layout.SEAL_REQUEST).write_bytes(b"rubbish")
    assert failed_checks(check_directory(box)) == {"seal request"}
    (box / layout.SEAL_REQUEST).unlink()
    (box / layout.SEAL_REQUEST).symlink_to("nowhere")
    assert failed_checks(check_directory(box)) == {"files"}


def test_a_destination_is_checked_without_sending_an_event(box: Path) -> None:
    """Its findings are part of the output."""
    code, findings = doctor("-d", "box", "--sink", "sqlite:///events.db", "--timeout", "60", cwd=box.parent)
    assert (code, failed_checks(findings)) == (0, set())
    assert all(text.startswith("sqlite:///events.db: ") for _, text in findings["destination"])
    code, findings = doctor("-d", "box", "--sink", "sqlite:///missing/events.db", cwd=box.parent)
    assert (code, failed_checks(findings)) == (1, {"destination"})
    code, findings = doctor("-d", "box", "--sink", "nosuch://x", cwd=box.parent)
    assert (code, failed_checks(findings)) == (1, {"destination"})


def test_a_destination_that_does_not_respond_times_out(box: Path) -> None:
    """The server accepts the connection and sends nothing. The output contains no password."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}/events"
        completed = run("doctor", "-d", "box", "--sink", url, "--timeout", "0.5", "--json", cwd=box.parent)
    findings = by_check(DoctorFinding(**finding) for finding in json.loads(completed.stdout))
    assert completed.returncode == 1
    assert "no answer within" in findings["destination"][0][1] or "timed out" in findings["destination"][0][1]
    assert b"secret" not in completed.stdout + completed.stderr


def test_a_hanging_delivery_worker_is_distinguished_from_a_dead_one(box: Path) -> None:
    """By whether a process with its pid exists."""
    now = SystemClock().micros()
    (box / layout.sealed_name(now - 301_000_000, "x")).write_bytes(LINE)
    clock = ManualClock(now - 3_600_000_000)
    lease = Lease(Directory(str(box), OsFilesystem(), clock), "sqlite:///x.db", clock)
    assert lease.acquire()
    lease.write_heartbeat(State("draining"), 0, "", now=True)  # with the pid of this process, which runs
    lease.release()
    assert "if it is the delivery worker, restart it" in doctor("-d", box, cwd=box.parent)[1]["delivery"][0][1]
    heartbeat = msgspec.json.decode((box / layout.DELIVER_LOCK).read_bytes())
    (box / layout.DELIVER_LOCK).write_bytes(msgspec.json.encode(heartbeat | {"pid": 2**22 + 5}))
    assert "the process has ended: run pillarbox deliver" in doctor("-d", box, cwd=box.parent)[1]["delivery"][0][1]


def test_a_heartbeat_in_the_future_means_that_the_clock_stepped_back(box: Path) -> None:
    """Otherwise the worker would never count as silent."""
    clock = ManualClock(SystemClock().micros() + 3_600_000_000)
    lease = Lease(Directory(str(box), OsFilesystem(), clock), "sqlite:///x.db", clock)
    assert lease.acquire()
    lease.write_heartbeat(State("idle"), 0, "", now=True)
    lease.release()
    code, findings = doctor("-d", box, cwd=box.parent)
    assert (code, failed_checks(findings)) == (1, {"clock"})


def test_each_queue_is_checked(box: Path) -> None:
    """A queue without a worker, one that other users can read, and one without a sink in the settings."""
    now = SystemClock().micros()
    queue = box / layout.queue_name("old")
    queue.mkdir(mode=0o700)
    (queue / layout.sealed_name(now - 301_000_000, "x")).write_bytes(LINE)
    code, findings = doctor("-d", box, cwd=box.parent)
    assert (code, failed_checks(findings)) == (1, {"delivery"})
    assert findings["delivery"][0][1].startswith("old: no delivery worker yet; 1 batch pending, the oldest for 30")
    _, findings = doctor("-d", box, "--sink", "sqlite:///events.db", cwd=box.parent)
    assert f"{box}/sink-old belongs to no sink of the settings, 1 batch pending" in findings["queue"][0][1]
    queue.chmod(0o755)
    assert "mode" in failed_checks(doctor("-d", box, cwd=box.parent)[1])
