"""Mutants of the package, each with one sync, rename, check, loop, lock or order removed or swapped.

A mutant is a patch of the text of one module, or of one C source. It is applied to a copy of the package, and each harness runs
on that copy in its own process, within bounds that take seconds, until the first violation. A mutant that no harness finds is
either not a defect, and then it is not in the list, or it shows what the harnesses cannot find.

    .venv/bin/python -m tests.crash.mutants            all mutants; prints the table of `docs/dev/mutants.md`
    .venv/bin/python -m tests.crash.mutants NAME ...   some mutants
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import pillarbox
from tests.crash import compiled_order

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = ROOT / "src" / "pillarbox"
SOURCES: Final = PACKAGE.with_name("speedups")  # the C sources
TABLE: Final = ROOT / "docs" / "dev" / "mutants.md"
WORKERS: Final = 2
SECONDS_MAX: Final = 60.0  # for a harness on a mutant, or PATIENCE times its time on the correct code, if that is more
PATIENCE: Final = 4
SECONDS_AS_IT_IS: Final = 900.0  # for a harness on the correct code
FOUND, UNUSABLE = 10, 11  # exit statuses of a harness, unlike those of an interpreter that fails
RANDOM_HISTORIES: Final = 100
FAILING: Final = ("ararsd", "mxgrsd", "ppsprsd")  # histories in which each operation fails in turn
MEANWHILE: Final = ("asap", "prsd", "psppp", "pprsd", "aprsasd", "psasrsd", "pxrsd", "pasrsc")  # histories with syncs
FOR_SEVERAL: Final = ("af", "aafxyafd", "afcafd", "afpfd", "aafxv", "okfxkd")  # histories of several sinks
CUT_SHORT: Final = "af{}v"  # another one, with a kill in the last step
OPERATIONS: Final = 30  # of that step, at most
EXAMPLES: Final = 1200  # of the state machine
SECONDS_PER_TEST_MAX: Final = 60  # a test of a mutant that takes longer hangs, and has found it
_HANGING_TEST: Final = re.compile(r"""tests/(\S+)\.py", line \d+ in (test_\w+)""")  # in a stack trace of all threads
UNIT_TESTS: Final = "tests"  # the name of the harness of unit tests
FIRST_TESTS_VARIABLE: Final = "FIRST_TESTS_OF_MUTANT"  # of the environment of a harness
COMPILED_TESTS: Final = (  # for a mutant of a C source
    *("tests/crash/test_compiled_order.py", "tests/store/test_batch_io.py", "tests/store/test_dirscan.py"),
    "tests/store/test_ownership.py",
    *("-k", "not plain and not two_steps"),
)
LEFT_OUT: Final = (
    *("store/test_interrupts", "store/test_group_commit_interrupts", "store/test_full_disks"),
    *("delivery/test_child_process", "delivery/test_fanout_runner", "delivery/test_fanout_queues"),
    *("delivery/test_flapping", "delivery/test_rejected_batches", "delivery/test_paced_drain"),
    *("delivery/test_fanout_external", "delivery/test_hostile_sinks", "delivery/test_status"),
    *("delivery/test_redelivery", "delivery/test_redelivery_queues"),
)


# `name [harnesses]: what it breaks`, and a patch of the module named above it: lines with - are removed, those with + added,
# the others kept. The first and the last line may be parts of lines. The removed and kept text occurs exactly once in the
# module. The harnesses run on this mutant in addition to the default ones, or after `only`, in place of them. A name with a slash
# is a module of tests, or one of its tests (`store/test_reader::test_name`), which come first among the unit tests.
PATCHES: Final = Path(__file__).with_suffix(".txt").read_text()


class Mutant(NamedTuple):
    """A patch of one module or C source. On a mutant of a C source, the harnesses use the compiled order of operations."""

    name: str
    breaks: str
    module: str  # under src/pillarbox; of a C source under src
    old: str
    new: str
    also: list[str]  # harnesses, and what the unit tests begin with: modules below `tests`, and tests in them
    only: bool  # whether the default harnesses are left out

    @property
    def is_compiled(self) -> bool:
        """Whether it is a patch of a C source."""
        return self.module.endswith(".c")

    @property
    def path(self) -> Path:
        """The file that it patches."""
        return (PACKAGE.parent if self.is_compiled else PACKAGE) / self.module


def _mutants(text: str) -> Iterator[Mutant]:
    for of_module in text.strip("\n").removeprefix("@ ").split("\n@ "):
        module, _, rest = of_module.partition("\n")
        for match in _MUTANT.finditer(rest + "\n"):
            name, also, breaks, patch = match.groups()
            lines = patch.splitlines()
            old = "\n".join(line[1:] for line in lines if line[:1] != "+")
            new = "\n".join(line[1:] for line in lines if line[:1] != "-")
            only = (also or "").startswith("only ")
            yield Mutant(name, breaks, module, old, new, (also or "").removeprefix("only ").split(), only)


_MUTANT: Final = re.compile(r"^([\w-]+)(?: \[(.*)\])?: (.*)\n((?:(?:[-+ ].*)?\n)*)", re.MULTILINE)
MUTANTS: Final = list(_mutants(PATCHES))


class Verdict(NamedTuple):
    """Whether a harness found a mutant."""

    found: bool
    why: str  # the violation
    seconds: float

    def __str__(self) -> str:
        return "**found**" if self.found else "not found"


class Table(NamedTuple):
    """Verdicts by mutant and harness; a harness that is missing was not run."""

    verdicts: dict[str, dict[str, Verdict]]
    seconds: float

    @property
    def survivors(self) -> list[str]:
        """The mutants that no harness finds."""
        return [name for name, verdicts in self.verdicts.items() if not any(verdict.found for verdict in verdicts.values())]

    def __str__(self) -> str:
        rows = [["mutant", "what it breaks", "in", *HARNESSES], ["---"] * (3 + len(HARNESSES))]
        for mutant in MUTANTS:
            if mutant.name in self.verdicts:
                verdicts = self.verdicts[mutant.name]
                row = [mutant.name, mutant.breaks, f"`{mutant.module}`"]
                rows.append([*row, *(str(verdicts.get(harness) or "not run") for harness in HARNESSES)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# The harnesses: each runs in its own process, and returns the first violation, or an empty string.


def _run_tests(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    command += ["-o", f"faulthandler_timeout={SECONDS_PER_TEST_MAX}", "-o", "faulthandler_exit_on_timeout=true", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode not in (0, 1):
        raise ImportError(process.stdout + process.stderr)
    if process.returncode and (hanging := _HANGING_TEST.search(process.stderr)):
        return f"FAILED tests/{hanging[1]}.py::{hanging[2]} - it does not end within {SECONDS_PER_TEST_MAX} s"
    return process.stdout[-1000:] if process.returncode else ""


def unit_tests() -> str:
    """The unit tests, without those of other harnesses, those that need real file systems, and the slowest.

    `first_tests` of the mutant come first.
    """
    if compiled_order.current_order() == "compiled":
        return _run_tests(*COMPILED_TESTS)
    first = os.environ.get(FIRST_TESTS_VARIABLE, "").split()
    left_out = [f"--ignore=tests/{name}.py" for name in LEFT_OUT]
    return (_run_tests(*first) if first else "") or _run_tests("tests/store", "tests/delivery", *left_out)


def interrupts() -> str:
    """Signals at every opcode of the writer."""
    return _run_tests("tests/store/test_interrupts.py", "-m", "proof", "-k", "not finalizer")


def enumeration() -> str:
    """All histories of three steps, and some longer ones, fixed and random, with every state after a crash."""
    from tests.crash import faults
    from tests.crash.enumeration import ENDS, Bounds, Enumeration, Histories, check_by_chance

    checker, histories = Enumeration(Bounds(tears=ENDS, in_recovery=1, states_max=2000)), Histories()

    def has_violation() -> bool:
        return bool(checker.violations)

    while histories.complete < 3 and histories.check_longer(checker, has_violation):
        pass
    for history in faults.HISTORIES:
        for length in range(4, len(history) + 1):
            if not has_violation():
                checker.check(history[:length])
    most = checker.histories + RANDOM_HISTORIES
    check_by_chance(checker, 1, lambda: has_violation() or checker.histories >= most)
    return "".join(checker.violations[:1])


def meanwhile() -> str:
    """Another thread appends during each sync of some histories, and every state after a crash is checked."""
    from pillarbox.testing.crash import CrashFilesystem
    from tests.crash.enumeration import ENDS, Bounds, Enumeration
    from tests.crash.simulation import SimulationWorld

    def append_during_sync(plain: CrashFilesystem) -> CrashFilesystem:
        def sync_data(fd: int) -> None:
            real(fd)
            if not done:
                done.append(fd)
                world._append(world._processes[1][1], "a")

        real, plain.sync_data = plain.sync_data, sync_data  # type: ignore[method-assign]
        return plain

    checker = Enumeration(Bounds(tears=ENDS))
    for history in MEANWHILE:
        world = SimulationWorld(append_during_sync)
        world._process(1)
        world._processes[1][1].sealer._syncs_spare_names = True  # as with durability "power"
        for letter in history:
            done: list[int] = []  # one append for each step
            world.step(letter)
        checker.check_trace({"history": history}, world.disk.trace, 0, None, len(history))
    return "".join(checker.violations[:1])


def failing_disks() -> str:
    """Each operation of some histories fails. While the processes run, no dropped event may arrive."""
    from pillarbox.store.layout import Kind
    from pillarbox.testing.fault import FaultCounter
    from tests.crash import faults
    from tests.crash.enumeration import ENDS, Bounds, Enumeration
    from tests.crash.simulation import kind_at

    for history in faults.HISTORIES:
        for pair in faults.pairs_of(history):
            counter = FaultCounter(*pair)
            world = faults.world_with_faults(counter)
            world.can_truncate = True
            world.run(history)
            problem = faults.afterwards(world, counter)
            quarantine = [data for path, data in world.disk.files.items() if kind_at(path) is Kind.CORRUPT]
            if problem or any(b'"}\n' in data for data in quarantine):
                return problem or f"a whole line is in quarantine, after a torn one: {quarantine}"
    checker = Enumeration(Bounds(tears=ENDS, states_max=60))
    for history in FAILING:
        for case in faults.faults_of(history):
            faults.check(checker, history, case)
            if checker.violations:
                return checker.violations[0]
    return ""


def interleavings() -> str:
    """All scenarios of two or three processes, with smaller bounds than in the tests."""
    from tests.crash.interleave import SCENARIOS, explore, one_creates_segments_while_another_recovers
    from tests.crash.test_interleave import MANY

    for scenario in SCENARIOS:
        bounds = [(1, 0)] if scenario in MANY else [(2, 0), (0, 1)]
        if scenario is one_creates_segments_while_another_recovers:
            bounds.append((1, 1))
        for preemptions, kills in bounds:
            if violations := explore(scenario, preemptions, kills).violations:
                return str(violations[0])
    return ""


def machine() -> str:
    """The state machine, from a fixed seed."""
    from tests.crash.state_machine import torture

    torture(EXAMPLES, 1, shrink=False)
    return ""


def fan_out() -> str:
    """Several sinks: every state after a crash of some histories, and of one with a kill in each operation."""
    from pillarbox.store import reconciliation
    from tests.crash.fanout import FanOutEnumeration

    reconciliation._ATTEMPTS = 1  # type: ignore[misc]
    checker = FanOutEnumeration()
    for history in (*FOR_SEVERAL, *(CUT_SHORT.format(operation) for operation in range(OPERATIONS))):
        checker.check_history(history, few=True)
        if checker.violations:
            break
    return "".join(checker.violations[:1])


HARNESSES: Final[dict[str, Callable[[], str]]] = {
    "enumeration": enumeration,
    "meanwhile": meanwhile,
    "faults": failing_disks,
    "interleave": interleavings,
    "machine": machine,
    "interrupts": interrupts,
    "fanout": fan_out,
    UNIT_TESTS: unit_tests,
}
DEFAULT_HARNESSES: Final = ("enumeration", "meanwhile", "faults", "interleave", "machine", UNIT_TESTS)


def chosen_for(mutant: Mutant) -> list[str]:
    """The harnesses that run on a mutant."""
    return [name for name in HARNESSES if name in mutant.also or (name in DEFAULT_HARNESSES and not mutant.only)]


@functools.cache
def documented_rows() -> dict[str, dict[str, str]]:
    """The rows of the table in the documents by the name of the mutant: cells by column."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    columns = next(row for row in rows if row[0] == "mutant")
    table = [row for row in rows if len(row) == len(columns) and row[0] not in ("mutant", "---")]
    return {row[0]: dict(zip(columns, row, strict=True)) for row in table}


def documented_finders(name: str) -> list[str]:
    """The harnesses that find a mutant, according to the table in the documents."""
    return [harness for harness, cell in documented_rows().get(name, {}).items() if cell == "**found**"]


def failed_test(verdict: Verdict) -> str:
    """The unit test that found a mutant; empty if it was another harness."""
    failed = re.search(r"^FAILED tests/(\S+)\.py(::\w+)", verdict.why, re.MULTILINE)
    return "".join(failed.groups()) if failed else ""


def named_tests(mutant: Mutant) -> list[str]:
    """The modules of tests and the tests that a mutant names."""
    return [name for name in mutant.also if "/" in name]


def first_tests(mutant: Mutant) -> list[str]:
    """The unit tests that are most likely to find a mutant: those that it names, or the modules named for its module."""
    package, _, stem = mutant.module.removesuffix(".py").rpartition("/")
    own = sorted((ROOT / "tests" / package).glob(f"test_{stem}*.py")) if package else []
    named = [
        f"tests/{module}.py{colons}{test}" for module, colons, test in (name.partition("::") for name in named_tests(mutant))
    ]
    return named or [f"tests/{package}/{path.name}" for path in own if f"{package}/{path.stem}" not in LEFT_OUT]


def patched(mutant: Mutant) -> str:
    """The text of the patched module. Raises unless the text to replace occurs exactly once."""
    text = mutant.path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: the text to replace is {text.count(mutant.old)} times in {mutant.module}")
    return text.replace(mutant.old, mutant.new)


def copy_package(mutant: Mutant | None, workdir: Path) -> Path:
    """Copy the package, with a mutant or unchanged. Returns the folder of the copy."""
    workdir.chmod(0o755)  # some tests work as another user, also in temporary directories below it
    shutil.copytree(PACKAGE, workdir / "pillarbox", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(SOURCES, workdir / "speedups")
    if mutant is not None:
        (workdir / mutant.path.relative_to(PACKAGE.parent)).write_text(patched(mutant))
    return workdir


def run_harness(
    workdir: Path, harness: str, seconds_max: float = SECONDS_MAX, *, tests: Iterable[str] = (), compiled: bool = False
) -> Verdict:
    """Run a harness on the copy of the package in a folder; the unit tests begin with `tests`. One that does not end has found it.

    `compiled` selects the compiled order of operations. Otherwise the portable order is used, without the extension.
    """
    environment = os.environ | {"PYTHONPATH": f"{workdir}{os.pathsep}{ROOT}", "PYTHONHASHSEED": "0", "TMPDIR": str(workdir)}
    environment |= {"PILLARBOX_PURE_PYTHON": "" if compiled else "1", FIRST_TESTS_VARIABLE: " ".join(tests)}
    command = [
        sys.executable,
        "-m",
        "tests.crash.mutants",
        "--on",
        str(workdir),
        "--harness",
        harness,
        *["--compiled"] * compiled,
    ]
    begin = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds_max)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return Verdict(found=True, why=f"it does not end within {seconds_max:.0f} s", seconds=time.monotonic() - begin)
    if process.returncode not in (0, FOUND):
        raise RuntimeError(f"{harness} does not run: {output[-3000:]}")
    return Verdict(process.returncode == FOUND, output.strip(), time.monotonic() - begin)


def run_harnesses(mutant: Mutant | None, bounds: Mapping[str, float], *, compiled: bool = False) -> dict[str, Verdict]:
    """The verdicts of harnesses on a mutant, or on the correct code, each within its number of seconds."""
    with tempfile.TemporaryDirectory(prefix="pillarbox-mutant-") as folder:
        workdir = copy_package(mutant, Path(folder))
        compiled = compiled or (mutant is not None and mutant.is_compiled)
        if compiled:
            compiled_order.build_extension(workdir / "speedups", workdir / "pillarbox")  # for the unit tests
        tests = [] if mutant is None else first_tests(mutant)
        return {
            harness: run_harness(workdir, harness, seconds, tests=tests, compiled=compiled)
            for harness, seconds in bounds.items()
        }


def bounds_from_correct_code(mutants: Iterable[Mutant]) -> dict[tuple[str, bool], float]:
    """The seconds that each harness may take on a mutant, by its name and whether the order is compiled.

    Runs each harness that these mutants need on the correct code. Raises `RuntimeError` if one finds a violation there: it would
    find it in every mutant.
    """
    needed = {(harness, mutant.is_compiled) for mutant in mutants for harness in chosen_for(mutant)}

    def bound(case: tuple[str, bool]) -> float:
        harness, compiled = case
        verdict = run_harnesses(None, {harness: SECONDS_AS_IT_IS}, compiled=compiled)[harness]
        if verdict.found:
            raise RuntimeError(f"{harness} finds a violation in the correct code: {verdict.why}")
        return max(SECONDS_MAX, PATIENCE * verdict.seconds)

    with ThreadPoolExecutor(WORKERS) as pool:
        cases = sorted(needed)
        return dict(zip(cases, pool.map(bound, cases), strict=True))


def run(names: Iterable[str] | None = None, progress: Callable[[str], None] | None = None) -> Table:
    """The verdicts on mutants. Raises `RuntimeError` if a harness finds a violation in the correct code."""
    named = {mutant.name: mutant for mutant in MUTANTS}
    mutants = MUTANTS if names is None else [named[name] for name in names]
    begin = time.monotonic()
    bounds = bounds_from_correct_code(mutants)

    def judged(mutant: Mutant) -> dict[str, Verdict]:
        verdicts = run_harnesses(mutant, {harness: bounds[harness, mutant.is_compiled] for harness in chosen_for(mutant)})
        if progress is not None:
            finders = [f"{name} in {verdict.seconds:.1f} s" for name, verdict in verdicts.items() if verdict.found]
            progress(f"{mutant.name}: {', '.join(finders) or 'SURVIVES'}")
        return verdicts

    with ThreadPoolExecutor(WORKERS) as pool:
        verdicts = dict(zip([mutant.name for mutant in mutants], pool.map(judged, mutants), strict=True))
    return Table(verdicts, time.monotonic() - begin)


def _be_harness(name: str, workdir: Path, order: compiled_order.Order) -> int:
    """Run a harness in this process. Returns the exit status."""
    if name != UNIT_TESTS:
        logging.disable(logging.CRITICAL)
    try:
        if not Path(pillarbox.__file__).is_relative_to(workdir):
            raise ImportError(pillarbox.__file__)  # noqa: TRY301 - handled below, as other import errors are
        with compiled_order.order(order):
            problem = HARNESSES[name]()
    except (ImportError, NameError, SyntaxError) as error:
        print(f"a mutant that does not run: {error!r}")  # noqa: T201 - read by the parent process
        return UNUSABLE
    except Exception as error:  # noqa: BLE001 - every exception is a violation
        problem = f"{type(error).__name__}: {error}"
    print(problem[:2000])  # noqa: T201
    return FOUND if problem else 0


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--harness", choices=HARNESSES, help=argparse.SUPPRESS)
    parser.add_argument("--on", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.harness:
        return _be_harness(chosen.harness, chosen.on, "compiled" if chosen.compiled else "portable")
    table = run(chosen.names or None, lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
    print(table)  # noqa: T201 - the report
    print(f"\n{len(table.verdicts)} mutants in {table.seconds:.0f} s; survivors: {', '.join(table.survivors) or 'none'}")  # noqa: T201
    return bool(table.survivors)


if __name__ == "__main__":
    sys.exit(main())
