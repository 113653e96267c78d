"""Every mutant can be made, and some of them are found; `python -m tests.crash.mutants` runs all of them."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.crash import compiled_order, mutants
from tests.crash.mutants import HARNESSES, MUTANTS, Mutant

MUTANTS_MIN = 30
DOCS = mutants.ROOT / "docs" / "dev" / "mutants.md"
# Each by a harness that finds it within seconds.
SAMPLE = [
    ("sealed-unsynced", "enumeration"),
    ("sealed-names-not-synced", "enumeration"),
    ("size-after-sync", "meanwhile"),
    ("failure-not-undone", "faults"),
    ("taken-without-lock", "interleave"),
    ("found-times-ignored", "machine"),
    ("lock-file-not-locked", "tests"),
    ("link-counts-at-once", "fanout"),
    ("c-last-not-synced", "enumeration"),
]
NAMED = {mutant.name: mutant for mutant in MUTANTS}


def test_there_are_enough_and_each_has_a_name() -> None:
    """And names harnesses that there are."""
    assert len(NAMED) == len(MUTANTS) >= MUTANTS_MIN
    assert all(mutant.breaks and set(mutant.also) <= HARNESSES.keys() for mutant in MUTANTS)


def test_the_tests_that_are_left_out_exist() -> None:
    """One that was renamed would be run on every mutant."""
    assert not [name for name in mutants.LEFT_OUT if not (mutants.ROOT / "tests" / f"{name}.py").exists()]
    assert all((mutants.ROOT / name).exists() for name in mutants.COMPILED_TESTS if name.endswith(".py"))


def test_a_mutant_names_harnesses_besides_those_for_all_or_in_their_place() -> None:
    """By the word in front of them."""
    assert mutants.chosen_for(NAMED["retired-forgotten"]) == [*mutants.DEFAULT_HARNESSES[:-1], "interrupts", mutants.UNIT_TESTS]
    assert mutants.chosen_for(NAMED["link-counts-at-once"]) == ["fanout"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_what_it_patches_exactly_once_and_compiles(mutant: Mutant) -> None:
    """So that none is lost when the code is changed."""
    text = mutants.patched(mutant)
    assert text != mutant.path.read_text()
    if not mutant.is_compiled:
        compile(text, mutant.module, "exec")
    elif not compiled_order.why_not():
        include = ["-I", str(mutants.SOURCES), "-I", sysconfig.get_paths()["include"]]
        subprocess.run([compiled_order.COMPILER, "-fsyntax-only", *include, "-x", "c", "-"], input=text, text=True, check=True)


def test_a_mutant_of_text_that_is_not_there_is_an_error() -> None:
    """Rather than the code as it is."""
    with pytest.raises(ValueError, match="is 0 times in"):
        mutants.patched(MUTANTS[0]._replace(old="no such text"))


@pytest.mark.proof
@pytest.mark.parametrize(("name", "harness"), SAMPLE)
def test_a_mutant_is_found(name: str, harness: str) -> None:
    """The harness that is best at it fails."""
    assert mutants.run_harnesses(NAMED[name], {harness: mutants.SECONDS_AS_IT_IS})[harness].found


@pytest.mark.proof
def test_what_is_appended_while_a_file_is_synced_is_not_taken_for_durable() -> None:
    """A harness that is nowhere else; the other ones of `mutants.py` are calls of those that are."""
    assert not mutants.meanwhile()


@pytest.mark.proof
def test_a_mutant_that_does_not_run_is_no_find() -> None:
    """It says nothing of a harness."""
    broken = NAMED["sealed-unsynced"]._replace(new="no_such_name")
    with pytest.raises(RuntimeError, match="does not run"):
        mutants.run_harnesses(broken, {"machine": mutants.SECONDS_AS_IT_IS})


@pytest.mark.proof
def test_a_harness_runs_on_the_copy(tmp_path: Path) -> None:
    """A package that cannot be imported is found out."""
    outbox_dir = mutants.copy_package(None, tmp_path)
    (outbox_dir / "pillarbox" / "__init__.py").write_text("raise ImportError('this is the copy')\n")
    with pytest.raises(RuntimeError, match="this is the copy"):
        mutants.run_harness(outbox_dir, "machine")


def test_the_table_in_the_docs_has_every_mutant_and_none_survives() -> None:
    """It is printed by `python -m tests.crash.mutants`."""
    rows = [line.split(" | ") for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    found = {row[0].removeprefix("| "): row for row in rows}
    assert [name for name in found if name in NAMED] == list(NAMED)
    for name, mutant in NAMED.items():
        assert found[name][1:3] == [mutant.breaks, f"`{mutant.module}`"]
        assert any("**found**" in cell for cell in found[name])
