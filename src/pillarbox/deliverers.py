"""What the settings make of delivery: where `Outbox` and `pillarbox deliver` get their `Deliverer` from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pillarbox.delivery.thread import DeliveryThread
from pillarbox.delivery.worker import Worker
from pillarbox.telemetry import DeliveryCounters

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.delivery.settlement import Callbacks
    from pillarbox.settings import Settings
    from pillarbox.sinks.base import Sink
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import Ledger


def make_deliverer(
    settings: Settings,
    directory: Directory,
    clock: Clock,
    ledger: Ledger,
    callbacks: Callbacks,
    busy: Callable[[], bool],
    sink: Sink,
    sink_name: str,
) -> DeliveryThread:
    """The delivery of a directory as the settings want it, not begun yet."""
    worker = Worker(
        directory,
        sink,
        sink_name,
        clock,
        settings.rules,
        DeliveryCounters(),
        callbacks,
        busy,
        settings.durability,
        settings.kept,
        ledger,
    )
    return DeliveryThread(worker)
