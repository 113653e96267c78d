"""How `Outbox.flush` waits until the batches that are pending now are delivered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pillarbox.system import threads

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.delivery.runner import Runner
    from pillarbox.store.directory import Directory

_POLL_S: Final = 0.05  # between two listings of the directory while another process delivers
_GROUP_WAIT_S: Final = 0.25  # the same while this process delivers, which settles groups of batches at least this often
_LISTING_TIME_SHARE: Final = 10  # a tenth of the time goes into listing the directory


def wait_until_delivered(directory: Directory, runner: Runner | None, clock: Clock, deadline: float) -> bool:
    """Wait until none of the batches that are pending now is left, or until `deadline` on the monotonic clock.

    Returns:
        False if the deadline passed, or the directory could not be listed.
    """
    try:
        initial, pending = _delivered_files(runner), directory.waiting_batch_ids()
        while pending:
            before, delivered = clock.monotonic(), _delivered_files(runner)
            pending &= directory.waiting_batch_ids()
            now = clock.monotonic()
            if not pending:
                break
            if now >= deadline:
                return False
            threads.pause(min(deadline - now, _LISTING_TIME_SHARE * (now - before)))
            idle_s = _POLL_S if delivered == initial else _GROUP_WAIT_S
            _wait_for_files(runner, clock, deadline, idle_s, delivered, len(pending))
    except OSError:
        return False
    return True


def _delivered_files(runner: Runner | None) -> int:
    return sum(sink.flushed_files for sink in runner.sinks().values()) if runner is not None else 0


def _wait_for_files(runner: Runner | None, clock: Clock, deadline: float, idle_s: float, delivered: int, files: int) -> None:
    """Wait until `files` more than `delivered` are delivered, until none is for `idle_s` seconds, or until the deadline.

    Listing the directory earlier would only take time from the delivery worker.
    """
    if runner is None:
        threads.pause(max(0.0, min(deadline - clock.monotonic(), idle_s)))
        return
    latest = delivered
    while (left_s := deadline - clock.monotonic()) > 0 and latest - delivered < files:
        runner.wait_for_settlement(latest, min(left_s, idle_s))
        before, latest = latest, _delivered_files(runner)
        if latest == before:
            return
