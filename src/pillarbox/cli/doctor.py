"""`pillarbox doctor`: can this directory, and the file system below it, keep what is promised? And what stands in the way?"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from pillarbox.admin.doctor import (
    DoctorFinding,
    DoctorLimits,
    check_delivery,
    check_heartbeats,
    check_queues,
    failed,
    run_checks,
)
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
from pillarbox.errors import DirectoryUnusableError, PillarboxError
from pillarbox.outcome import Durability  # noqa: TC001 - typer reads it
from pillarbox.sinks import make_sink, redact_url
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.settings import Settings
    from pillarbox.sinks.base import CheckResult as SinkFinding


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
            line = printable(f"  {'ok ' if ok else 'BAD'}  {check}: {text}")
            out.print(line, markup=False, style=None if ok else "red")
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
        findings += [*check_delivery(status), *check_heartbeats(status, clock.micros())]
        return [*findings, *check_queues(place, _destinations(settings), status)]
    except (OSError, DirectoryUnusableError):
        return findings  # the directory cannot be used, which is among them


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
