"""Delivery in a child process and by a separate service: with real processes that are killed and stopped."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

from pillarbox import ConfigurationError, Outbox, TrackingEvent, resolve
from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import HEARTBEAT_STALE_AFTER_S, Lease, read_heartbeat
from pillarbox.delivery.process.protocol import decode_settings, encode_settings
from pillarbox.delivery.process.supervisor import Supervisor
from pillarbox.delivery.runner import ExternalRunner
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.stats import State
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.testing import ManualClock, RecordingSink
from tests.conftest import event, wait_until
from tests.delivery import child_hooks
from tests.delivery.worker_setup import seal_batch
from tests.sinks.http_server import closed_port_url

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'events.db'}"


def open_directory(folder: Path) -> Directory:
    return Directory(str(folder), OsFilesystem(), SystemClock())


def delivering_pid(folder: Path) -> int:
    """The pid in the heartbeat of the worker."""
    beat = read_heartbeat(open_directory(folder))
    return 0 if beat is None else beat.pid


def delivered_ids(url: str) -> list[str]:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        return [found for (found,) in database.execute("SELECT event_id FROM tracking_event ORDER BY event_id")]


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ids(count: int, first: int = 0) -> list[str]:
    return [f"e-{number:06d}" for number in range(first, first + count)]


def put(outbox: Outbox, count: int, first: int = 0) -> None:
    assert all(outbox.enqueue(event(number)) for number in range(first, first + count))


def start_program(script: str, *arguments: object, apart: bool = False) -> subprocess.Popen[str]:
    """Start a program that uses an outbox; its output is read line by line."""
    head = "import os, signal, sys\nfrom pillarbox import Outbox\nfrom tests.conftest import event, wait_until\n"
    command = [sys.executable, "-c", head + script, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=apart
    )


def next_line(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline().strip()


OPEN = """
outbox = Outbox(sys.argv[1], sink=sys.argv[2], deliver="process", flush_interval=0.05)
[outbox.enqueue(event(number)) for number in range(10)]
print(outbox.flush(60), flush=True)
"""


def test_a_child_delivers_and_its_parent_knows_the_counts(folder: Path, url: str) -> None:
    """Counts, released bytes and state. After `close`, the child process has ended."""
    with Outbox(str(folder), sink=url, deliver="process", batch_size=10) as outbox:
        put(outbox, 95)
        assert outbox.flush(60)
        child = delivering_pid(folder)
        assert child not in (0, os.getpid())
        wait_until(lambda: outbox.stats().delivered == 95)
        stats = outbox.stats()
        assert stats.flushed_files > 0
        assert (stats.pending_files, stats.pending_bytes, stats.last_error) == (0, 0, "")
        wait_until(lambda: outbox.stats().state.name == "idle")
        put(outbox, 5, 95)
    assert delivered_ids(url) == ids(100)
    assert not is_alive(child)


def test_a_program_that_exits_at_once_delivers_its_events(folder: Path, url: str) -> None:
    """Although the child process has not started yet."""
    outbox = Outbox(str(folder), sink=url, deliver="process")
    put(outbox, 1)
    outbox.close(20)
    assert delivered_ids(url) == ids(1)


def test_a_child_that_is_killed_is_started_again(folder: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """No event is lost or delivered twice, the counts continue, and each change is logged once."""
    with caplog.at_level(logging.INFO, "pillarbox"), Outbox(str(folder), sink=url, deliver="process", batch_size=5) as outbox:
        put(outbox, 50)
        assert outbox.flush(60)
        wait_until(lambda: outbox.stats().delivered == 50)
        first = delivering_pid(folder)
        put(outbox, 450, 50)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: delivering_pid(folder) != first)
        put(outbox, 500, 500)
        assert outbox.flush(60)
        wait_until(lambda: outbox.stats().delivered >= 550)  # the parent does not count what the killed child had not reported
        stats = outbox.stats()
    assert delivered_ids(url) == ids(1000)
    assert stats.last_error == "delivery process: ended by signal 9 (Killed); restarting"
    texts = [record.getMessage() for record in caplog.records]
    assert len([text for text in texts if "ended by signal 9" in text]) == 1
    assert len([text for text in texts if text.endswith(" delivers")]) == 2


def test_a_child_ends_with_its_parent_and_another_process_takes_over(folder: Path, url: str) -> None:
    """After SIGKILL of the parent, even if a process that it forked still runs: that process does not have the socket."""
    script = """
reads, writes = os.pipe()
if os.fork() == 0:
    print(sum("socket:" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")), flush=True)
    os.close(writes)
    os.read(reads, 1)
    os._exit(0)
print("forked", flush=True)
signal.pause()
"""
    parent = start_program(OPEN + script, folder, url)
    assert next_line(parent) == "True"
    assert {next_line(parent), next_line(parent)} == {"0", "forked"}
    child = delivering_pid(folder)
    assert is_alive(child)
    with Outbox(str(folder), sink=url, deliver="process", flush_interval=0.05) as outbox:
        put(outbox, 10, 10)
        wait_until(lambda: outbox.stats().state.name == "standby")
        parent.kill()
        parent.communicate(timeout=60)
        wait_until(lambda: not is_alive(child))
        put(outbox, 10, 20)
        wait_until(lambda: delivering_pid(folder) not in (0, child))
        assert outbox.flush(60)
    assert delivered_ids(url) == ids(30)


def test_a_forked_process_delivers_after_its_parent_has_ended(folder: Path, url: str) -> None:
    """With its own child process."""
    script = """
if os.fork() == 0:
    outbox.enqueue(event(10))
    outbox.flush(60)
    wait_until(lambda: outbox.stats().state.name == "standby")
    print("standby", flush=True)
    sys.stdin.readline()
    outbox.enqueue(event(11))
    print(outbox.flush(60), flush=True)
    outbox.close()
    os._exit(0)
signal.pause()
"""
    parent = start_program(OPEN + script, folder, url)
    assert (next_line(parent), next_line(parent)) == ("True", "standby")
    child = delivering_pid(folder)
    parent.kill()
    parent.wait(60)
    assert parent.stdin is not None
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert next_line(parent) == "True"
    assert delivering_pid(folder) != child
    wait_until(lambda: not is_alive(delivering_pid(folder)))
    parent.communicate(timeout=60)
    assert delivered_ids(url) == ids(12)


def test_only_one_of_two_outboxes_has_a_child(folder: Path, url: str) -> None:
    """The other one polls, and starts a child process as soon as it is needed."""
    one = Outbox(str(folder), sink=url, deliver="process")
    put(one, 1)
    assert one.flush(60)
    child = delivering_pid(folder)
    with Outbox(str(folder), sink=url, deliver="process") as other:
        wait_until(lambda: other.stats().state.name == "standby")
        assert child_pids() == {child}
        one.close()
        put(other, 1, 1)
        assert other.flush(60)
        assert child_pids() == {delivering_pid(folder)} != {child}
    assert delivered_ids(url) == ids(2)


def child_pids() -> set[int]:
    """The pids of the delivery processes that this process has started; other tests leave servers running in it."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            pids |= set(map(int, (task / "children").read_text().split()))
    return {pid for pid in pids if is_delivery_process(pid)}


def is_delivery_process(pid: int) -> bool:
    """Whether its command line is that of a child process that delivers. Before `exec` it is that of this process."""
    try:
        return b"pillarbox.delivery.process.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return False


def test_a_child_ends_if_another_process_delivers(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lost the race between the parent's release of the lock and its own lease."""
    another = Lease(open_directory(folder), "another", SystemClock())
    release = Lease.release

    def release_and_lose(lease: Lease) -> None:
        release(lease)
        another.acquire()

    monkeypatch.setattr(Lease, "release", release_and_lose)
    with Outbox(str(folder), sink=url, deliver="process") as outbox:
        put(outbox, 1)
        wait_until(lambda: another.is_held and not child_pids() and outbox.stats().state.name == "standby")
        monkeypatch.undo()
        another.release()
        assert outbox.flush(60)
    assert delivered_ids(url) == ids(1)


def test_close_kills_a_hanging_child_after_its_timeout(folder: Path, url: str) -> None:
    """The pending events stay on disk, and the next process delivers them."""
    outbox = Outbox(str(folder), sink=url, deliver="process")
    put(outbox, 1)
    assert outbox.flush(60)
    child = delivering_pid(folder)
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    put(outbox, 1, 1)
    began = time.monotonic()
    outbox.close(0.2)
    assert time.monotonic() - began < 20
    wait_until(lambda: not is_alive(child))
    with Outbox(str(folder), sink=url) as after:
        assert after.flush(60)
    assert delivered_ids(url) == ids(2)


def test_only_the_parent_handles_signals_to_all_processes(folder: Path, url: str) -> None:
    """A terminal sends SIGINT to the process group, and a service manager sends SIGTERM to all. The child still delivers the rest."""
    script = """
try:
    print("ready", flush=True)
    signal.pause()
except KeyboardInterrupt:
    outbox.enqueue(event(10))
    print(outbox.flush(60), flush=True)
    sys.stdin.readline()
    outbox.close()
"""
    parent = start_program(OPEN + script, folder, url, apart=True)
    assert (next_line(parent), next_line(parent)) == ("True", "ready")
    child = delivering_pid(folder)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child, number)
    os.killpg(parent.pid, signal.SIGINT)
    assert next_line(parent) == "True"
    assert delivering_pid(folder) == child
    parent.communicate("\n", timeout=60)
    assert not is_alive(child)
    assert delivered_ids(url) == ids(11)


def test_secrets_are_not_in_the_command_line_or_the_environment(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log lines of the child arrive in this process as if it had logged them."""
    port = urlsplit(closed_port_url()).port
    with caplog.at_level(logging.INFO, "pillarbox"):
        outbox = Outbox(str(folder), sink=f"http://someone:s3cret-word@127.0.0.1:{port}/", deliver="process")
        put(outbox, 1)
        assert not outbox.flush(0.1)
        wait_until(lambda: outbox.stats().state.name == "waiting")
        child = Path(f"/proc/{delivering_pid(folder)}")
        assert b"pillarbox" in (child / "cmdline").read_bytes()
        for secret in ("cmdline", "environ"):
            assert b"s3cret-word" not in (child / secret).read_bytes()
        wait_until(lambda: any(f"http://127.0.0.1:{port}/: waiting: " in record.getMessage() for record in caplog.records))
        outbox.close()
    assert "s3cret-word" not in caplog.text


def test_the_reason_why_a_child_cannot_deliver_is_logged_once(folder: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Although it is started again and again."""
    outbox = Outbox(str(folder), sink=url, deliver="process", event_type=child_hooks.ParentOnlyEvent)
    with outbox:
        put_raw = outbox.enqueue_json([b'{"event_id":"e-000000"}'])
        assert all(put_raw)
        wait_until(lambda: "ParentOnlyEvent" in outbox.stats().state.reason)
        first = outbox.stats().state
        wait_until(lambda: outbox.stats().state.retry_at_micros != first.retry_at_micros)
        assert first.name == "degraded"
    assert len([record for record in caplog.records if "ParentOnlyEvent" in record.getMessage()]) == 1


def test_every_setting_reaches_the_child(folder: Path, url: str) -> None:
    """As JSON, whatever its type. Settings that only the parent uses are left out."""
    chosen = {
        "directory": str(folder),
        "sink": url,
        "event_type": child_hooks.ParentOnlyEvent,
        "max_age": "3600",
        "max_dead_bytes": "1Mi",
        "durability": "power",
        "backoff_max": 1.5,
        "on_dead_letter": child_hooks.record_dead_letter,
    }
    settings = resolve(chosen | {"deliver": "process", "before_send": lambda one: one, "on_drop": print})
    assert decode_settings(encode_settings(settings)) == resolve(chosen)


def test_the_child_reports_its_work_and_ends_when_the_socket_closes(folder: Path, url: str) -> None:
    """It reports released bytes and durations. It ends by itself while its parent runs, not only through the kernel."""
    outbox_dir = open_directory(folder)
    outbox_dir.ensure_usable()
    for stamp in range(1, 4):
        seal_batch(outbox_dir, stamp, msgspec.json.encode(event(stamp)))
    sizes = [entry.size for entry in outbox_dir.filesystem.list_files(outbox_dir.path)]
    gone: list[int] = []
    durations: list[tuple[float, str]] = []

    def took(seconds: float, sink: str) -> None:
        durations.append((seconds, sink))

    settings = resolve({"directory": str(folder), "sink": url, "deliver": "process"})
    supervisor = Supervisor(settings, outbox_dir, SystemClock(), DeliveryCallbacks(gone.append, took), {"": url})
    supervisor.start()
    wait_until(lambda: gone == sizes and len(durations) == 3)
    child = supervisor._child
    assert child is not None
    child._socket.shutdown(socket.SHUT_WR)
    wait_until(lambda: not is_alive(child.pid))
    assert supervisor.stop(60)
    assert delivered_ids(url) == ids(3, 1)


@pytest.mark.parametrize("keywords", [{"deliver": "process"}, {"deliver": "external"}])
def test_a_sink_object_cannot_be_used_in_another_process(folder: Path, keywords: dict[str, str]) -> None:
    """The error names the alternatives."""
    with pytest.raises(
        ConfigurationError,
        match=r"deliver = .*a Sink object cannot be used in another process; pass the sink as a URL, or use 'thread'",
    ):
        Outbox(str(folder), sink=RecordingSink(), **keywords)  # type: ignore[arg-type]


def test_a_setting_that_another_process_cannot_import_is_an_error(folder: Path, url: str) -> None:
    """A class or function of a script, a local one, or one without a name."""

    class Local(msgspec.Struct):
        event_id: str

    script = type("Script", (TrackingEvent,), {"__module__": "__main__"})
    for setting, value in (("event_type", Local), ("event_type", script), ("on_dead_letter", lambda _letter: None)):
        with pytest.raises(ConfigurationError, match=f'{setting} = .*module:name.*into a module, or use deliver="thread"'):
            Outbox(str(folder), sink=url, deliver="process", **{setting: value})  # type: ignore[arg-type]
    Outbox(str(folder), sink=url, deliver="process", before_send=lambda one: one, on_drop=lambda _reason, _count: None)


def test_the_hook_for_dead_letters_runs_in_the_child(
    folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is imported by its name; its exceptions are counted in the parent."""
    monkeypatch.setenv(child_hooks.RECORD_FILE_VARIABLE, str(tmp_path / "heard"))
    outbox = Outbox(str(folder), sink=url, deliver="process", on_dead_letter=child_hooks.record_dead_letter)
    seal_batch(open_directory(folder), 1, b'"no event"', msgspec.json.encode(event(0)))
    with outbox:
        assert outbox.flush(60)
        wait_until(lambda: outbox.stats().hook_failures["on_dead_letter"] == outbox.stats().dead == 1)
        assert (tmp_path / "heard").read_text() == f"{delivering_pid(folder)} wrong_type\n"


def test_deliver_external_uses_the_heartbeat_of_the_service(folder: Path, url: str) -> None:
    """`pillarbox deliver` delivers, and its heartbeat is the state of the outbox. On SIGTERM it exits with code 0."""
    with Outbox(str(folder), sink=url, deliver="external", flush_interval=0.05) as outbox:
        put(outbox, 10)
        assert not outbox.flush(0.1)
        assert outbox.stats().state == State("idle")
        command = [sys.executable, "-m", "pillarbox", "deliver", "-d", str(folder), "--sink", url, "-q"]
        service = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        assert outbox.flush(60)
        wait_until(lambda: outbox.stats().state.name == "idle" and delivering_pid(folder) == service.pid)
        assert outbox.stats().delivered == 0  # not by this process
        service.terminate()
        assert service.wait(60) == 0
    assert delivered_ids(url) == ids(10)


def test_if_no_process_delivers_for_long_the_state_says_so(outbox_dir: Directory, caplog: pytest.LogCaptureFixture) -> None:
    """At the earliest ten seconds after the start. It is logged once, and again when delivery resumes."""
    clock = ManualClock()
    elsewhere = ExternalRunner(outbox_dir, clock)
    elsewhere.start()
    assert elsewhere.sinks()[""].state == State("idle")
    with caplog.at_level(logging.INFO, "pillarbox"):
        clock.advance(HEARTBEAT_STALE_AFTER_S + 1)
        for _ in range(3):
            elsewhere.notify()
            clock.advance(HEARTBEAT_STALE_AFTER_S + 1)
        state = elsewhere.sinks()[""].state
        assert (state.name, state.reason[:40]) == ("degraded", "no process delivers this directory (is `")
        lease = Lease(outbox_dir, "sqlite:///x", clock)
        assert lease.acquire()
        lease.write_heartbeat(State("waiting", "busy"), 7, "busy", now=True)
        elsewhere.notify()
        assert elsewhere.sinks()[""].state == State("waiting", "busy")
        lease.release()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "a process delivers again, after " in caplog.records[1].message
    assert elsewhere.stop(0)
