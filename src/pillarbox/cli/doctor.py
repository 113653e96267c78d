"""`pillarbox doctor`: can this directory, and the file system below it, keep what is promised? And what stands in the way?"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pillarbox.admin.doctor import DoctorFinding, DoctorLimits, failed, passed, run_checks
from pillarbox.admin.status import read_status
from pillarbox.cli.context import print_json, printable
from pillarbox.cli.main import (
    ConfigOption,
    DirectoryOption,
    EventTypeOption,
    ExitCode,
    JsonOption,
    SinkOption,
    app,
    interrupt_on_sigterm,
    load_settings,
    out,
    require_setting,
)
from pillarbox.clock import SystemClock
from pillarbox.delivery.state import HEARTBEAT_STALE_AFTER_S, Heartbeat
from pillarbox.errors import DirectoryUnusableError, PillarboxError
from pillarbox.outcome import Durability  # noqa: TC001 - typer reads it
from pillarbox.sinks import make_sink, redact_url
from pillarbox.store import layout
from pillarbox.store.directory import OTHERS_MASK, Directory
from pillarbox.store.os_filesystem import exists, local_filesystem
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.admin.status import OutboxStatus
    from pillarbox.clock import Clock
    from pillarbox.settings import Settings
    from pillarbox.sinks.base import CheckResult as SinkFinding

_CLOCK_SKEW_S: Final = 1.0  # by which clocks of one machine may differ


@app.command("doctor")
def doctor(
    directory: DirectoryOption = None,
    durability: Annotated[
        Durability | None, typer.Option(metavar="process|power", help="What is to be promised.", show_default=False)
    ] = None,
    sink: SinkOption = None,
    event_type: EventTypeOption = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For the destinations to answer.", min=0.1)] = 10.0,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Look whether a directory can keep what is promised, and what stands in the way. Exit code 1 where something does.

    Safe at any time: it tries locks, renames and syncs on files of its own, doctor-*.probe, which it removes, and locks,
    creates and adopts nothing else. Where it knows the destinations it asks them too, and sends them no event.
    """
    interrupt_on_sigterm()  # or the probe files would stay
    settings = load_settings(config, directory=directory, durability=durability, sink=sink, event_type=event_type)
    require_setting(settings, "directory", "DIR")
    clock = SystemClock()
    findings = [*_directory_findings(settings, clock), *_destination_findings(settings, timeout, clock)]
    if json:
        print_json([finding._asdict() for finding in findings])
    else:
        out.print(printable(f'{settings.directory}, durability "{settings.durability}"'), markup=False)
        for ok, check, text in findings:
            out.print(printable(f"  {'ok ' if ok else 'BAD'}  {check}: {text}"), markup=False, style=None if ok else "red")
    return ExitCode.DONE if all(finding.ok for finding in findings) else ExitCode.PARTIAL


def _destinations(settings: Settings) -> dict[str, str]:
    """URLs by name; "" where there are not several."""
    return settings.sinks or ({"": settings.sink} if settings.sink else {})


def _directory_findings(settings: Settings, clock: Clock) -> list[DoctorFinding]:
    place = directory_at(settings.directory, local_filesystem(), clock)
    limits = DoctorLimits(
        power=settings.durability == "power",
        max_bytes=settings.max_bytes,
        max_files=settings.max_files,
        min_free_bytes=settings.min_free_bytes,
        evicts=settings.when_full == "drop_oldest",
        max_dead_bytes=settings.max_dead_bytes,
        max_quarantine_bytes=settings.max_quarantine_bytes,
        needs_hard_links=bool(settings.sinks),
    )
    findings = run_checks(place, clock, limits)
    try:
        status = read_status(place, clock, settings.durability)
        return [
            *findings,
            *_worker_findings(status),
            *_clock_findings(status, clock),
            *_queue_findings(place, settings, status),
        ]
    except (OSError, DirectoryUnusableError):
        return findings  # the directory cannot be used, which is among them


def _worker_findings(status: OutboxStatus) -> Iterable[DoctorFinding]:
    """Of each queue and of the directory, where files are handed over to them, or have their one destination."""
    each = [
        _worker_finding(f"{sink.name}: ", sink.deliverer, sink.deliverer_silent_s, sink.waiting_files, sink.oldest_age_s)
        for sink in status.sinks
    ]
    yield from each
    name = "all sinks: " if each else ""
    whole = _worker_finding(name, status.deliverer, status.deliverer_silent_s, status.sealed_files, status.oldest_age_s)
    if whole.ok or all(finding.ok for finding in each):  # or it says again what one of them has said
        yield whole


def _worker_finding(
    name: str, beat: Heartbeat | None, silent_s: float | None, files: int, oldest_s: float | None
) -> DoctorFinding:
    waiting = f"{files:,} sealed files wait"
    waits = oldest_s is not None and oldest_s > HEARTBEAT_STALE_AFTER_S
    if beat is None or silent_s is None:
        text = f"{name}none so far; {waiting}"
        return (
            failed("deliverer", f"{text}: run pillarbox deliver, or an application with a sink")
            if waits
            else passed("deliverer", text)
        )
    if silent_s > HEARTBEAT_STALE_AFTER_S:
        text = f"{name}process {beat.pid}, silent for {silent_s:,.0f} s; {waiting}"
        if not waits:
            return passed("deliverer", text)
        if exists(f"/proc/{beat.pid}"):
            return failed("deliverer", f"{text}, and a process of that number is there: if it is the one, it hangs; restart it")
        return failed("deliverer", f"{text}, and it is gone: run pillarbox deliver, or an application with a sink")
    text = f"{name}process {beat.pid} to {beat.sink}, {beat.state}"
    if beat.state.name in ("stopped", "degraded"):
        return failed("deliverer", f"{text}: mend that; {waiting}")
    return passed("deliverer", f"{text}; {waiting}")


def _clock_findings(status: OutboxStatus, clock: Clock) -> Iterable[DoctorFinding]:
    """Those of another time."""
    beats = {"": status.deliverer} | {sink.name: sink.deliverer for sink in status.sinks}
    for name, beat in beats.items():
        if beat is not None and beat.at_micros > clock.micros() + _CLOCK_SKEW_S * 1e6:
            ahead = (beat.at_micros - clock.micros()) / 1e6
            of = f" of {name}" if name else ""
            yield failed("clock", f"the heartbeat{of} is {ahead:,.0f} s in the future: set the clock, it stepped back")


def _queue_findings(place: Directory, settings: Settings, status: OutboxStatus) -> Iterable[DoctorFinding]:
    """Queues that nobody is to deliver, that are asked for in vain, or that others can read."""
    known = _destinations(settings)
    waiting = {sink.name: sink.waiting_files for sink in status.sinks}
    for queue in place.queues():
        name, path = queue.sink, f"{layout.queue_name(queue.sink)}/"
        if known and name not in known:
            text = f"{path} belongs to no destination of the settings, {waiting.get(name, 0):,} files wait in it"
            yield failed("queue", f"{text}: name it among the sinks again, or pillarbox sinks remove {name}")
        facts = queue.filesystem.inspect_directory(queue.path)
        if facts is not None and facts.mode & OTHERS_MASK:
            yield failed("mode", f"{path}: {facts.mode:03o} lets other users in: chmod 700")
        if facts is not None and not facts.is_usable:
            yield failed("owner", f"{path} cannot be read and written by this user: change its owner or mode")
    for name in sorted(place.requested_queues() if known else ()):
        if name not in known:
            text = f"{name} was asked for, and is no destination of the settings"
            yield failed("queue", f"{text}: name it among the sinks, or pillarbox sinks remove {name}")


def _destination_findings(settings: Settings, timeout: float, clock: Clock) -> list[DoctorFinding]:
    """What each destination says of itself; all are asked at once, and none is waited for longer than `timeout` seconds."""
    answers: dict[str, list[DoctorFinding]] = {}

    def ask(name: str, url: str) -> None:
        label = f"{name}: " if name else f"{redact_url(url)}: "
        try:
            found = asyncio.run(_ask_destination(url, settings))
            answers[name] = [DoctorFinding(ok, "destination", f"{label}{text}") for ok, text in found]
        except PillarboxError as error:
            answers[name] = [failed("destination", f"{label}{error}")]
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding; its text may hold what is secret
            answers[name] = [
                failed("destination", f"{label}cannot be asked ({type(error).__name__}); pillarbox check shows more")
            ]

    # A daemon: one that blocks must not keep the command from ending.
    threads = {
        name: threading.Thread(target=ask, args=(name, url), daemon=True) for name, url in _destinations(settings).items()
    }
    for thread in threads.values():
        thread.start()
    deadline = clock.monotonic() + timeout
    findings: list[DoctorFinding] = []
    for name, url in _destinations(settings).items():
        threads[name].join(max(0.0, deadline - clock.monotonic()))
        late = f"{name or redact_url(url)}: no answer within {timeout:g} s: is it up, and is there a way to it?"
        findings += answers.get(name, [failed("destination", late)])
    return findings


async def _ask_destination(url: str, settings: Settings) -> list[SinkFinding]:
    sink = make_sink(url, settings.event_type)
    try:
        return list(await sink.check())
    finally:
        await sink.close()
