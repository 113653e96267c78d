"""Sends a file that is larger than a window: each window as a batch `id:first-last`, in order, one after the other.

The ids and the ends of the windows are the same at every attempt. If delivery is interrupted between two windows, the file is
sent again from its beginning; a destination that deduplicates already has the earlier windows. The file is settled as a whole
once all windows are sent and, if the sink needs confirmation, confirmed.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from pillarbox.delivery.batch import DeliveredFile, SentBatch
from pillarbox.delivery.rejects import FileRejects
from pillarbox.delivery.retry import Verdict
from pillarbox.delivery.settlement import QuarantineFullError
from pillarbox.errors import FileUnusableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pillarbox.delivery.batch import SendRequest, SendResult
    from pillarbox.delivery.context import DeliveryContext
    from pillarbox.delivery.sender import Sender
    from pillarbox.delivery.settlement import Settler


class WindowsEnd(Enum):
    """How an attempt to send a file in windows ended."""

    SENT = "sent"  # all windows were sent
    DEFERRED = "deferred"  # the destination rejected all records; the verdict comes later
    RETRY = "retry"  # the file is closed, and is sent again later
    ENDING = "ending"  # the worker must end


class WindowsResult(NamedTuple):
    """The result of one attempt."""

    end: WindowsEnd
    last: SendResult  # of the last window that was sent, or of the rejected one for which the file is deferred
    sent: SentBatch | None = None  # what must be settled, if all windows were sent


class WindowedSender:
    """Sends files in windows. `confirm(sent)` waits until a window is confirmed, and returns False if it must be sent again."""

    def __init__(
        self,
        context: DeliveryContext,
        sender: Sender,
        settler: Settler,
        confirm: Callable[[SentBatch], Awaitable[bool]],
    ) -> None:
        self._directory = context.directory
        self._clock = context.clock
        self._lease = context.lease
        self._sink_name = context.sink_name
        self._needs_confirmation = context.sink.capabilities.needs_confirmation
        self._sender = sender
        self._settler = settler
        self._confirm = confirm

    async def send(self, request: SendRequest) -> WindowsResult:
        """Send all windows of the file. After an exception the caller closes the file."""
        rejects = FileRejects(self._directory, request.files[0].batch_id)
        try:
            result = await self._send_windows(request, rejects)
        except BaseException:
            self._settler.abandon_rejects(rejects)
            raise
        if result.end is not WindowsEnd.SENT:
            self._settler.abandon_rejects(rejects)
        return result

    async def _send_windows(self, request: SendRequest, rejects: FileRejects) -> WindowsResult:
        (file,) = request.files
        accepted = duplicates = 0
        last_rejected: SendResult | None = None  # of the last window with rejected records
        while True:
            result = await self._sender.send(request)
            if result.verdict is None:
                return WindowsResult(WindowsEnd.ENDING, result)
            is_answered = bool(result.accepted) or len(result.rejected) == request.records
            if result.verdict is not Verdict.FINAL and not is_answered:
                return WindowsResult(WindowsEnd.DEFERRED, result)
            last_rejected = result if result.rejected else last_rejected
            accepted += result.accepted
            duplicates += result.duplicates
            delivered = DeliveredFile(file, accepted, duplicates, {}, rejects)
            try:
                if file.window is not None:
                    letters = result.window_letters(self._sink_name, self._clock.micros()) if result.rejected else {}
                    self._settler.write_window(rejects, file.window, letters)
                is_last = not request.has_next_window
                if is_last and not accepted and last_rejected is not None and last_rejected.verdict is not Verdict.FINAL:
                    return WindowsResult(WindowsEnd.DEFERRED, last_rejected)
                sent = SentBatch(request.batch, [delivered] if is_last else [])
                if not is_last and not await self._can_continue(sent, result, request):
                    return WindowsResult(WindowsEnd.RETRY, result)
                if is_last:
                    file.payloads = request.batch.payloads = ()
                    return WindowsResult(WindowsEnd.SENT, result, sent)
                request.advance(result)
            except QuarantineFullError as full:
                self._settler.hold_without_space(delivered, full)
                return WindowsResult(WindowsEnd.RETRY, result)
            except (OSError, FileUnusableError, MemoryError) as error:
                self._settler.hold_failed(delivered, error)
                return WindowsResult(WindowsEnd.RETRY, result)

    async def _can_continue(self, sent: SentBatch, result: SendResult, request: SendRequest) -> bool:
        """Wait until this window is confirmed. Returns whether to send the next one; if not, the file is closed."""
        is_confirmed = not self._needs_confirmation or not result.accepted or await self._confirm(sent)
        if is_confirmed and self._lease.is_held:
            return True
        request.close_files(self._directory.filesystem)
        return False
