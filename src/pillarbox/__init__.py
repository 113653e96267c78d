"""Pillarbox: a durable event outbox. Events are safe on the local disk within microseconds and delivered in sealed batches.

outbox.py      what an application holds; entrance.py, what it checks; hooks.py, whom it asks and tells; full.py, what it does
               where there is no room
event.py, outcome.py, settings.py, errors.py, clock.py, telemetry.py   its words
store/         bytes on disk
delivery/      when and what to send, and the one loop that does
child/         that loop in a process of its own, and who looks after it
kept/          what was set aside, and how it comes back
sinks/         one destination, one module or package
cli/           an edge: delete it, and a working library is left
"""

from pillarbox.errors import (
    ConfigurationError,
    DirectoryUnusableError,
    InvalidEventError,
    OutboxFullError,
    PillarboxError,
    SinkUnusableError,
)
from pillarbox.event import ScopeKind, TrackingEvent
from pillarbox.outbox import Outbox
from pillarbox.outcome import Dropped, Enqueued, Outcome
from pillarbox.settings import Settings, resolve
from pillarbox.stats import Stats

__all__ = [
    "ConfigurationError",
    "DirectoryUnusableError",
    "Dropped",
    "Enqueued",
    "InvalidEventError",
    "Outbox",
    "OutboxFullError",
    "Outcome",
    "PillarboxError",
    "ScopeKind",
    "Settings",
    "SinkUnusableError",
    "Stats",
    "TrackingEvent",
    "resolve",
]
