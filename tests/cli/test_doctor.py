"""`pillarbox doctor`, as a user types it, and its probes on file systems that do not keep what they promise."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterable
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
from tests.cli.test_commands import CLEAN, PILLARBOX, bare, run
from tests.crash.block_device import mounted, need

LIMITS = DoctorLimits(power=False, max_bytes=10**9, max_files=1000, min_free_bytes=0, evicts=False)
LINE = b"a line\n"
Found = dict[str, list[tuple[bool, str]]]
# The command with a clock that stands still, however long the command takes to start.
AT = """
import sys
from pillarbox.cli import doctor
from pillarbox.cli.main import run
now = int(sys.argv.pop(1))
doctor.SystemClock.micros = lambda _: now
run()
"""


def by_check(findings: Iterable[DoctorFinding]) -> Found:
    """(ok, text) of each finding, by what was checked."""
    found: Found = {}
    for ok, check, text in findings:
        found.setdefault(check, []).append((ok, text))
    return found


def doctor(
    *arguments: object, cwd: Path, environ: dict[str, str] | None = None, now_micros: int | None = None
) -> tuple[int, Found]:
    words = PILLARBOX if now_micros is None else [PILLARBOX[0], "-c", AT, str(now_micros)]
    done = subprocess.run(
        [*words, "doctor", *map(str, arguments), "--json"],
        cwd=cwd, env=CLEAN | (environ or {}), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == b""
    return done.returncode, by_check(DoctorFinding(**finding) for finding in json.loads(done.stdout))


def bad(found: Found) -> set[str]:
    return {check for check, lines in found.items() for ok, _ in lines if not ok}


def examined(
    path: Path, disk: Filesystem | None = None, limits: DoctorLimits = LIMITS, clock: ManualClock | None = None
) -> Found:
    """What is found in a directory on a file system of the test's."""
    made = clock or ManualClock()
    numbers = itertools.count()
    return by_check(run_checks(Directory(str(path), disk or OsFilesystem(), made, lambda: f"{next(numbers)}"), made, limits))


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """An empty outbox directory."""
    (tmp_path / "box").mkdir(mode=0o700)
    return tmp_path / "box"


def test_a_good_directory_has_only_good_findings_and_stays_as_it_was(tmp_path: Path) -> None:
    """Exit code 0, all that was there untouched, and nothing left behind."""
    run("enqueue", "-d", "box", cwd=tmp_path, stdin=b"".join(map(bare, range(700))))
    (tmp_path / "box" / "active.ndjson").write_bytes(b"")
    (tmp_path / "box" / "active-dead-1.ndjson").write_bytes(b"torn")
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in (tmp_path / "box").iterdir()}
    newest = max(filter(None, map(layout.sealed_at, before)))
    code, found = doctor("-d", "box", cwd=tmp_path, now_micros=newest)
    assert (code, bad(found)) == (0, set())
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
        assert check in found
    assert re.search(r"takes [\d.]+ ms \(median of \d+\)", found["fsync"][0][1])


def test_as_text_each_finding_is_a_line(box: Path) -> None:
    """With ok or BAD in front, and the way out."""
    box.chmod(0o755)
    done = run("doctor", "-d", "box", "--durability", "process", cwd=box.parent)
    assert done.returncode == 1
    lines = done.stdout.decode().splitlines()
    assert lines[0] == 'box, durability "process"'
    assert "  BAD  mode: 755 gives other users access to the events: run chmod 700 box" in lines
    assert "  ok   lock: flock grants a lock once, and releases it when the file is closed" in lines
    assert all(line.startswith(("  ok   ", "  BAD  ")) for line in lines[1:])


def test_a_directory_that_is_missing_is_not_made(tmp_path: Path) -> None:
    """It says what to do; neither is a file in its place touched."""
    (tmp_path / "file").write_text("mine")
    assert "mkdir" in doctor("-d", "box", cwd=tmp_path)[1]["directory"][0][1]
    code, found = doctor("-d", "file", cwd=tmp_path)
    assert (code, bad(found)) == (1, {"directory"})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_without_a_directory_it_is_a_usage_error(tmp_path: Path) -> None:
    """Exit code 2; the environment may name it."""
    assert run("doctor", cwd=tmp_path).returncode == 2
    assert run("doctor", "-d", "box", "--durability", "for ever", cwd=tmp_path).returncode == 2
    assert doctor(cwd=tmp_path, environ={"PILLARBOX_DIRECTORY": "box"})[0] == 1


def test_durability_power_is_refused_in_memory_and_process_is_not(tmp_path: Path) -> None:
    """On tmpfs, mounted for this."""
    need(commands=("mount", "umount"))
    with mounted(tmp_path / "memory", "-t", "tmpfs", "-o", "mode=700,size=10m", "none") as outbox_dir:
        assert doctor("-d", outbox_dir, "--durability", "process", "-c", "p.toml", cwd=settings_file(tmp_path))[0] == 0
        code, found = doctor("-d", outbox_dir, "--durability", "power", cwd=tmp_path)
        assert (code, bad(found)) == (1, {"filesystem"})
        assert "tmpfs" in found["filesystem"][0][1]
        assert list(outbox_dir.iterdir()) == []


def settings_file(folder: Path) -> Path:
    (folder / "p.toml").write_text("[outbox]\nmin_free_bytes = 0\n")
    return folder


def test_a_full_volume_is_told_with_the_way_out(tmp_path: Path) -> None:
    """No probe fits; none is left."""
    need(commands=("mount", "umount"))
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "mode=700,size=64k", "none") as outbox_dir:
        with open(outbox_dir / "filler", "wb", buffering=0) as filler:
            while filler.write(b"x" * 4096) == 4096 and filler.tell() < 64 * 1024:
                pass
        _, found = doctor("-d", outbox_dir, cwd=tmp_path)
        assert "append" in bad(found)
        assert "free space on the volume" in found["append"][0][1]
        assert [file.name for file in outbox_dir.iterdir()] == ["filler"]


def test_a_read_only_medium_is_told(tmp_path: Path) -> None:
    """Even root cannot write there."""
    need(commands=("mount", "umount"))
    with mounted(tmp_path / "fixed", "-t", "tmpfs", "-o", "ro,mode=700", "none") as outbox_dir:
        code, found = doctor("-d", outbox_dir, cwd=tmp_path)
        assert (code, bad(found)) == (1, {"directory"})


def test_what_is_planted_under_our_names_is_named(box: Path) -> None:
    """Links, second links, pipes and directories; what has another name is nobody's business."""
    outside = box.parent / "outside"
    outside.write_bytes(b"mine")
    (box / "active-x-1.ndjson").symlink_to(outside)
    (box / "sealed-1.ndjson").symlink_to("nowhere")
    (box / "deliver.lock").symlink_to(outside)
    (box / "dead-x.ndjson").mkdir()
    os.mkfifo(box / "active.ndjson")
    (box / "corrupt-x.ndjson").write_bytes(b"")
    (box / "notes").hardlink_to(box / "corrupt-x.ndjson")
    (box / "holiday.jpg").symlink_to(outside)
    code, found = doctor("-d", box, cwd=box.parent)
    assert (code, bad(found)) == (1, {"files"})
    texts = sorted(text.removeprefix(f"{box}/").partition(",")[0] for _, text in found["files"])
    assert texts == [
        "active-x-1.ndjson is a symbolic link",
        "active.ndjson is not a regular file",
        "corrupt-x.ndjson has a second hard link",
        "dead-x.ndjson is a directory",
        "deliver.lock is a symbolic link",
        "sealed-1.ndjson is a symbolic link",
    ]
    assert outside.read_bytes() == b"mine"


def test_no_advice_deletes_a_regular_file_of_the_store(box: Path) -> None:
    """It may hold accepted events. The advice for a second hard link keeps them, and can be pasted into a shell."""
    batch = box / "sealed-0000000000000001-u; echo.ndjson"
    batch.write_bytes(LINE)
    (box / "notes").hardlink_to(batch)
    segment = box / "active-w-1.ndjson"
    segment.write_bytes(LINE)
    (box / "copy").hardlink_to(segment)
    texts = [text for _, text in examined(box)["files"]]
    assert len(texts) == 2
    assert not re.search(r"\b(remove|delete|rm|unlink)\b", " ".join(texts))
    (of_segment,) = (text for text in texts if text.startswith(str(segment)))
    assert "stop the application that writes it, then " in of_segment
    for text in texts:
        subprocess.run(["sh", "-euc", text.partition("a file of its own: ")[2]], check=True, timeout=60)
    assert examined(box)["files"] == [(True, "the store can use every file that has one of its names")]
    assert (batch.read_bytes(), segment.read_bytes()) == (LINE, LINE)


def test_of_many_planted_files_the_first_are_named_and_all_are_counted(box: Path) -> None:
    """Output has a bound."""
    for number in range(50):
        (box / f"sealed-{number}.ndjson").symlink_to("nowhere")
    assert len(examined(box)["files"]) == 21
    assert examined(box)["files"][-1] == (False, "and 30 more")


def test_what_belongs_to_another_user_is_told(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory, whose owner may remove what is in it, and files under our names."""
    (box / "active-x-1.ndjson").write_bytes(b"")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    found = examined(box)
    assert f"a file that was just created belongs to user {owner}" in found["lock"][0][1]
    assert f"belongs to user {owner}" in found["owner"][0][1]
    assert f"active-x-1.ndjson belongs to user {owner}" in found["files"][0][1]


def test_a_stamp_in_the_future_means_that_the_clock_stepped_back(box: Path) -> None:
    """By how much is told."""
    clock = ManualClock()
    (box / layout.sealed_name(clock.micros() - 5_000_000, "x")).write_bytes(LINE)
    assert examined(box, clock=clock)["clock"] == [(True, "the newest batch was sealed 5 s ago")]
    clock.step(-3605)
    ((ok, text),) = examined(box, clock=clock)["clock"]
    assert (ok, "3,600 s in the future" in text) == (False, True)


def test_limits_that_are_reached_are_told(box: Path) -> None:
    """Bytes, files and room; with eviction, what is given up."""
    for number in range(7):
        (box / layout.sealed_name(number, "x")).write_bytes(LINE)
    full = examined(box, limits=LIMITS._replace(max_bytes=49, max_files=7, min_free_bytes=2**60))
    assert bad(full) == {"pending bytes", "pending files", "free space"}
    assert "no new event is accepted" in full["pending bytes"][0][1]
    assert bad(examined(box, limits=LIMITS._replace(max_bytes=50, max_files=8))) == set()
    evicting = examined(box, limits=LIMITS._replace(max_bytes=56, max_files=8, evicts=True))
    assert bad(evicting) == {"pending bytes", "pending files"}
    assert "the oldest events are evicted" in evicting["pending files"][0][1]


@pytest.mark.parametrize(
    ("state", "age_s", "stamp_age_s", "well"),
    [
        (None, 0, None, True),
        (None, 0, 290, True),
        (None, 0, 301, False),
        (State("idle"), 1, None, True),
        (State("idle"), 3600, None, True),
        (State("idle"), 3600, 301, False),
        (State("idle"), 3600, 290, True),
        (State("waiting", "503"), 1, 60, True),
        (State("stopped", "no such table"), 1, 60, False),
        (State("degraded", "the quarantine cannot be written"), 1, 60, False),
    ],
)
def test_who_delivers_is_told(box: Path, state: State | None, age_s: int, stamp_age_s: int | None, *, well: bool) -> None:
    """And since when nobody has: that is bad where something waits for it."""
    now = SystemClock().micros()
    if stamp_age_s is not None:
        (box / layout.sealed_name(now - stamp_age_s * 1_000_000, "x")).write_bytes(LINE)
    if state is not None:
        clock = ManualClock(now - age_s * 1_000_000)
        lease = Lease(Directory(str(box), OsFilesystem(), clock), "sqlite:///x.db", clock)
        assert lease.acquire()
        lease.write_heartbeat(state, 0, "", now=True)
        lease.release()
    code, found = doctor("-d", box, cwd=box.parent, now_micros=now)
    assert (code, bad(found)) == ((0, set()) if well else (1, {"delivery"}))
    ((_, text),) = found["delivery"]
    assert ("0 batches pending" if stamp_age_s is None else "1 batch pending") in text
    if state is not None:
        assert state.reason in text or age_s > 10


class Lying(OsFilesystem):
    """A file system that does not do what it says, by verb."""

    def __init__(self, lie: str) -> None:
        super().__init__()
        self._lie = lie

    def inspect_directory(self, path: str) -> DirectoryInfo | None:
        facts = super().inspect_directory(path)
        return facts if facts is None or self._lie != "medium" else facts._replace(filesystem_type="nfs4")

    def create(self, path: str) -> int:
        if self._lie == "create" and os.path.exists(path):
            return self.open_lock_file(path)
        fd = super().create(path)
        if self._lie == "append":
            self.close(fd)
            fd = self._open(path, os.O_RDWR)
        return fd

    def lock(self, fd: int) -> bool:
        return self._lie == "twice" or (self._lie != "never" and super().lock(fd))

    def rename(self, source: str, target: str) -> None:  # type: ignore[override]  # the real one is a function of os
        if self._lie != "rename":
            return os.rename(source, target)
        Path(target).write_bytes(Path(source).read_bytes())
        return os.unlink(source)


@pytest.mark.parametrize(
    ("lie", "check"),
    [
        ("medium", "filesystem"),
        ("create", "create"),
        ("append", "append"),
        ("twice", "lock"),
        ("never", "lock"),
        ("rename", "rename"),
    ],
)
def test_a_file_system_that_does_not_do_what_it_says_is_found(box: Path, lie: str, check: str) -> None:
    """By trying."""
    found = examined(box, Lying(lie))
    assert check in bad(found)
    assert list(box.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "check"),
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
def test_a_verb_that_fails_is_told_with_the_way_out(box: Path, verb: str, check: str) -> None:
    """And what was made is removed where that is possible."""
    disk = FaultFilesystem(OsFilesystem(), Fault(verb, 1, errno.EIO, permanent=True))
    found = examined(box, disk)
    assert check in bad(found) or "directory" in bad(found)
    texts = [text for lines in found.values() for ok, text in lines if not ok]
    assert any("the kernel log shows its errors" in text for text in texts), texts
    assert verb in ("unlink", "list_files") or list(box.iterdir()) == []


def test_a_sync_that_cannot_have_reached_a_disk_is_bad_for_power_only(box: Path) -> None:
    """A clock that stands still finds every sync too quick."""
    assert bad(examined(box)) == set()
    found = examined(box, limits=LIMITS._replace(power=True))
    assert bad(found) in ({"fsync"}, {"filesystem"})  # the latter where tests run in memory


def test_hard_links_that_cannot_be_made_are_only_told(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No promise rests on them."""

    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(OsFilesystem, "link", staticmethod(refuse))
    found = examined(box)
    assert bad(found) == set()
    assert found["hard link"] == [(True, "cannot be created (Operation not permitted); a single sink needs none")]
    found = examined(box, limits=LIMITS._replace(needs_hard_links=True))
    assert bad(found) == {"hard link"}


def test_no_descriptor_is_left_open(box: Path) -> None:
    """Nor a lock."""
    disk = OsFilesystem()
    examined(box, disk)
    assert disk._open_fds == set()


def test_interrupted_it_removes_its_files_all_the_same(box: Path) -> None:
    """In the middle of measuring."""

    class Interrupted(ManualClock):
        def monotonic(self) -> float:
            assert list(box.iterdir()) != []
            raise KeyboardInterrupt

    disk = OsFilesystem()
    with pytest.raises(KeyboardInterrupt):
        examined(box, disk, clock=Interrupted())
    assert (list(box.iterdir()), disk._open_fds) == ([], set())


def test_interrupted_while_it_removes_its_files_it_removes_the_others_too(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often."""
    disk, left = OsFilesystem(), [3, 5, 1]
    really = disk.unlink

    def unlink(path: str) -> None:
        if left:
            left[0] -= 1
            if left[0] == 0:
                left.pop(0)
                raise KeyboardInterrupt
        really(path)

    monkeypatch.setattr(disk, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        examined(box, disk)
    assert (list(box.iterdir()), left) == ([], [])


def test_sigint_leaves_no_file_behind(box: Path) -> None:
    """Ctrl-C whenever it comes; exit code 130."""
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


def test_limits_of_what_is_set_aside_are_told(box: Path) -> None:
    """Before they are reached, and with the command that makes room."""
    (box / "dead-a.ndjson").write_bytes(b"x" * 90)
    (box / "corrupt-a.ndjson").write_bytes(b"x" * 50)
    limits = LIMITS._replace(max_dead_bytes=100, max_quarantine_bytes=100)
    found = examined(box, limits=limits)
    assert bad(found) == {"dead letters"}
    assert "pillarbox dead list" in found["dead letters"][0][1]
    assert found["quarantine"] == [(True, "50 of 100 bytes (max_quarantine_bytes)")]
    assert bad(examined(box, limits=limits._replace(max_dead_bytes=1000, max_quarantine_bytes=50))) == {"quarantine"}


def test_too_few_open_files_are_told(box: Path) -> None:
    """As the shell has them."""
    done = subprocess.run(
        ["bash", "-c", f"ulimit -n 100; {' '.join(PILLARBOX)} doctor -d box --json"],
        cwd=box.parent, env=CLEAN, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    found = by_check(DoctorFinding(**finding) for finding in json.loads(done.stdout))
    assert (done.returncode, bad(found)) == (1, {"open files"})
    assert "ulimit -n 1024" in found["open files"][0][1]


def test_the_request_file_is_looked_at(box: Path) -> None:
    """Whose content is a request, and when it came."""
    clock = ManualClock()
    assert examined(box, clock=clock)["seal request"] == [(True, "no seal was requested yet")]
    sealer.request_seal(Directory(str(box), OsFilesystem(), clock), clock)
    clock.advance(90)
    assert examined(box, clock=clock)["seal request"] == [(True, "the last seal was requested 90 s ago")]
    (box / layout.SEAL_REQUEST).write_bytes(b"rubbish")
    assert bad(examined(box)) == {"seal request"}
    (box / layout.SEAL_REQUEST).unlink()
    (box / layout.SEAL_REQUEST).symlink_to("nowhere")
    assert bad(examined(box)) == {"files"}


def test_a_destination_is_asked_and_gets_no_event(box: Path) -> None:
    """What it says of itself is among the findings."""
    code, found = doctor("-d", "box", "--sink", "sqlite:///events.db", "--timeout", "60", cwd=box.parent)
    assert (code, bad(found)) == (0, set())
    assert all(text.startswith("sqlite:///events.db: ") for _, text in found["destination"])
    code, found = doctor("-d", "box", "--sink", "sqlite:///missing/events.db", cwd=box.parent)
    assert (code, bad(found)) == (1, {"destination"})
    code, found = doctor("-d", "box", "--sink", "nosuch://x", cwd=box.parent)
    assert (code, bad(found)) == (1, {"destination"})


def test_a_destination_that_does_not_answer_is_not_waited_for(box: Path) -> None:
    """A server that takes the connection and says nothing; its secrets are shown nowhere."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}/events"
        done = run("doctor", "-d", "box", "--sink", url, "--timeout", "0.5", "--json", cwd=box.parent)
    found = by_check(DoctorFinding(**finding) for finding in json.loads(done.stdout))
    assert done.returncode == 1
    assert "no answer within" in found["destination"][0][1] or "timed out" in found["destination"][0][1]
    assert b"secret" not in done.stdout + done.stderr


def test_a_deliverer_that_hangs_is_told_from_one_that_is_gone(box: Path) -> None:
    """By whether there is a process of its number."""
    now = SystemClock().micros()
    (box / layout.sealed_name(now - 301_000_000, "x")).write_bytes(LINE)
    clock = ManualClock(now - 3_600_000_000)
    lease = Lease(Directory(str(box), OsFilesystem(), clock), "sqlite:///x.db", clock)
    assert lease.acquire()
    lease.write_heartbeat(State("draining"), 0, "", now=True)  # of this process, which is there
    lease.release()
    assert "if it is the delivery worker, restart it" in doctor("-d", box, cwd=box.parent)[1]["delivery"][0][1]
    beat = msgspec.json.decode((box / layout.DELIVER_LOCK).read_bytes())
    (box / layout.DELIVER_LOCK).write_bytes(msgspec.json.encode(beat | {"pid": 2**22 + 5}))
    assert "the process has ended: run pillarbox deliver" in doctor("-d", box, cwd=box.parent)[1]["delivery"][0][1]


def test_a_heartbeat_in_the_future_means_that_the_clock_stepped_back(box: Path) -> None:
    """Else it would never be silent."""
    clock = ManualClock(SystemClock().micros() + 3_600_000_000)
    lease = Lease(Directory(str(box), OsFilesystem(), clock), "sqlite:///x.db", clock)
    assert lease.acquire()
    lease.write_heartbeat(State("idle"), 0, "", now=True)
    lease.release()
    code, found = doctor("-d", box, cwd=box.parent)
    assert (code, bad(found)) == (1, {"clock"})


def test_each_queue_is_looked_at(box: Path) -> None:
    """One that nobody delivers, one that others can read, and one that is none of the settings'."""
    now = SystemClock().micros()
    queue = box / layout.queue_name("old")
    queue.mkdir(mode=0o700)
    (queue / layout.sealed_name(now - 301_000_000, "x")).write_bytes(LINE)
    code, found = doctor("-d", box, cwd=box.parent)
    assert (code, bad(found)) == (1, {"delivery"})
    assert found["delivery"][0][1].startswith("old: no delivery worker yet; 1 batch pending, the oldest for 30")
    _, found = doctor("-d", box, "--sink", "sqlite:///events.db", cwd=box.parent)
    assert f"{box}/sink-old belongs to no sink of the settings, 1 batch pending" in found["queue"][0][1]
    queue.chmod(0o755)
    assert "mode" in bad(doctor("-d", box, cwd=box.parent)[1])
