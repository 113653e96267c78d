"""The benchmark: its runner, with processes that fail and hang; every contestant, in little; and the page."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from bench import chart, page, results, sections
from bench.__main__ import main
from bench.chart import Bar
from bench.machine import ROOT
from bench.run import Options, run, shuffled

from tests import fake_bench_section

DOCS = ROOT / "docs" / "dev"
KNOWN = sections.sections_by_key(sections.MODULES)
CHEAP = ("accept", "power", "draining", "deliver", "scale")


class Tiny(NamedTuple):
    """A run of the tiny section."""

    found: results.Results
    said: list[str]
    left_behind: list[int]  # processes

    @property
    def section(self) -> results.Section:
        return self.found.sections[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """It has a contestant that hangs for five seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fake_bench_section.LEFT_BEHIND, str(folder / "pids"))
        patch.setenv("PILLARBOX_BATCH_SIZE", "7")
        found = run(
            [("tests.fake_bench_section", fake_bench_section.SECTION)], Options(folder / "place", 5, report=said.append)
        )
    assert [path.name for path in (folder / "place").iterdir()] == []
    return Tiny(found, said, [int(pid) for pid in (folder / "pids").read_text().split()])


def test_who_fails_is_said_and_the_others_go_on(tiny: Tiny) -> None:
    """A missing package, no server, a kill, a hang; each is tried once."""
    assert [sorted(figures) for figures in tiny.section.rounds] == [["one", "two"]] * 3
    assert tiny.section.failed == {
        "without its package": "ModuleNotFoundError: No module named 'no_such_package'",
        "without a server": "no server",
        "killed": "ended with status -9: on the way out",
        "hanging": "not done after 5 s",
    }
    assert len([line for line in tiny.said if "FAILED" in line]) == 4
    packages = tiny.found.versions.packages
    assert packages == {"msgspec": msgspec.__version__, "no-such-package": "not installed"}


def test_what_a_hanging_contestant_has_started_ends_with_it(tiny: Tiny) -> None:
    """A zombie that its new parent has not looked at yet has ended."""
    for pid in tiny.left_behind:
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert len(tiny.left_behind) == 1


def test_each_turn_is_a_process_of_its_own(tiny: Tiny) -> None:
    """And whoever has failed has no other turn."""
    assert len({figures["pid"] for found in tiny.section.rounds for figures in found.values()}) == 6
    assert [len(order) for order in tiny.section.order] == [6, 2, 2]


def test_the_orders_come_from_the_seed(tiny: Tiny) -> None:
    """The same again, and others from round to round, from section to section and with another seed."""
    assert tiny.section.order[0] == shuffled(tiny.section.contestants, 5, "tiny", 1)
    names = [f"{number}" for number in range(10)]
    orders = [tuple(shuffled(names, *of)) for of in itertools.product((5, 6), ("tiny", "other"), (1, 2))]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == names for order in orders)


def test_goals_are_judged_by_the_median_and_one_that_was_not_measured_is_neither_met_nor_missed(tiny: Tiny) -> None:
    """At most, at least, nobody there."""
    assert [(goal.found, goal.met) for goal in tiny.section.goals] == [([2.0] * 3, True), ([2.0] * 3, False), ([], None)]


def test_results_can_be_read_again(tiny: Tiny) -> None:
    """And a file of another shape is refused."""
    text = results.encode(tiny.found)
    assert results.decode(text) == tiny.found
    with pytest.raises(msgspec.ValidationError):
        results.decode(text.replace(b'"shape": 1', b'"shape": 0'))


def test_the_page_says_who_was_not_measured_and_which_goals_are_missed(tiny: Tiny) -> None:
    """In bold."""
    files = page.files(tiny.found)
    assert set(files) == {"benchmarks.md", "benchmarks.json", "benchmarks-tiny.svg"}
    text = files["benchmarks.md"]
    assert "\nNothing is measured.\n" in text
    assert "| two | 2.0 |" in text
    assert "| hanging |  |" in text
    assert "hanging was not measured in all rounds: not done after 5 s" in text
    assert "| at least | at least 2.5 x | **2.00 x, missed** |" in text
    assert "| of one | at most 2 x | 2.00 x |" in text
    assert "| of nobody | at most 2 x | not measured |" in text
    assert "Of 3 goals, 1 is met." in text
    assert "quick run" not in text
    assert "quick run" in page.files(msgspec.structs.replace(tiny.found, quick=True))["benchmarks.md"]


def test_a_section_that_cannot_be_prepared_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the exit code says so, and the table, and a file."""
    monkeypatch.setenv(fake_bench_section.UNPREPARED, "1")
    assert main(["tiny", "--quick", "--seed", "3"], ["tests.fake_bench_section"], tmp_path) == 1
    found = results.decode((tmp_path / "results.json").read_bytes())
    assert (found.seed, found.quick, found.sections[0].rounds) == (3, True, [])
    assert set(found.sections[0].failed.values()) == {"nothing to measure with"}


def test_a_section_that_is_not_known_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With those that are."""
    with pytest.raises(SystemExit) as ended:
        main(["acept"], folder=tmp_path)
    assert ended.value.code == 2
    assert "unknown section 'acept'; use one of accept, " in capsys.readouterr().err


@pytest.mark.parametrize("key", CHEAP)
def test_the_sections_of_our_own_run(key: str, tmp_path: Path) -> None:
    """Every contestant, in little, and every goal has its figures."""
    section = KNOWN[key][1]
    found = run([KNOWN[key]], Options(tmp_path, 1, quick=True, report=lambda _: None)).sections[0]
    assert found.failed == {}
    assert set(found.rounds[0]) == {one.name for one in section.contestants}
    assert all(goal.found for goal in found.goals)


@pytest.mark.parametrize("key", KNOWN)
def test_a_section_is_whole(key: str) -> None:
    """Names are unique, and what is drawn is in the table."""
    section = KNOWN[key][1]
    names = [one.name for one in section.contestants]
    assert len(set(names)) == len(names)
    assert section.chart in {"", *(column.metric for column in section.columns)}
    assert section.key == key
    assert len(KNOWN) == sum(len(sections.sections_of(module)) for module in sections.MODULES)


def test_the_page_is_what_is_made_of_its_results() -> None:
    """Mend it with `python -m bench.page`."""
    found = results.decode((DOCS / "benchmarks.json").read_bytes())
    texts = page.files(found)
    assert {file.name for file in DOCS.glob("benchmarks*")} == set(texts)
    for name, text in texts.items():
        assert (DOCS / name).read_text() == text, name


BARS = [Bar("one", 1.0, 0.9, 1.2, "1.00", ours=False), Bar("a <longer> name", 10.0, 8.0, 12.0, "10.00", ours=True)]


@pytest.mark.parametrize("factor", [1.0, 2.1, 1e3, 1e-6])
def test_bars_stay_within_the_chart_and_in_order(factor: float) -> None:
    """Linear up to twenty times the smallest, logarithmic beyond."""
    bars = [BARS[0], BARS[1]._replace(value=10 * factor, least=8 * factor, most=12 * factor)]
    drawn = ET.fromstring(chart.bars("what", bars))  # noqa: S314 - our own
    space = "{http://www.w3.org/2000/svg}"
    first, second = (float(rect.attrib["width"]) for rect in drawn.findall(f"{space}rect")[1:])
    assert (first < second) == (bars[0].value < bars[1].value)
    assert 0 < min(first, second) < max(first, second) < chart.WIDTH
    texts = [text.text for text in drawn.findall(f"{space}text")]
    assert texts[0] == ("what" if factor == 1.0 else "what, logarithmic")
    assert "a <longer> name" in texts
