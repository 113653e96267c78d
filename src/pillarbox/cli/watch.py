"""`pillarbox status --watch`: samples the status and computes rates; live on a terminal, otherwise a line per sample."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pillarbox.admin.status import OutboxStatus, describe_state, read_status
from pillarbox.admin.text import counted, format_duration, format_time
from pillarbox.cli.output import discard_stdout, flush_stdout, print_json_line, screen_console, write_line
from pillarbox.cli.signals import interrupt_on_sigterm
from pillarbox.errors import FileUnusableError
from pillarbox.escaping import one_line
from pillarbox.store import layout
from pillarbox.store.ledger_entries import SealedEntry, parse_ledger
from pillarbox.system import threads

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.delivery.lease import Heartbeat
    from pillarbox.store.directory import Directory

_RATE_SAMPLES: Final = 10  # samples over which a rate is averaged
_LEDGER_BYTES_MAX: Final = 8 * 2**20  # read from the ledger per sample
_COLOURS: Final = {"stopped": "red", "waiting": "yellow", "degraded": "yellow", "draining": "green"}
ONLY: Final = ""  # the name of a single sink


class SinkRates(msgspec.Struct, frozen=True):
    """Rates of one sink; a rate is None if it is unknown."""

    out_events_per_s: float | None  # events delivered per second
    empty_in_s: float | None  # seconds until the backlog is empty at this rate


class Rates(msgspec.Struct, frozen=True):
    """Rates over the last ten samples; a rate is None if it is unknown, as in the first sample."""

    in_events_per_s: float | None  # events stored per second
    in_bytes_per_s: float | None  # bytes stored per second
    sinks: dict[str, SinkRates]  # by name of the sink; "" for a single one


class StatusSample(msgspec.Struct, frozen=True):
    """The shape of a line of `pillarbox status --watch --json`."""

    at_micros: int  # when the sample was taken
    status: OutboxStatus  # what `status --json` prints
    rates: Rates  # rates since earlier samples


class _SinkRow(NamedTuple):
    """One sink as it is shown."""

    name: str
    waiting_bytes: int
    waiting_files: int
    oldest_age_s: float | None
    heartbeat: Heartbeat | None
    heartbeat_age_s: float | None
    dead_files: int


class _RateInput(NamedTuple):
    """A sample, as far as rates are computed from it."""

    at_s: float
    status: OutboxStatus
    sealed_events: int  # since the first sample, from the ledger
    sealed_bytes: int
    has_ledger: bool


class StatusWatcher:
    """Takes samples and computes rates from the samples before."""

    def __init__(self, directory: Directory, clock: Clock, durability: str, max_bytes: int = 0) -> None:
        self._directory = directory
        self._clock = clock
        self._durability = durability
        self._max_bytes = max_bytes
        self._rate_inputs: deque[_RateInput] = deque(maxlen=_RATE_SAMPLES + 1)
        self._read_to: int | None = None  # of the ledger
        self._sealed_events = self._sealed_bytes = 0

    def sample(self) -> StatusSample:
        """Take a sample; raises `DirectoryUnusableError` if the directory cannot be listed."""
        status = read_status(self._directory, self._clock, self._durability, self._max_bytes)
        has_ledger = self._read_ledger()
        self._rate_inputs.append(
            _RateInput(self._clock.monotonic(), status, self._sealed_events, self._sealed_bytes, has_ledger)
        )
        return StatusSample(self._clock.micros(), status, rates_of(self._rate_inputs[0], self._rate_inputs[-1]))

    def _read_ledger(self) -> bool:
        """Add up what was sealed since the last sample; False if the ledger cannot be read."""
        filesystem = self._directory.filesystem
        try:
            fd = filesystem.open_existing(self._directory.path_of(layout.LEDGER))
        except FileNotFoundError:
            self._read_to = 0
            return True
        except (OSError, FileUnusableError):
            return False
        try:
            size = filesystem.size(fd)
            if self._read_to is None or not 0 <= size - self._read_to <= _LEDGER_BYTES_MAX:
                self._read_to = size  # the first sample, or the ledger was compacted since
                self._rate_inputs.clear()
                return True
            data = filesystem.read_at(fd, self._read_to, size - self._read_to)
        except OSError:
            return False
        finally:
            filesystem.close(fd)
        whole = data[: data.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for entry in parse_ledger(whole)[0]:
            if isinstance(entry, SealedEntry) and entry.events is not None:
                self._sealed_events += entry.events
                self._sealed_bytes += entry.bytes
        return True


def rates_of(then: _RateInput, now: _RateInput) -> Rates:
    """The rates per second between two samples."""
    seconds = now.at_s - then.at_s
    in_bytes = in_events = None
    if seconds > 0 and then.has_ledger and now.has_ledger:
        sealed = now.sealed_bytes - then.sealed_bytes
        in_bytes = max(0, now.status.active_bytes - then.status.active_bytes + sealed) / seconds
        if now.sealed_events:
            in_events = in_bytes * now.sealed_events / now.sealed_bytes
        elif not in_bytes:
            in_events = 0.0
    before = {line.name: line for line in _sink_rows(then.status)}
    return Rates(
        in_events, in_bytes, {line.name: _sink_rates(before.get(line.name), line, seconds) for line in _sink_rows(now.status)}
    )


def _sink_rates(then: _SinkRow | None, now: _SinkRow, seconds: float) -> SinkRates:
    out = None
    if (
        then is not None
        and then.heartbeat is not None
        and now.heartbeat is not None
        and then.heartbeat.pid == now.heartbeat.pid
    ):
        between_s = (now.heartbeat.at_micros - then.heartbeat.at_micros) / 1e6
        delivered = now.heartbeat.delivered - then.heartbeat.delivered
        if delivered >= 0:
            out = delivered / between_s if between_s > 0 else 0.0 if seconds > 0 else None
    empty = 0.0 if not now.waiting_bytes else None
    if then is not None and seconds > 0 and now.waiting_bytes and then.waiting_bytes > now.waiting_bytes:
        empty = now.waiting_bytes * seconds / (then.waiting_bytes - now.waiting_bytes)
    return SinkRates(out, empty)


def _sink_rows(status: OutboxStatus) -> list[_SinkRow]:
    if not status.sinks:
        return [
            _SinkRow(
                ONLY, status.pending_bytes, status.pending_files, status.oldest_age_s, status.heartbeat,
                status.heartbeat_age_s, status.dead_files,
            )
        ]  # fmt: skip
    return [
        _SinkRow(
            sink.name, sink.backlog_bytes, sink.backlog_files, sink.oldest_age_s, sink.heartbeat, sink.heartbeat_age_s,
            sink.dead_files,
        )
        for sink in status.sinks
    ]  # fmt: skip


def watch_until_stopped(
    directory: Directory, clock: Clock, durability: str, max_bytes: int = 0, *, interval: float, samples: int, json: bool
) -> None:
    """Show a sample every `interval` seconds until interrupted, or until `samples` are shown (0: no limit)."""
    interrupt_on_sigterm()
    watcher = StatusWatcher(directory, clock, durability, max_bytes)
    console = screen_console()
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not json else None
    pause = threads.Event()
    try:
        with suppress(KeyboardInterrupt), live or nullcontext():
            done = 0
            while True:
                sample = watcher.sample()
                if live is not None:
                    live.update(sample_screen(sample), refresh=True)
                else:
                    if json:
                        print_json_line(sample)
                    else:
                        write_line(sample_line(sample))
                    flush_stdout()
                done += 1
                if done == samples:
                    return
                pause.wait(interval)
    except BrokenPipeError:
        discard_stdout()


def sample_line(sample: StatusSample) -> str:
    """A sample as one line, for logs and pipes."""
    status, rates = sample.status, sample.rates
    parts = [
        f"in {_rate(rates.in_events_per_s, 'events')}, {_rate(rates.in_bytes_per_s, 'bytes')}",
        f"pending {_files_and_bytes(status.pending_files, status.pending_bytes)}",
    ]
    for sink in _sink_rows(status):
        sink_rates = rates.sinks[sink.name]
        name = f"{sink.name}: {counted(sink.waiting_files, 'file')} pending, " if sink.name else ""
        parts.append(
            f"{name}oldest {format_duration(sink.oldest_age_s)}, out {_rate(sink_rates.out_events_per_s, 'events')}, "
            f"empty in {format_duration(sink_rates.empty_in_s)}, {describe_state(sink.heartbeat, sink.heartbeat_age_s)}"
        )
    totals = (
        ("dead letters", status.dead_files),
        ("quarantine", status.quarantine_files),
        ("retained", status.delivered_files),
    )
    parts.append(", ".join(f"{name} {counted(count, 'file')}" for name, count in totals))
    return f"{format_time(sample.at_micros)} {'; '.join(parts)}"


def sample_screen(sample: StatusSample) -> Group:
    """A sample as a terminal of at least 80 columns shows it."""
    status, rates = sample.status, sample.rates
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    active = f" ({status.active_files:,} active)" if status.active_files else ""
    for name, text in (
        ("directory", status.directory),
        ("time", format_time(sample.at_micros)),
        ("in", f"{_rate(rates.in_events_per_s, 'events')}, {_rate(rates.in_bytes_per_s, 'bytes')}"),
        ("pending", _files_and_bytes(status.pending_files, status.pending_bytes) + active),
        ("dead letters", _files_and_bytes(status.dead_files, status.dead_bytes)),
        ("quarantine", _files_and_bytes(status.quarantine_files, status.quarantine_bytes)),
        ("retained", _files_and_bytes(status.delivered_files, status.delivered_bytes)),
    ):
        facts.add_row(name, Text(one_line(text), overflow="ellipsis", no_wrap=True))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("destination", overflow="ellipsis", no_wrap=True, max_width=20)
    for name in ("pending", "oldest", "out/s", "empty in", "dead"):
        table.add_column(name, justify="right", no_wrap=True)
    states = []
    for sink in _sink_rows(status):
        sink_rates = rates.sinks[sink.name]
        name = one_line(sink.name or (sink.heartbeat.sink if sink.heartbeat is not None else "-"))
        out = "-" if sink_rates.out_events_per_s is None else f"{sink_rates.out_events_per_s:,.0f}"
        table.add_row(
            Text(name),
            _size(sink.waiting_bytes),
            format_duration(sink.oldest_age_s),
            out,
            format_duration(sink_rates.empty_in_s),
            f"{sink.dead_files:,}",
        )
        states.append(_state_text(name, sink))
    return Group(facts, Text(), table, Text(), *states)


def _state_text(name: str, sink: _SinkRow) -> Text:
    text = Text(f"{name}  ", style="bold")
    heartbeat = sink.heartbeat
    colour = _COLOURS.get(heartbeat.state.name, "") if heartbeat is not None else ""
    text.append(one_line(describe_state(heartbeat, sink.heartbeat_age_s)), style=f"not bold {colour}")
    if heartbeat is not None and heartbeat.last_error and heartbeat.last_error != heartbeat.state.reason:
        text.append(f"\n  last error: {one_line(heartbeat.last_error)}", style="not bold")
    return text


def _files_and_bytes(files: int, size: int) -> str:
    return f"{counted(files, 'file')}, {counted(size, 'byte')}"


def _rate(rate: float | None, unit: str) -> str:
    return f"- {unit}/s" if rate is None else f"{rate:,.0f} {unit}/s"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 10_000 or unit == "GB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}"
