"""The instruments, read by a real OpenTelemetry SDK. Each test starts a process, because a process has only one meter provider."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

from pillarbox.stats import StateName

PROGRAM = """
import json, sys, threading
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from pillarbox import Outbox, TrackingEvent
def on_drop(reason, count):
    raise ValueError
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
outbox = Outbox(sys.argv[1], sink=sys.argv[2], on_drop=on_drop, flush_interval=60)
for number in range(3):
    outbox.enqueue(TrackingEvent(event_id=str(number % 2), event_key="k", scope_kind="Site", scope_id="s"))
outbox.enqueue("bad")
outbox.flush(50)
while outbox.stats().state.name != "idle" or not outbox.stats().hook_failures["on_drop"]:
    threading.Event().wait(0.01)
outbox.enqueue(TrackingEvent(event_key="k", scope_kind="Site", scope_id="s"))
found, states = {}, {}
for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
    for point in metric.data.data_points:
        attributes = {key: value for key, value in point.attributes.items() if key != "outbox"}
        number = point.count if hasattr(point, "count") else point.value
        if metric.name == "pillarbox.state":
            states[attributes["state"]] = number
        elif number:
            found[" ".join([metric.name, metric.unit, *attributes.values()])] = number
print(json.dumps([found, states]))
outbox.close()
"""


def test_every_count_reaches_an_opentelemetry_reader(tmp_path: Path) -> None:
    """With its unit and attributes. The size of the pending event is only checked roughly."""
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "outbox"), f"sqlite:///{tmp_path}/events.db"]
    values, states = json.loads(subprocess.run(arguments, check=True, timeout=60, capture_output=True).stdout)
    assert 200 < values.pop("pillarbox.pending.bytes By") < 400
    assert 500 < values.pop("pillarbox.flushed.bytes By") < 1000
    assert values == {
        "pillarbox.pending.files {file}": 1,
        "pillarbox.enqueued {event}": 4,
        "pillarbox.dropped {event} invalid": 1,
        "pillarbox.sealed {file} manual": 1,
        "pillarbox.delivered {event}": 3,
        "pillarbox.duplicates {event}": 1,
        "pillarbox.flushed.files {file}": 1,
        "pillarbox.flush.duration s": 1,
        "pillarbox.hook.failures {call} on_drop": 1,
    }
    assert states == {name: int(name == "idle") for name in get_args(StateName)}


SEVERAL_SINKS_PROGRAM = """
import json, sys
from msgspec.structs import replace
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from pillarbox import Outbox
from pillarbox.stats import State
from pillarbox.telemetry import instruments
from pillarbox.stats import DeliveryCounters
class Several:
    name = "box"
    def stats(self):
        live, warehouse = DeliveryCounters(), DeliveryCounters()
        live.delivered, warehouse.delivered = 3, 5
        sinks = {"live": live.to_stats(State("idle"), ""), "warehouse": warehouse.to_stats(State("stopped"), "")}
        return replace(Outbox(sys.argv[1]).stats(), delivered=8, sinks=sinks)
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
several = Several()
instruments().observe_outbox(several)
found = {}
for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
    found[metric.name] = [[dict(point.attributes), point.value] for point in metric.data.data_points if point.value]
print(json.dumps(found))
"""


def test_with_several_sinks_the_metrics_have_one_value_for_each(tmp_path: Path) -> None:
    """The reader of the metrics can add them up."""
    arguments = [sys.executable, "-c", SEVERAL_SINKS_PROGRAM, str(tmp_path / "outbox")]
    values = json.loads(subprocess.run(arguments, check=True, timeout=60, capture_output=True).stdout)
    assert values["pillarbox.delivered"] == [
        [{"outbox": "box", "sink": "live"}, 3],
        [{"outbox": "box", "sink": "warehouse"}, 5],
    ]
    assert values["pillarbox.state"] == [
        [{"outbox": "box", "state": "idle", "sink": "live"}, 1],
        [{"outbox": "box", "state": "stopped", "sink": "warehouse"}, 1],
    ]
