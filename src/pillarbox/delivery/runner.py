"""What the settings make of delivery: where `Outbox` and `pillarbox deliver` get their `Deliverer` from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from pillarbox.delivery.deliverer import ONLY
from pillarbox.delivery.elsewhere import Elsewhere
from pillarbox.delivery.fanout import Fleet
from pillarbox.delivery.process.protocol import check
from pillarbox.delivery.process.supervisor import Supervisor
from pillarbox.delivery.settlement import shelf_for
from pillarbox.delivery.thread import DeliveryThread
from pillarbox.delivery.worker import Worker
from pillarbox.errors import ConfigurationError
from pillarbox.sinks import make_sink, redact_url
from pillarbox.stats import DeliveryCounters
from pillarbox.store.fanout import FanOut

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pillarbox.clock import Clock
    from pillarbox.delivery.deliverer import Deliverer
    from pillarbox.delivery.settlement import Callbacks
    from pillarbox.settings import Settings
    from pillarbox.sinks.base import Sink
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import LedgerWriter


Here = DeliveryThread | Fleet  # what delivers in this process


class Destination(NamedTuple):
    """A sink, and what it is called where people read it: its URL without what is secret."""

    sink: Sink
    text: str


def destinations(settings: Settings, given: Mapping[str, Sink]) -> dict[str, Destination]:
    """The sinks that the settings name, by their names; `given` are those that the application has made itself.

    One that is not among several is called `ONLY`. Raises what `make_sink` raises.
    """
    named: dict[str, object] = {ONLY: settings.sink} if settings.sink else settings.sinks
    urls = {name: url for name, url in named.items() if isinstance(url, str)}
    found = {name: Destination(sink, type(sink).__name__) for name, sink in given.items()}
    return found | {name: Destination(make_sink(url, settings.event_type), redact_url(url)) for name, url in urls.items()}


def check_delivery(settings: Settings, given: Mapping[str, Sink]) -> None:
    """Raise `ConfigurationError` where delivery cannot be as the settings want it; `given` are sinks that were handed over."""
    if settings.deliver == "thread":
        return
    if given:
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
    ledger: LedgerWriter,
    callbacks: Callbacks,
    busy: Callable[[], bool],
    sinks: Mapping[str, Destination],
) -> Deliverer | None:
    """What an outbox holds of its delivery; None where there is no sink, and it is not said that another process delivers."""
    if settings.deliver == "external":
        return Elsewhere(directory, clock)
    if not sinks:
        return None
    if settings.deliver == "process":
        return Supervisor(settings, directory, clock, callbacks, {name: sink.text for name, sink in sinks.items()})
    return make_deliverer(settings, directory, clock, ledger, callbacks, busy, sinks)


def make_deliverer(
    settings: Settings,
    directory: Directory,
    clock: Clock,
    ledger: LedgerWriter,
    callbacks: Callbacks,
    busy: Callable[[], bool],
    sinks: Mapping[str, Destination],
    *,
    only_delivers: bool = False,
) -> Here:
    """The delivery of a directory as the settings want it, not begun yet; `only_delivers` where nothing is stored here."""
    durability = "" if only_delivers else settings.durability

    def worker(place: Directory, name: str, pen: LedgerWriter) -> Worker:
        sink, text = sinks[name]
        counters = DeliveryCounters()
        return Worker(
            place,
            sink,
            text,
            clock,
            settings.delivery_config,
            counters,
            callbacks,
            busy,
            durability,
            settings.settlement_limits,
            pen,
        )

    if ONLY in sinks:
        return DeliveryThread(worker(directory, ONLY, ledger))
    fan_out = FanOut(directory, list(sinks), clock, ledger, busy)
    return Fleet(
        directory,
        clock,
        ledger,
        fan_out,
        settings.flush_interval,
        {name: destination.text for name, destination in sinks.items()},
        lambda queue: worker(queue, queue.sink, fan_out.ledger_of(queue)),
        durability,
        shelf_for(directory, clock, settings.settlement_limits),
    )
