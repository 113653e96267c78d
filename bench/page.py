"""Makes `docs/dev/benchmarks.md` and its charts from the results of one run. `python -m bench.page` makes them again.

No other page states these figures.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from bench import chart, results, words
from bench.machine import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.results import Results, Section

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


def files(found: Results) -> dict[str, str]:
    """The generated files: name -> content."""
    texts = {f"{NAME}.json": results.encode(found).decode(), f"{NAME}.md": _page(found)}
    for section in found.sections:
        bars = _bars(section)
        if bars:
            texts[_chart_name(section)] = chart.bars(f"{section.title}: {_drawn(section).heading}", bars)
    return texts


def write(found: Results, folder: Path) -> None:
    """Write the generated files, and delete charts of sections that no longer exist."""
    texts = files(found)
    for file in folder.glob(f"{NAME}-*.svg"):
        if file.name not in texts:
            file.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text)


def _page(found: Results) -> str:
    rows = [
        *words.machine(found),
        ("run", f"{found.began}, seed {found.seed}, {words.minutes(found.seconds)}"),
    ]
    return PAGE.format(
        warnings="".join(f"**{text}**\n\n" for text in words.warnings(found)),
        machine="\n".join(f"| {name} | {value} |" for name, value in rows),
        goals=_goals(found.sections),
        sections="\n".join(_section(section) for section in found.sections),
    )


def _goals(sections: Sequence[Section]) -> str:
    """Which goals were met."""
    goals = [goal for section in sections for goal in section.goals]
    missed = [goal for goal in goals if goal.met is False]
    unmeasured = [goal for goal in goals if goal.met is None]
    met = sum(goal.met is True for goal in goals)
    text = f"Of {len(goals)} goals, {met} {'is' if met == 1 else 'are'} met.\n"
    for label, which in (("Missed", missed), ("Not measured", unmeasured)):
        text += "".join(f"- {label}: {goal.text}.\n" for goal in which)
    return text


def _section(section: Section) -> str:
    parts = [
        f"## {section.title}\n",
        f"{textwrap.fill(section.about, LINE, break_on_hyphens=False)}\n",
        f"{words.rounds(section)}; the section took {words.minutes(section.seconds)}.\n",
    ]
    if _bars(section):
        parts.append(f"![{section.title}: {_drawn(section).heading}]({_chart_name(section)})\n")
    parts.append(_table(section))
    if section.failed:
        parts.append("".join(f"- {name} was not measured in all rounds: {why}\n" for name, why in section.failed.items()))
    if section.goals:
        rows = ["| goal | bound | measured |", "| --- | --- | --- |"]
        for goal in section.goals:
            text = words.measured(goal)
            rows.append(f"| {goal.text} | {words.bound(goal)} | {f'**{text}, missed**' if goal.met is False else text} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _table(section: Section) -> str:
    rows = [
        "| | " + " | ".join(column.heading for column in section.columns) + " |",
        "| --- |" + " --- |" * len(section.columns),
    ]
    for name in section.contestants:
        cells = [(column, section.spread(name, column.metric)) for column in section.columns]
        texts = ("" if found is None else words.spread(found, column.digits) for column, found in cells)
        rows.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(rows) + "\n"


def _chart_name(section: Section) -> str:
    return f"{NAME}-{section.key}.svg"


def _drawn(section: Section) -> results.Column:
    return next(column for column in section.columns if column.metric == section.chart)


def _bars(section: Section) -> list[chart.Bar]:
    """The bars of a section's chart; none if it has no chart or nothing was measured."""
    found = [(name, section.spread(name, section.chart)) for name in section.contestants]
    return [
        chart.Bar(name, one.median, one.least, one.most, words.number(one.median, _drawn(section).digits), name in section.ours)
        for name, one in found
        if one is not None and one.least > 0
    ]


if __name__ == "__main__":
    write(results.decode((ROOT / "docs" / "dev" / f"{NAME}.json").read_bytes()), ROOT / "docs" / "dev")
