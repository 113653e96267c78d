"""An outbox whose threads cannot be started stores nothing, says why, and starts as soon as they can be."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pillarbox import ConfigurationError, Outbox
from pillarbox.outcome import DROPPED, ENQUEUED_POWER, Outcome
from tests.conftest import event, open_files_below, wait_until

SINGLE: dict[str, Any] = {"sink": "sqlite:///{}/events.db"}
SEVERAL: dict[str, Any] = {"sinks": {"first": "sqlite:///{}/first.db", "second": "sqlite:///{}/second.db"}}
OUTBOXES: dict[str, dict[str, Any]] = {
    "no sink": {},
    "single sink": SINGLE,
    "several sinks": SEVERAL,
    "child process": SINGLE | {"deliver": "process"},
    "power": SINGLE | {"durability": "power"},
}
NO_THREAD = "can't start new thread"


def outbox_in(folder: Path, settings: dict[str, Any]) -> Outbox:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        return value.format(folder)

    return Outbox(folder / "box", **filled(settings))


def refuse_thread(monkeypatch: pytest.MonkeyPatch, is_refused: Callable[[int, str], bool]) -> None:
    """Have the start of threads fail, as at a limit of threads: of those whose number from now on, and name, are refused."""
    numbers = itertools.count(1)
    start = threading.Thread.start

    def start_or_fail(thread: threading.Thread) -> None:
        if is_refused(next(numbers), thread.name):
            raise RuntimeError(NO_THREAD)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)


@pytest.mark.parametrize("settings", OUTBOXES.values(), ids=OUTBOXES)
@pytest.mark.parametrize("number", [1, 2])
def test_without_a_thread_nothing_is_accepted_and_the_next_event_starts_the_outbox(
    tmp_path: Path, settings: dict[str, Any], number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No thread and no file of the failed attempt is left."""
    if not settings and number == 2:
        pytest.skip("without a sink there is one thread")
    outbox = outbox_in(tmp_path, settings)
    threads = set(threading.enumerate())
    refuse_thread(monkeypatch, lambda started, _: started == number)
    assert outbox.enqueue(event(1)) == DROPPED["io_error"]
    stats = outbox.stats()
    assert (stats.state.name, NO_THREAD in stats.state.reason, stats.accepted) == ("degraded", True, 0)
    assert caplog.text.count(NO_THREAD) == 1
    for thread in set(threading.enumerate()) - threads:
        thread.join(60)
    assert not open_files_below(tmp_path)
    monkeypatch.undo()
    assert outbox.enqueue(event(2))
    assert not settings or outbox.flush(60)
    stats = outbox.stats()
    assert (stats.state.name != "degraded", stats.accepted, stats.dropped["io_error"]) == (True, 1, 1)
    assert [thread.name for thread in set(threading.enumerate()) - threads].count("pillarbox-sealer") == 1
    outbox.close()


def test_a_sink_whose_thread_cannot_be_started_gets_its_events_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Meanwhile the state says so."""
    with outbox_in(tmp_path, SEVERAL) as outbox:
        refuse_thread(monkeypatch, lambda _, name: name == "pillarbox-delivery")
        assert outbox.enqueue(event(1))
        wait_until(lambda: NO_THREAD in outbox.stats().state.reason)
        assert "defect" not in caplog.text
        monkeypatch.undo()
        assert outbox.flush(60)
        assert {sink.delivered for sink in outbox.stats().sinks.values()} == {1}


def test_without_a_thread_for_commits_coroutines_commit_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event is answered, and is on the disk."""
    refuse_thread(monkeypatch, lambda _, name: name == "pillarbox-committer")

    async def enqueue_many() -> list[Outcome]:
        return await asyncio.gather(*(outbox.enqueue_async(event(number)) for number in range(20)))

    with Outbox(tmp_path / "box", durability="power") as outbox:
        assert set(asyncio.run(enqueue_many())) == {ENQUEUED_POWER}
        assert outbox.stats().accepted == 20


UNDER_A_LIMIT = """
import os, resource, sys, sqlite3
import pillarbox, pillarbox.sinks.sqlite, encodings.idna
from tests.conftest import event
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
limit, outbox = int(sys.argv[1]), pillarbox.Outbox("box", sink="sqlite:///events.db")
resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
print(outbox.enqueue(event(1)), outbox.stats().accepted, outbox.flush(0.1))
outbox.close()
"""


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that every user can reach. Each run of pytest that begins closes the one of `tmp_path` to other users."""
    path = Path(tempfile.mkdtemp(prefix="pillarbox-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(os.getuid() != 0, reason="another user is needed, who has no other thread")
@pytest.mark.parametrize("limit", [1, 2])
def test_at_the_systems_limit_of_threads_nothing_is_accepted(reachable: Path, limit: int) -> None:
    """RLIMIT_NPROC counts the threads of the user."""
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    user = 100_000 + os.getpid()  # of this test alone: the limit counts all threads of a user
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(limit), str(user)]
    done = subprocess.run(command, cwd=reachable, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "Dropped(reason='io_error') 0 False\n"), done.stderr


def test_a_loop_that_is_not_asyncios_is_named_with_a_remedy(tmp_path: Path) -> None:
    """As under trio, where a coroutine runs without a loop of asyncio's."""
    with Outbox(tmp_path / "box", durability="power") as outbox:
        coroutine = outbox.enqueue_async(event(1))
        with pytest.raises(RuntimeError, match=r"asyncio's loop only; .* trio\.to_thread\.run_sync"):
            coroutine.send(None)
        assert outbox.enqueue(event(2))


@pytest.mark.parametrize("frozen", [False, True])
def test_without_a_python_to_start_delivery_in_a_process_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, frozen: bool
) -> None:
    """A frozen application would start itself again and again, as would a server that embeds Python."""
    if frozen:
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr(sys, "executable", "/usr/sbin/uwsgi")
        monkeypatch.setattr(sys, "exec_prefix", str(tmp_path))
    with pytest.raises(ConfigurationError, match="there is no Python to start"):
        outbox_in(tmp_path, OUTBOXES["child process"])


def test_a_server_that_embeds_python_starts_the_python_of_its_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not be called as the server is."""
    interpreter = sys.executable
    monkeypatch.setattr(sys, "executable", "/usr/sbin/uwsgi")
    (tmp_path / "bin").mkdir()
    beside = tmp_path / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    beside.write_text(f'#!/bin/sh\nexec "{interpreter}" "$@"\n')
    beside.chmod(0o755)
    monkeypatch.setattr(sys, "exec_prefix", str(tmp_path))
    with outbox_in(tmp_path, OUTBOXES["child process"]) as outbox:
        assert outbox.enqueue(event(1))
        assert outbox.flush(60)
