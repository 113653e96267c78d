"""Builds the sinks and the runner that the settings describe, for an outbox or for `pillarbox deliver`."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from pillarbox.delivery.context import NamedSink
from pillarbox.delivery.fanout import FanOut, FanOutRunner
from pillarbox.delivery.process.protocol import check_importable
from pillarbox.delivery.process.supervisor import Supervisor, find_interpreter
from pillarbox.delivery.runner import ONLY_SINK, ExternalRunner, ThreadRunner
from pillarbox.delivery.settlement import retention_for
from pillarbox.delivery.worker import Worker
from pillarbox.errors import ConfigurationError
from pillarbox.sinks import make_sink, redact_url
from pillarbox.sinks.paths import absolute_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pillarbox.clock import Clock
    from pillarbox.delivery.runner import Runner
    from pillarbox.delivery.settlement import DeliveryCallbacks
    from pillarbox.settings import Settings
    from pillarbox.sinks.base import Sink
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import LedgerWriter

log = logging.getLogger("pillarbox")

LocalRunner = ThreadRunner | FanOutRunner  # delivers in this process


def build_sinks(settings: Settings, sink_objects: Mapping[str, Sink], working_directory: str = "") -> dict[str, NamedSink]:
    """The sinks that the settings name, by name; a single sink is called `ONLY_SINK`.

    `sink_objects` are sinks that the application passed as objects. Paths in URLs are relative to `working_directory`; if it is
    empty, to that of the process. Raises what `make_sink` raises.
    """
    named: dict[str, object] = {ONLY_SINK: settings.sink} if settings.sink else settings.sinks
    urls = {name: url for name, url in named.items() if isinstance(url, str)}
    objects = {name: NamedSink(sink, type(sink).__name__) for name, sink in sink_objects.items()}
    return objects | {
        name: NamedSink(make_sink(absolute_url(url, working_directory), settings.event_type), redact_url(url))
        for name, url in urls.items()
    }


def check_delivery_settings(settings: Settings, sink_objects: Mapping[str, Sink]) -> None:
    """Raise `ConfigurationError` if delivery cannot be set up like this; `sink_objects` were passed as objects."""
    if settings.deliver == "thread":
        return
    if sink_objects:
        advice = "a Sink object cannot be used in another process; pass the sink as a URL, or use 'thread'"
        raise ConfigurationError("deliver", settings.deliver, "the call", advice)
    if settings.deliver == "process":
        if not find_interpreter():
            advice = f"there is no Python to start (sys.executable is {sys.executable!r}); use 'thread' or 'external'"
            raise ConfigurationError("deliver", settings.deliver, "the call", advice)
        check_importable(settings)


def warn_of_volatile_sinks(settings: Settings, sinks: Mapping[str, NamedSink]) -> None:
    """Warn of sinks at which delivered events do not survive a power loss, of an outbox whose events do."""
    advice = "set keep_delivered, so that `pillarbox redeliver` can deliver them again"
    if settings.keep_delivered is not None:
        advice = "`pillarbox redeliver` can deliver them again for as long as keep_delivered retains them"
    for sink, display_name in sinks.values():
        if sink.capabilities.survives != "power":
            text = "%s: events survive a power loss here, but not at %s once they are delivered; %s"
            log.warning(text, settings.directory, display_name, advice)


def build_runner(
    settings: Settings,
    directory: Directory,
    clock: Clock,
    ledger: LedgerWriter,
    callbacks: DeliveryCallbacks,
    sinks: Mapping[str, NamedSink],
    working_directory: str = "",
) -> Runner | None:
    """The runner of an outbox, not started yet; None if there is no sink and no external process delivers.

    `working_directory` is what relative paths in the settings refer to; empty if it was deleted.
    """
    if settings.deliver == "external":
        return ExternalRunner(directory, clock)
    if not sinks:
        return None
    if settings.deliver == "process":
        display_names = {name: sink.display_name for name, sink in sinks.items()}
        return Supervisor(settings, directory, clock, callbacks, display_names, working_directory)
    return build_local_runner(settings, directory, clock, ledger, callbacks, sinks)


def build_local_runner(
    settings: Settings,
    directory: Directory,
    clock: Clock,
    ledger: LedgerWriter,
    callbacks: DeliveryCallbacks,
    sinks: Mapping[str, NamedSink],
    *,
    only_delivers: bool = False,
) -> LocalRunner:
    """The runner of a directory in this process, not started yet; `only_delivers` if this process stores nothing."""
    config = settings.delivery_config
    durability = "" if only_delivers else settings.durability
    if ONLY_SINK in sinks:
        return ThreadRunner(Worker(directory, sinks[ONLY_SINK], clock, config, callbacks, ledger, durability))
    fan_out = FanOut(directory, list(sinks), clock, ledger, callbacks.is_busy)

    def build_worker(queue: Directory) -> Worker:
        return Worker(queue, sinks[queue.sink], clock, config, callbacks, fan_out.ledger_for(queue), durability)

    display_names = {name: sink.display_name for name, sink in sinks.items()}
    retention = retention_for(directory, clock, config.limits)
    return FanOutRunner(fan_out, build_worker, display_names, settings.flush_interval, durability, retention)
