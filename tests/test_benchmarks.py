"""The benchmark: its runner, with contestants that fail and hang; a quick run of its sections; and the page."""

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
SECTIONS_BY_KEY = sections.sections_by_key(sections.MODULES)
QUICK_KEYS = ("accept", "power", "draining", "deliver", "scale")


class TinyRun(NamedTuple):
    """A run of the tiny section."""

    run_results: results.Results
    reported: list[str]
    left_behind: list[int]  # ids of processes

    @property
    def section(self) -> results.SectionResult:
        return self.run_results.sections[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """One of its contestants hangs for five seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    reported: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fake_bench_section.PID_FILE_VARIABLE, str(folder / "pids"))
        patch.setenv("PILLARBOX_BATCH_SIZE", "7")
        run_results = run(
            [("tests.fake_bench_section", fake_bench_section.SECTION)], Options(folder / "workdir", 5, report=reported.append)
        )
    assert [path.name for path in (folder / "workdir").iterdir()] == []
    return TinyRun(run_results, reported, [int(pid) for pid in (folder / "pids").read_text().split()])


def test_a_failing_contestant_is_reported_and_the_others_are_measured(tiny: TinyRun) -> None:
    """A missing package, no server, a kill and a hang. Each of them runs once."""
    assert [sorted(figures) for figures in tiny.section.rounds] == [["one", "two"]] * 3
    assert tiny.section.failed == {
        "without its package": "ModuleNotFoundError: No module named 'no_such_package'",
        "without a server": "no server",
        "killed": "ended with status -9: last words",
        "hanging": "not done after 5 s",
    }
    assert len([line for line in tiny.reported if "FAILED" in line]) == 4
    packages = tiny.run_results.versions.packages
    assert packages == {"msgspec": msgspec.__version__, "no-such-package": "not installed"}


def test_processes_of_a_hanging_contestant_are_killed(tiny: TinyRun) -> None:
    """A zombie that is not reaped yet counts as ended."""
    for pid in tiny.left_behind:
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert len(tiny.left_behind) == 1


def test_each_round_of_a_contestant_has_its_own_process(tiny: TinyRun) -> None:
    """A contestant that failed is left out of the following rounds."""
    assert len({figures["pid"] for contestants in tiny.section.rounds for figures in contestants.values()}) == 6
    assert [len(order) for order in tiny.section.order] == [6, 2, 2]


def test_the_order_depends_on_seed_section_and_round(tiny: TinyRun) -> None:
    """The same three give the same order."""
    assert tiny.section.order[0] == shuffled(tiny.section.contestants, 5, "tiny", 1)
    names = [f"{number}" for number in range(10)]
    orders = [tuple(shuffled(names, *arguments)) for arguments in itertools.product((5, 6), ("tiny", "other"), (1, 2))]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == names for order in orders)


def test_a_goal_is_compared_with_the_median_and_may_be_unmeasured(tiny: TinyRun) -> None:
    """A maximum, a minimum, and a goal whose contestant failed."""
    assert [(goal.found, goal.met) for goal in tiny.section.goals] == [([2.0] * 3, True), ([2.0] * 3, False), ([], None)]


def test_results_can_be_decoded(tiny: TinyRun) -> None:
    """A file with another format is rejected."""
    text = results.encode(tiny.run_results)
    assert results.decode(text) == tiny.run_results
    with pytest.raises(msgspec.ValidationError):
        results.decode(text.replace(b'"shape": 1', b'"shape": 0'))


def test_the_page_names_unmeasured_contestants_and_missed_goals(tiny: TinyRun) -> None:
    """Missed goals are in bold."""
    files = page.files(tiny.run_results)
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
    assert "quick run" in page.files(msgspec.structs.replace(tiny.run_results, quick=True))["benchmarks.md"]


def test_a_section_that_cannot_be_prepared_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is 1, and the results have the reason."""
    monkeypatch.setenv(fake_bench_section.FAIL_PREPARE_VARIABLE, "1")
    assert main(["tiny", "--quick", "--seed", "3"], ["tests.fake_bench_section"], tmp_path) == 1
    run_results = results.decode((tmp_path / "results.json").read_bytes())
    assert (run_results.seed, run_results.quick, run_results.sections[0].rounds) == (3, True, [])
    assert set(run_results.sections[0].failed.values()) == {"nothing to measure with"}


def test_an_unknown_section_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error lists the known sections."""
    with pytest.raises(SystemExit) as exit_info:
        main(["acept"], folder=tmp_path)
    assert exit_info.value.code == 2
    assert "unknown section 'acept'; use one of accept, " in capsys.readouterr().err


@pytest.mark.parametrize("key", QUICK_KEYS)
def test_sections_without_other_packages_run(key: str, tmp_path: Path) -> None:
    """In a quick run, every contestant is measured, and every goal has its figures."""
    section = SECTIONS_BY_KEY[key][1]
    section_results = run([SECTIONS_BY_KEY[key]], Options(tmp_path, 1, quick=True, report=lambda _: None)).sections[0]
    assert section_results.failed == {}
    assert set(section_results.rounds[0]) == {contestant.name for contestant in section.contestants}
    assert all(goal.found for goal in section_results.goals)


@pytest.mark.parametrize("key", SECTIONS_BY_KEY)
def test_a_section_is_consistent(key: str) -> None:
    """Contestants have unique names, and the metric of the chart is in the table."""
    section = SECTIONS_BY_KEY[key][1]
    names = [contestant.name for contestant in section.contestants]
    assert len(set(names)) == len(names)
    assert section.chart in {"", *(column.metric for column in section.columns)}
    assert section.key == key
    assert len(SECTIONS_BY_KEY) == sum(len(sections.sections_of(module)) for module in sections.MODULES)


def test_the_benchmark_page_is_generated_from_its_results() -> None:
    """If it is not, run `python -m bench.page`."""
    run_results = results.decode((DOCS / "benchmarks.json").read_bytes())
    texts = page.files(run_results)
    assert {file.name for file in DOCS.glob("benchmarks*")} == set(texts)
    for name, text in texts.items():
        assert (DOCS / name).read_text() == text, name


BARS = [Bar("one", 1.0, 0.9, 1.2, "1.00", ours=False), Bar("a <longer> name", 10.0, 8.0, 12.0, "10.00", ours=True)]


@pytest.mark.parametrize("factor", [1.0, 2.1, 1e3, 1e-6])
def test_bars_stay_within_the_chart_and_in_order(factor: float) -> None:
    """The axis is linear up to a ratio of twenty, and logarithmic above."""
    bars = [BARS[0], BARS[1]._replace(value=10 * factor, least=8 * factor, most=12 * factor)]
    drawn = ET.fromstring(chart.bars("what", bars))  # noqa: S314 - our own
    namespace = "{http://www.w3.org/2000/svg}"
    first, second = (float(rect.attrib["width"]) for rect in drawn.findall(f"{namespace}rect")[1:])
    assert (first < second) == (bars[0].value < bars[1].value)
    assert 0 < min(first, second) < max(first, second) < chart.WIDTH
    texts = [text.text for text in drawn.findall(f"{namespace}text")]
    assert texts[0] == ("what" if factor == 1.0 else "what, logarithmic")
    assert "a <longer> name" in texts
