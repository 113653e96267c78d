"""What the settings make of delivery: where `Outbox` and `pillarbox deliver` get their `Runner` from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from pillarbox.delivery.deliverer import ONLY_SINK
from pillarbox.delivery.elsewhere import ExternalRunner
from pillarbox.delivery.fanout import FanOutRunner
from pillarbox.delivery.process.protocol import check_importable
from pillarbox.delivery.process.supervisor import Supervisor
from pillarbox.delivery.settlement import retention_for
from pillarbox.delivery.thread import ThreadRunner
from pillarbox.delivery.worker import Worker
from pillarbox.errors import ConfigurationError
from pillarbox.sinks import make_sink, redact_url
from pillarbox.stats import DeliveryCounters
from pillarbox.store.fanout import FanOut

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pillarbox.clock import Clock
    from pillarbox.delivery.deliverer import Runner
    from pillarbox.delivery.settlement import DeliveryCallbacks
    from pillarbox.settings import Settings
    from pillarbox.sinks.base import Sink
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import LedgerWriter


LocalRunner = ThreadRunner | FanOutRunner  # what delivers in this process


class NamedSink(NamedTuple):
    """A sink, and what it is called where people read it: its URL without what is secret."""

    sink: Sink
    display_name: str


def build_sinks(settings: Settings, sink_objects: Mapping[str, Sink]) -> dict[str, NamedSink]:
    """The sinks that the settings name, by their names; `sink_objects` are those that the application has made itself.

    One that is not among several is called `ONLY_SINK`. Raises what `make_sink` raises.
    """
    named: dict[str, object] = {ONLY_SINK: settings.sink} if settings.sink else settings.sinks
    urls = {name: url for name, url in named.items() if isinstance(url, str)}
    found = {name: NamedSink(sink, type(sink).__name__) for name, sink in sink_objects.items()}
    return found | {name: NamedSink(make_sink(url, settings.event_type), redact_url(url)) for name, url in urls.items()}


def check_delivery_settings(settings: Settings, sink_objects: Mapping[str, Sink]) -> None:
    """Raise `ConfigurationError` where delivery cannot be as the settings want it; `sink_objects` were passed as objects."""
    if settings.deliver == "thread":
        return
    if sink_objects:
        advice = "a Sink object cannot be used in another process; pass the sink as a URL, or use 'thread'"
        raise ConfigurationError("deliver", settings.deliver, "the call", advice)
    if settings.deliver == "process":
        if not sys.executable:
            advice = "sys.executable names no Python to start; use 'thread' or 'external'"
            raise ConfigurationError("deliver", settings.deliver, "the call", advice)
        check_importable(settings)


def build_runner(
    settings: Settings,
    directory: Directory,
    clock: Clock,
    ledger: LedgerWriter,
    callbacks: DeliveryCallbacks,
    is_busy: Callable[[], bool],
    sinks: Mapping[str, NamedSink],
) -> Runner | None:
    """What an outbox holds of its delivery; None where there is no sink, and it is not said that another process delivers."""
    if settings.deliver == "external":
        return ExternalRunner(directory, clock)
    if not sinks:
        return None
    if settings.deliver == "process":
        return Supervisor(settings, directory, clock, callbacks, {name: sink.display_name for name, sink in sinks.items()})
    return build_local_runner(settings, directory, clock, ledger, callbacks, is_busy, sinks)


def build_local_runner(
    settings: Settings,
    directory: Directory,
    clock: Clock,
    ledger: LedgerWriter,
    callbacks: DeliveryCallbacks,
    is_busy: Callable[[], bool],
    sinks: Mapping[str, NamedSink],
    *,
    only_delivers: bool = False,
) -> LocalRunner:
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
            is_busy,
            durability,
            settings.settlement_limits,
            pen,
        )

    if ONLY_SINK in sinks:
        return ThreadRunner(worker(directory, ONLY_SINK, ledger))
    fan_out = FanOut(directory, list(sinks), clock, ledger, is_busy)
    return FanOutRunner(
        directory,
        clock,
        ledger,
        fan_out,
        settings.flush_interval,
        {name: destination.display_name for name, destination in sinks.items()},
        lambda queue: worker(queue, queue.sink, fan_out.ledger_for(queue)),
        durability,
        retention_for(directory, clock, settings.settlement_limits),
    )
