"""Figures as text, the same on the terminal and on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.results import Goal, Results, Section, Spread

BUSY = 0.5  # load when a run begins, from which on something else must run


def number(value: float, digits: int) -> str:
    """With so many digits behind the point; a small one with as many as show something."""
    while value and digits < 6 and abs(value) < 10.0**-digits:
        digits += 1
    return f"{value:,.{digits}f}"


def spread(found: Spread, digits: int) -> str:
    """Median (least to most), in one number where it shows no more."""
    median, least, most = (number(one, digits) for one in found)
    return median if least == most else f"{median} ({least} to {most})"


def rounds(section: Section) -> str:
    """How many there were, and where the budget was used up before, how many there should have been."""
    made, planned = len(section.rounds), section.rounds_planned
    return f"{made} round{'' if made == 1 else 's'}{'' if made == planned else f' of {planned} planned'}"


def bound(goal: Goal) -> str:
    """What was set."""
    return f"at {'least' if goal.at_least else 'most'} {_with_unit(f'{goal.bound:g}', goal)}"


def found(goal: Goal) -> str:
    """What was measured."""
    return "not measured" if goal.spread is None else _with_unit(spread(goal.spread, 2), goal)


def verdict(goal: Goal) -> str:
    """In a word."""
    return {None: "not measured", True: "met", False: "missed"}[goal.met]


def _with_unit(text: str, goal: Goal) -> str:
    return f"{text} {goal.unit}"


def minutes(seconds: float) -> str:
    """A stretch of time."""
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def warnings(results: Results) -> Iterator[str]:
    """Why the figures may say less than they seem to."""
    if results.quick:
        yield "A quick run, with less of everything, to see that it works: these figures mean little."
    if results.machine.load_before > BUSY:
        yield f"Something else ran on this machine: its load was {results.machine.load_before:g} when the run began."


def machine(results: Results) -> list[tuple[str, str]]:
    """What it ran on: name and value."""
    at, with_ = results.machine, results.versions
    changed = ", with changes that are not committed" if with_.dirty else ""
    return [
        ("processor", f"{at.processor}, {at.cores} cores"),
        ("memory", f"{at.memory_gib:g} GiB"),
        ("system", f"{at.kernel}, {at.filesystem}"),
        ("load at the start, at the end", f"{at.load_before:g}, {at.load_after:g}"),
        ("processor time kept by the host meanwhile", f"{at.stolen_percent:g} %"),
        ("Python", f"{with_.python}, msgspec {with_.msgspec}, SQLite {with_.sqlite}, zlib {with_.zlib}"),
        ("Pillarbox", f"{with_.commit[:12]}{changed}; hot path {'compiled' if with_.compiled else 'in Python'}"),
        *([("packages", ", ".join(f"{name} {version}" for name, version in with_.packages.items()))] if with_.packages else []),
    ]
