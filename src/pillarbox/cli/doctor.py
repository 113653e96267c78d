"""`pillarbox doctor`: check that a directory, its filesystem and the destinations support what is configured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pillarbox.admin.doctor import (
    DoctorFinding,
    DoctorLimits,
    check_delivery,
    check_drops,
    check_heartbeats,
    check_queues,
    failed,
    run_checks,
)
from pillarbox.admin.status import read_status
from pillarbox.cli.options import JsonOption, OutboxOptions, SinkOption, expand_options
from pillarbox.cli.output import ExitCode, out, print_json
from pillarbox.cli.signals import interrupt_on_sigterm
from pillarbox.clock import SystemClock
from pillarbox.errors import DirectoryUnusableError, PillarboxError
from pillarbox.outcome import Durability  # noqa: TC001 - typer evaluates the annotations
from pillarbox.sinks import make_sink, redact_url
from pillarbox.sinks.event_loop import run_on_sink_loop
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at
from pillarbox.system import threads

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.settings import Settings
    from pillarbox.sinks.base import CheckResult


@expand_options
def doctor(
    options: OutboxOptions,
    durability: Annotated[
        Durability | None, typer.Option(metavar="process|power", help="Durability level to verify.", show_default=False)
    ] = None,
    sink: SinkOption = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Seconds to wait for each destination.", min=0.1)] = 10.0,
    json: JsonOption = False,
) -> int:
    """Check the directory, its filesystem and the sinks.

    Exits with 1 if one of them does not support the configured guarantees, or if something prevents delivery. Safe at any time:
    it tries locks, renames and syncs on files of its own, doctor-*.probe, which it deletes; it locks, creates and recovers
    nothing else. It also checks the destinations in the settings, and sends them no event.
    """
    interrupt_on_sigterm()  # so that the probe files are deleted
    settings = options.load_settings(durability=durability, sink=sink)
    clock = SystemClock()
    findings = [*_directory_findings(settings, clock), *_destination_findings(settings, timeout, clock)]
    if json:
        print_json([finding._asdict() for finding in findings])
    else:
        out.print(f'{settings.directory}, durability "{settings.durability}"')
        for ok, check, text, is_warning in findings:
            word = "WARN" if is_warning else "ok  " if ok else "BAD "
            out.print(f"  {word} {check}: {text}", style="yellow" if is_warning else None if ok else "red")
    return ExitCode.DONE if all(finding.ok for finding in findings) else ExitCode.PARTIAL


def _destinations(settings: Settings) -> dict[str, str]:
    """The URLs by sink; "" for a single sink."""
    return settings.sinks or ({"": settings.sink} if settings.sink else {})


def _directory_findings(settings: Settings, clock: Clock) -> list[DoctorFinding]:
    directory = directory_at(settings.directory, local_filesystem(), clock)
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
    findings = run_checks(directory, clock, limits)
    try:
        status = read_status(directory, clock, settings.durability, settings.max_bytes)
        now = clock.micros()
        findings += [*check_delivery(status), check_drops(status, now), *check_heartbeats(status, now)]
        return [*findings, *check_queues(directory, _destinations(settings), status)]
    except (OSError, DirectoryUnusableError):
        return findings  # they say already why the directory cannot be used


def _destination_findings(settings: Settings, timeout: float, clock: Clock) -> list[DoctorFinding]:
    """The check results of all destinations, which are asked at the same time, for at most `timeout` seconds."""
    results: dict[str, list[DoctorFinding]] = {}

    def check(name: str, url: str) -> None:
        label = name or redact_url(url)
        try:
            checked = run_on_sink_loop(_check_destination(url, settings))
            results[name] = [DoctorFinding(ok, "destination", f"{label}: {message}") for ok, message in checked]
        except PillarboxError as error:
            results[name] = [failed("destination", f"{label}: {error}")]
        except Exception as error:  # noqa: BLE001 - any error is a finding; its text is left out, it may contain a secret
            problem = f"the check failed with {type(error).__name__}; run pillarbox check for details"
            results[name] = [failed("destination", f"{label}: {problem}")]

    # Daemon threads: a check that hangs must not keep the command from exiting.
    checks = {name: threads.Thread(check, "pillarbox-check", (name, url)) for name, url in _destinations(settings).items()}
    for thread in checks.values():
        thread.start()
    deadline = clock.monotonic() + timeout
    findings: list[DoctorFinding] = []
    for name, url in _destinations(settings).items():
        checks[name].join(max(0.0, deadline - clock.monotonic()))
        late = f"{name or redact_url(url)}: no answer within {timeout:g} s; check that it runs and is reachable from here"
        findings += results.get(name, [failed("destination", late)])
    return findings


async def _check_destination(url: str, settings: Settings) -> list[CheckResult]:
    sink = make_sink(url, settings.event_type)
    try:
        return list(await sink.check())
    finally:
        await sink.close()
