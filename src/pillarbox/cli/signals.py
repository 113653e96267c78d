"""Handling of SIGINT (Ctrl-C) and SIGTERM in commands."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


def interrupt_on_sigterm() -> None:
    """Make SIGTERM raise `KeyboardInterrupt`, as SIGINT does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def ignore_signals() -> None:
    """Ignore both: a signal while the interpreter exits would only print a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_within(seconds: float, code: int) -> None:
    """Let the exit of the interpreter, which waits for threads that are no daemons, take `seconds` at most."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    if not others:
        return

    def exit_later() -> None:
        threading.Event().wait(seconds)
        os._exit(code)

    threading.Thread(target=exit_later, daemon=True).start()


@contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` on SIGINT and SIGTERM inside the block, instead of interrupting it."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        act()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
