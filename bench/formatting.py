"""Figures as text, for the terminal and for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.results import GoalResult, Results, SectionResult, Spread

IDLE_LOAD_MAX = 0.5  # load at the start of a run above which something else must be running


def number(value: float, digits: int) -> str:
    """A number with `digits` decimals; a small one with as many as it needs to differ from zero."""
    while value and digits < 6 and abs(value) < 10.0**-digits:
        digits += 1
    return f"{value:,.{digits}f}"


def spread(values: Spread, digits: int) -> str:
    """Median (minimum to maximum); only the median if all print alike."""
    median, least, most = (number(value, digits) for value in values)
    return median if least == most else f"{median} ({least} to {most})"


def rounds(section: SectionResult) -> str:
    """The number of rounds, and the number planned if the time budget ended earlier."""
    completed, planned = len(section.rounds), section.rounds_planned
    return f"{completed} round{'' if completed == 1 else 's'}{'' if completed == planned else f' of {planned} planned'}"


def bound(goal: GoalResult) -> str:
    """The bound of a goal."""
    return f"at {'least' if goal.at_least else 'most'} {_with_unit(f'{goal.bound:g}', goal)}"


def measured(goal: GoalResult) -> str:
    """The measured figure of a goal."""
    return "not measured" if goal.spread is None else _with_unit(spread(goal.spread, 2), goal)


def verdict(goal: GoalResult) -> str:
    """Whether a goal was met."""
    return {None: "not measured", True: "met", False: "missed"}[goal.met]


def _with_unit(text: str, goal: GoalResult) -> str:
    return f"{text} {goal.unit}"


def minutes(seconds: float) -> str:
    """A duration."""
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def warnings(results: Results) -> Iterator[str]:
    """Why the figures may be misleading."""
    if results.quick:
        yield "This was a quick run that only shows that the benchmark works; do not use its figures."
    if results.machine.load_before > IDLE_LOAD_MAX:
        yield f"The machine was not idle: its load was {results.machine.load_before:g} when the run began."


def machine(results: Results) -> list[tuple[str, str]]:
    """Machine and versions: names and values."""
    host, software = results.machine, results.versions
    changed = ", with uncommitted changes" if software.dirty else ""
    return [
        ("processor", f"{host.processor}, {host.cores} cores"),
        ("memory", f"{host.memory_gib:g} GiB"),
        ("system", f"{host.kernel}, {host.filesystem}"),
        ("load at start and end", f"{host.load_before:g}, {host.load_after:g}"),
        ("CPU time stolen by the host", f"{host.stolen_percent:g} %"),
        ("Python", f"{software.python}, msgspec {software.msgspec}, SQLite {software.sqlite}, zlib {software.zlib}"),
        ("Pillarbox", f"{software.commit[:12]}{changed}; hot path {'compiled' if software.compiled else 'in Python'}"),
        *(
            [("packages", ", ".join(f"{name} {version}" for name, version in software.packages.items()))]
            if software.packages
            else []
        ),
    ]
