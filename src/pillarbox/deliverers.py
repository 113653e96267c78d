"""What the settings make of delivery: where `Outbox` and `pillarbox deliver` get their `Deliverer` from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pillarbox.child.messages import check
from pillarbox.child.supervisor import Supervisor
from pillarbox.delivery.elsewhere import Elsewhere
from pillarbox.delivery.thread import DeliveryThread
from pillarbox.delivery.worker import Worker
from pillarbox.errors import ConfigurationError
from pillarbox.telemetry import DeliveryCounters

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.delivery.deliverer import Deliverer
    from pillarbox.delivery.settlement import Callbacks
    from pillarbox.settings import Settings
    from pillarbox.sinks.base import Sink
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import Ledger


def check_delivery(settings: Settings, sink: Sink | None) -> None:
    """Raise `ConfigurationError` where delivery cannot be as the settings want it; `sink` is one that was handed over."""
    if settings.deliver == "thread":
        return
    if sink is not None:
        allowed = "'thread' where the sink is an object: another process makes its own, of the sink's URL"
        raise ConfigurationError("deliver", settings.deliver, "the call", allowed)
    if settings.deliver == "process":
        if not sys.executable:
            allowed = "'thread' or 'external' here: sys.executable names no Python to start"
            raise ConfigurationError("deliver", settings.deliver, "the call", allowed)
        check(settings)


def deliverer_for(
    settings: Settings,
    directory: Directory,
    clock: Clock,
    ledger: Ledger,
    callbacks: Callbacks,
    busy: Callable[[], bool],
    sink: Sink | None,
    sink_name: str,
) -> Deliverer | None:
    """What an outbox holds of its delivery; None where there is no sink, and it is not said that another process delivers."""
    if settings.deliver == "external":
        return Elsewhere(directory, clock)
    if sink is None:
        return None
    if settings.deliver == "process":
        return Supervisor(settings, directory, clock, callbacks, sink_name)
    return make_deliverer(settings, directory, clock, ledger, callbacks, busy, sink, sink_name)


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
    """The delivery of a directory by this process, not begun yet."""
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
