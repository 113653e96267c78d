"""What the parts of one worker share: the directory, the sink, the configuration, and the reporting."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.delivery.config import DeliveryConfig
    from pillarbox.delivery.lease import Lease
    from pillarbox.delivery.status import StatusReporter
    from pillarbox.sinks.base import Sink
    from pillarbox.stats import DeliveryCounters
    from pillarbox.store.directory import Directory


class NamedSink(NamedTuple):
    """A sink and its display name: its URL without secrets, or the name of its class."""

    sink: Sink
    display_name: str


class DeliveryContext(NamedTuple):
    """The delivery of one queue to one sink."""

    directory: Directory
    sink: Sink
    sink_name: str
    clock: Clock
    config: DeliveryConfig
    counters: DeliveryCounters
    lease: Lease
    status: StatusReporter
