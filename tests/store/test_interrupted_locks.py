"""A signal handler that raises, at every point of a call that acquires a lock of the whole process, leaves the lock free."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from pillarbox import forks
from pillarbox._native import COMPILED
from pillarbox.log_records import LogRelay
from pillarbox.store import os_filesystem
from pillarbox.store.os_filesystem import CompiledOsFilesystem, OsFilesystem
from tests.store.test_interrupts import interrupt_at_next, run_and_interrupt

TRACED = {os_filesystem.__file__, forks.__file__}


def is_free(lock: Any) -> bool:
    """Whether another thread can acquire the lock."""
    acquired: list[bool] = []

    def acquire() -> None:
        acquired.append(lock.acquire(blocking=False))
        if acquired[0]:
            lock.release()

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join()
    return acquired[0]


@pytest.mark.parametrize("kind", [OsFilesystem, CompiledOsFilesystem] if COMPILED else [OsFilesystem])
def test_an_interrupt_leaves_the_lock_that_a_fork_needs_free(tmp_path: Path, kind: type[OsFilesystem]) -> None:
    """Otherwise no other thread of the process could ever open a file again."""
    filesystem, path = kind(), str(tmp_path / "file")
    filesystem.close(filesystem.create(path))

    def open_and_close() -> None:
        filesystem.close(filesystem.open_existing(path))

    opcodes = run_and_interrupt(10**9, interrupt_at_next, open_and_close, TRACED)
    interrupts = 0
    for number in range(1, opcodes + 1):
        try:
            run_and_interrupt(number, interrupt_at_next, open_and_close, TRACED)
            for _ in range(2):  # a backward jump, at which a signal that is still pending is handled
                pass
        except KeyboardInterrupt:
            interrupts += 1
        assert is_free(forks.fork_lock.lock), f"interrupted before opcode {number} of {opcodes}"
    assert interrupts > opcodes // 2
    with contextlib.suppress(OSError):
        filesystem.close_inherited()


def test_a_signal_handler_may_log_while_its_thread_queues_a_record() -> None:
    """Otherwise it would wait for its own thread forever."""
    relay, returned = LogRelay(), threading.Event()
    record = logging.LogRecord("pillarbox.test", logging.INFO, __file__, 1, "from a signal handler", None, None)

    def log_in_a_handler() -> None:
        with relay._lock:  # as in the middle of `relay`
            relay.relay(logging.getLogger("pillarbox.test"), record)
        returned.set()

    threading.Thread(target=log_in_a_handler, daemon=True).start()
    assert returned.wait(60)
