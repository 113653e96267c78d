"""Generates `docs/dev/benchmarks.md` and its charts from the results of one run: `python -m bench.page`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from bench import chart, formatting, results
from bench.machine import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.results import Results, SectionResult

NAME = "benchmarks"
LINE = 132  # characters
PAGE = """# Benchmarks

{warnings}The results of one run of `make bench`. Compare ratios: what is compared ran alternately, in the same run. Absolute
figures depend on the machine.

- In each round, each contestant runs once, in random order, in a process of its own, with nothing else running. Each round has
  another order.
- A figure is the median of the rounds, followed by minimum and maximum. Bars show the median, the thin lines the range.
- The ratio of a goal is taken within each round; the median of these ratios counts. A missed goal is in **bold**.
- [benchmarks.json](benchmarks.json) has every figure of every round, the orders and their seed; `bench/page.py` makes this page
  from it alone. `make bench` writes such a file to `var/bench/results.json`; `python -m bench --page` also writes this page.

| | |
| --- | --- |
{machine}

{goals}
{sections}"""


def files(run_results: Results) -> dict[str, str]:
    """The generated files: name -> content."""
    texts = {f"{NAME}.json": results.encode(run_results).decode(), f"{NAME}.md": _page(run_results)}
    for section in run_results.sections:
        bars = _bars(section)
        if bars:
            texts[_chart_name(section)] = chart.bars(f"{section.title}: {_chart_column(section).heading}", bars)
    return texts


def write(run_results: Results, folder: Path) -> None:
    """Write the generated files, and delete charts of sections that no longer exist."""
    texts = files(run_results)
    for file in folder.glob(f"{NAME}-*.svg"):
        if file.name not in texts:
            file.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text)


def _page(run_results: Results) -> str:
    rows = [
        *formatting.machine(run_results),
        ("run", f"{run_results.began}, seed {run_results.seed}, {formatting.minutes(run_results.seconds)}"),
    ]
    return PAGE.format(
        warnings="".join(f"**{text}**\n\n" for text in formatting.warnings(run_results)),
        machine="\n".join(f"| {name} | {value} |" for name, value in rows),
        goals=_goals(run_results.sections),
        sections="\n".join(_section(section) for section in run_results.sections),
    )


def _goals(sections: Sequence[SectionResult]) -> str:
    """The list of missed and unmeasured goals."""
    goals = [goal for section in sections for goal in section.goals]
    missed = [goal for goal in goals if goal.met is False]
    unmeasured = [goal for goal in goals if goal.met is None]
    met = sum(goal.met is True for goal in goals)
    text = f"Of {len(goals)} goals, {met} {'is' if met == 1 else 'are'} met.\n"
    for label, listed_goals in (("Missed", missed), ("Not measured", unmeasured)):
        text += "".join(f"- {label}: {goal.text}.\n" for goal in listed_goals)
    return text


def _section(section: SectionResult) -> str:
    parts = [
        f"## {section.title}\n",
        f"{textwrap.fill(section.about, LINE, break_on_hyphens=False)}\n",
        f"{formatting.rounds(section)}; the section took {formatting.minutes(section.seconds)}.\n",
    ]
    if _bars(section):
        parts.append(f"![{section.title}: {_chart_column(section).heading}]({_chart_name(section)})\n")
    parts.append(_table(section))
    if section.failed:
        parts.append("".join(f"- {name} was not measured in all rounds: {reason}\n" for name, reason in section.failed.items()))
    if section.goals:
        rows = ["| goal | bound | measured |", "| --- | --- | --- |"]
        for goal in section.goals:
            text = formatting.measured(goal)
            rows.append(f"| {goal.text} | {formatting.bound(goal)} | {f'**{text}, missed**' if goal.met is False else text} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _table(section: SectionResult) -> str:
    rows = [
        "| | " + " | ".join(column.heading for column in section.columns) + " |",
        "| --- |" + " --- |" * len(section.columns),
    ]
    for name in section.contestants:
        cells = [(column, section.spread(name, column.metric)) for column in section.columns]
        texts = ("" if spread is None else formatting.spread(spread, column.digits) for column, spread in cells)
        rows.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(rows) + "\n"


def _chart_name(section: SectionResult) -> str:
    return f"{NAME}-{section.key}.svg"


def _chart_column(section: SectionResult) -> results.ColumnHeading:
    return next(column for column in section.columns if column.metric == section.chart)


def _bars(section: SectionResult) -> list[chart.Bar]:
    """The bars of a section's chart; none if it has no chart or nothing was measured."""
    spreads = [(name, section.spread(name, section.chart)) for name in section.contestants]
    return [
        chart.Bar(
            name,
            spread.median,
            spread.least,
            spread.most,
            formatting.number(spread.median, _chart_column(section).digits),
            name in section.ours,
        )
        for name, spread in spreads
        if spread is not None and spread.least > 0
    ]


if __name__ == "__main__":
    write(results.decode((ROOT / "docs" / "dev" / f"{NAME}.json").read_bytes()), ROOT / "docs" / "dev")
