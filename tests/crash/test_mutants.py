"""Every mutant can be applied, and some of them are found. `python -m tests.crash.mutants` runs all of them."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.crash import compiled_order, mutants
from tests.crash.mutants import HARNESSES, MUTANTS, Mutant

MUTANTS_MIN = 30
# Mutants, each with a harness that finds it within seconds.
SAMPLE = [
    ("sealed-unsynced", "enumeration"),
    ("sealed-names-not-synced", "enumeration"),
    ("size-after-sync", "meanwhile"),
    ("failure-not-undone", "faults"),
    ("taken-without-lock", "interleave"),
    ("seal-times-repeat", "machine"),
    ("lock-file-not-locked", "tests"),
    ("link-counts-at-once", "fanout"),
    ("c-last-not-synced", "enumeration"),
]
NAMED = {mutant.name: mutant for mutant in MUTANTS}


def is_existing_test(name: str) -> bool:
    """Whether there is a module of tests, and the test that is named after it."""
    module, _, test = name.partition("::")
    path = mutants.ROOT / module
    return path.exists() and (not test or f"\ndef {test}(" in path.read_text())


def test_mutants_have_unique_names_descriptions_and_existing_harnesses() -> None:
    """Their number does not fall below a minimum."""
    assert len(NAMED) == len(MUTANTS) >= MUTANTS_MIN
    assert all(mutant.breaks for mutant in MUTANTS)
    assert {name for mutant in MUTANTS for name in mutant.also if "/" not in name} <= HARNESSES.keys()
    assert not [name for mutant in MUTANTS for name in mutants.first_tests(mutant) if not is_existing_test(name)]


def test_the_excluded_tests_exist() -> None:
    """A renamed test module would run on every mutant."""
    assert not [name for name in mutants.LEFT_OUT if not (mutants.ROOT / "tests" / f"{name}.py").exists()]
    assert all((mutants.ROOT / name).exists() for name in mutants.COMPILED_TESTS if name.endswith(".py"))


def test_a_mutant_names_additional_or_exclusive_harnesses() -> None:
    """The word `only` makes them exclusive."""
    assert mutants.chosen_for(NAMED["retired-forgotten"]) == [*mutants.DEFAULT_HARNESSES[:-1], "interrupts", mutants.UNIT_TESTS]
    assert mutants.chosen_for(NAMED["link-counts-at-once"]) == ["fanout"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_patch_of_a_mutant_matches_exactly_once_and_compiles(mutant: Mutant) -> None:
    """So no mutant is lost when the code changes."""
    text = mutants.patched(mutant)
    assert text != mutant.path.read_text()
    if not mutant.is_compiled:
        compile(text, mutant.module, "exec")
    elif not compiled_order.why_not():
        include = ["-I", str(mutants.SOURCES), "-I", sysconfig.get_paths()["include"]]
        subprocess.run([compiled_order.COMPILER, "-fsyntax-only", *include, "-x", "c", "-"], input=text, text=True, check=True)


def test_a_patch_of_missing_text_raises() -> None:
    """It does not leave the code unchanged."""
    with pytest.raises(ValueError, match="is 0 times in"):
        mutants.patched(MUTANTS[0]._replace(old="no such text"))


@pytest.mark.proof
@pytest.mark.parametrize(("name", "harness"), SAMPLE)
def test_a_mutant_is_found(name: str, harness: str) -> None:
    """The harness reports a violation."""
    assert mutants.run_harnesses(NAMED[name], {harness: mutants.SECONDS_AS_IT_IS})[harness].found


@pytest.mark.proof
def test_appends_during_a_sync_are_not_treated_as_durable() -> None:
    """The harness `meanwhile` exists only for the mutants; the others also run as tests."""
    assert not mutants.meanwhile()


@pytest.mark.proof
def test_a_mutant_that_does_not_run_raises() -> None:
    """It is not counted as found."""
    unusable = NAMED["sealed-unsynced"]._replace(new="no_such_name")
    with pytest.raises(RuntimeError, match="does not run"):
        mutants.run_harnesses(unusable, {"machine": mutants.SECONDS_AS_IT_IS})


@pytest.mark.proof
def test_a_harness_imports_the_copy_of_the_package(tmp_path: Path) -> None:
    """An import error in the copy is reported."""
    workdir = mutants.copy_package(None, tmp_path)
    (workdir / "pillarbox" / "__init__.py").write_text("raise ImportError('this is the copy')\n")
    with pytest.raises(RuntimeError, match="this is the copy"):
        mutants.run_harness(workdir, "machine")


def test_the_documented_table_has_every_mutant_and_no_survivor() -> None:
    """`python -m tests.crash.mutants` prints it."""
    rows = mutants.documented_rows()
    assert list(rows) == list(NAMED)
    for name, mutant in NAMED.items():
        assert (rows[name]["what it breaks"], rows[name]["in"]) == (mutant.breaks, f"`{mutant.module}`")
        assert mutants.documented_finders(name)
