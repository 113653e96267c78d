"""A standard stream whose writers never block: text waits in memory, and is lost if the reader stays behind too far."""

from __future__ import annotations

import io
import os
from collections import deque
from typing import TYPE_CHECKING, Final

from pillarbox.system import originals, threads

if TYPE_CHECKING:
    from typing import TextIO

_BYTES_MAX: Final = 1 << 20  # in memory
_WRITE_BYTES: Final = 1 << 12  # per call; a pipe accepts as much atomically


class QueuedStream(io.TextIOBase):
    """A text stream that a daemon thread writes to the descriptor of another stream."""

    def __init__(self, stream: TextIO) -> None:
        self.original = stream
        self._fd = stream.fileno()
        self._encoding = stream.encoding
        self._changed = threads.Condition()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0  # including what is being written
        self._lost_lines = 0
        self._is_reader_stuck = False  # a wait for it timed out, and nothing was written since
        self._thread: threads.Thread | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed's can be assigned to
        """The encoding of the other stream."""
        return self._encoding

    def fileno(self) -> int:
        """The descriptor of the other stream."""
        return self._fd

    def isatty(self) -> bool:
        """Whether the other stream is a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """Always true."""
        return True

    def write(self, text: str) -> int:
        """Queue a text. If too much waits already, it is lost, and the number of lost lines is written instead."""
        data = text.encode(self._encoding, "backslashreplace")
        with self._changed.lock:
            if self._waiting_bytes + len(data) > _BYTES_MAX:
                self._lost_lines += text.count("\n")
                return len(text)
            self._append_loss()
            self._append(data)
            if self._thread is None:
                self._thread = threads.Thread(target=self._run, name="pillarbox-output")
                try:
                    self._thread.start()
                except RuntimeError:  # the system cannot start another thread; the next `write` tries again
                    self._thread = None
            self._changed.notify_all()
        return len(text)

    def drain(self, timeout: float) -> bool:
        """Wait until everything is written. Returns False if that takes longer than `timeout` seconds."""
        with self._changed.lock:
            return self._changed.wait_for(lambda: not self._waiting_bytes, timeout)

    def wait_for_reader(self, timeout: float) -> None:
        """Wait at most `timeout` seconds until everything is written. Return at once if the last wait was in vain."""
        with self._changed.lock:
            if not self._is_reader_stuck:
                self._is_reader_stuck = not self._changed.wait_for(lambda: not self._waiting_bytes, timeout)

    def _append(self, data: bytes) -> None:
        self._waiting.append(data)
        self._waiting_bytes += len(data)

    def _append_loss(self) -> None:
        lost, self._lost_lines = self._lost_lines, 0
        if lost:
            problem = (
                "1 line was lost here: nobody read it" if lost == 1 else f"{lost:,} lines were lost here: nobody read them"
            )
            self._append(f"WARNING {problem}\n".encode())

    def _run(self) -> None:
        while True:
            with self._changed.lock:
                self._changed.wait_for(lambda: self._waiting)
                data = self._waiting.popleft()
            self._write_out(data)
            with self._changed.lock:
                self._waiting_bytes -= len(data)
                self._is_reader_stuck = False
                if not self._waiting_bytes:
                    self._append_loss()
                self._changed.notify_all()

    def _write_out(self, data: bytes) -> None:
        """Write to the descriptor and not to the stream, whose lock the interpreter takes at exit."""
        unwritten = memoryview(data)
        while unwritten:
            try:
                written = os.write(self._fd, unwritten[:_WRITE_BYTES])
            except BlockingIOError:  # a process that shares the descriptor has made it non-blocking
                originals.select.select([], [self._fd], [])
            except OSError:  # the reader is gone, or the volume is full
                return
            else:
                unwritten = unwritten[written:]
