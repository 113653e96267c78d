"""Pillarbox: a durable outbox for events.

`Outbox.enqueue` stores an event on the local disk within microseconds; events are delivered in batches in the background.

outbox.py      what an application uses; codec.py (checks and encodes events), hooks.py, backpressure.py and flush.py help it
event.py, outcome.py, settings.py, errors.py, stats.py   what it passes in and gets back
clock.py, telemetry.py   time, and OpenTelemetry instruments
escaping.py, redaction.py   keep control characters out of logs and terminals, and secrets out of messages
log_records.py   tells our log records from an application's; a handler that blocks does not delay delivery
store/         files on disk
delivery/      reads batches and sends them; delivery/process/ does so in a child process
sinks/         destinations, one module or package each
admin/         dead letters, quarantine, redelivery, inspection
exporters/     metrics for Prometheus and OTLP
cli/           the command line; the library does not depend on it
testing/       doubles for the tests of applications, and crash and fault simulation
"""

import logging
from typing import Final

from pillarbox.errors import (
    ConfigurationError,
    DirectoryUnusableError,
    FileUnusableError,
    InvalidEventError,
    OperationalError,
    OutboxFullError,
    PillarboxError,
    SinkUnusableError,
    UsageError,
)
from pillarbox.escaping import EscapingFilter
from pillarbox.event import ScopeKind, TrackingEvent
from pillarbox.log_records import RelayFilter, SkipOwnLogRecords, is_own_log_record
from pillarbox.outbox import Outbox
from pillarbox.outcome import Dropped, DropReason, Durability, Enqueued, Outcome
from pillarbox.settings import Settings, resolve
from pillarbox.sinks.base import Sink
from pillarbox.stats import SinkStats, State, Stats

__version__: Final = "0.1.0"

logging.getLogger("pillarbox").addFilter(EscapingFilter())
logging.getLogger("pillarbox").addFilter(RelayFilter())

__all__ = [
    "ConfigurationError",
    "DirectoryUnusableError",
    "DropReason",
    "Dropped",
    "Durability",
    "Enqueued",
    "FileUnusableError",
    "InvalidEventError",
    "OperationalError",
    "Outbox",
    "OutboxFullError",
    "Outcome",
    "PillarboxError",
    "ScopeKind",
    "Settings",
    "Sink",
    "SinkStats",
    "SinkUnusableError",
    "SkipOwnLogRecords",
    "State",
    "Stats",
    "TrackingEvent",
    "UsageError",
    "__version__",
    "is_own_log_record",
    "resolve",
]
