"""Directory scans give the same results in C and in Python."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pillarbox._native import COMPILED, speedups
from pillarbox.store import layout
from pillarbox.store.dirscan import (
    ALL_NAMES,
    TIMESTAMP_MAX_MICROS,
    FileEntry,
    FileTotals,
    NamePage,
    NamePattern,
    PortableScanOps,
)
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import CompiledOsFilesystem, OsFilesystem
from tests.store import gc_control

SEALED_AT = 1_700_000_000_000_000
OTHER_NAMES = [
    "active.ndjson",
    "active-w-1.ndjson",
    "active-w-2.ndjson",
    "active.ndjson.u.aside",
    "sealed-.ndjson",
    "sealed-bad.ndjson",
    "sealed-1-u.ndjson.zst",
    "sealed-\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668-u.ndjson",
    "sealed-\u00fc.ndjson",
    os.fsdecode(b"sealed-\xff\x80.ndjson"),
    "sealed-x.ndjson.u.aside",
    "corrupt-b.ndjson",
    "corrupt-b.spans.json",
    "dead-b.ndjson",
    f"delivered-{SEALED_AT}-{SEALED_AT}-u.ndjson",
    "ledger.ndjson",
    ".ndjson",
    "n",
]
compiled_only = pytest.mark.skipif(not COMPILED, reason="needs the C extension")


@pytest.fixture(scope="module")
def outbox_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with files of every kind, a directory, symbolic links and a pipe."""
    path = tmp_path_factory.mktemp("listing")
    names = [*OTHER_NAMES, *(layout.sealed_name(SEALED_AT + number, "u") for number in range(20))]
    names += [layout.compressed_name(layout.sealed_name(SEALED_AT + number, "u")) for number in (3, 30)]
    for number, name in enumerate(names):
        (path / name).write_bytes(b"x" * (number % 3))
    (path / "sealed-directory.ndjson").mkdir()
    (path / "sealed-link.ndjson").symlink_to(path / "n")
    (path / "sealed-nowhere.ndjson").symlink_to(path / "missing")
    os.mkfifo(path / "sealed-pipe.ndjson")
    return str(path)


@pytest.fixture(params=["compiled", "plain"])
def files(request: pytest.FixtureRequest) -> OsFilesystem:
    if request.param == "plain":
        return OsFilesystem()
    if not COMPILED:
        pytest.skip("needs the C extension")
    return CompiledOsFilesystem()


def test_a_timestamp_of_a_year_beyond_2100_is_ignored(files: OsFilesystem, tmp_path: Path) -> None:
    """It is forged. The newest of the others still counts, whatever the clock of this machine says."""
    for micros in (SEALED_AT, TIMESTAMP_MAX_MICROS, TIMESTAMP_MAX_MICROS + 1, layout.MICROS_MAX):
        (tmp_path / layout.sealed_name(micros, "u")).touch()
    (totals, _) = files.file_totals(str(tmp_path), layout.SEALED_PATTERNS)
    assert (totals.files, totals.oldest_micros, totals.newest_micros) == (4, SEALED_AT, TIMESTAMP_MAX_MICROS)


class ReferenceScan(PortableScanOps):
    """Scans by the portable operations over `os.listdir`."""

    def list_files(self, path: str) -> Iterator[FileEntry]:
        paths = [Path(path, name) for name in os.listdir(path)]
        return iter([FileEntry(file.name, file.stat().st_size) for file in paths if file.is_file() and not file.is_symlink()])


def test_only_regular_files_are_listed(files: OsFilesystem, outbox_dir: str) -> None:
    """With their sizes. Directories, pipes and links are not."""
    assert sorted(files.list_files(outbox_dir)) == sorted(ReferenceScan().list_files(outbox_dir))
    assert all(isinstance(entry, FileEntry) for entry in files.list_files(outbox_dir))


@pytest.mark.parametrize(
    "patterns", [ALL_NAMES, layout.SEALED_PATTERNS, layout.COMPRESSED_PATTERNS, layout.PATTERNS, (), (NamePattern("n", None),)]
)
def test_names_that_match_a_pattern_are_listed(files: OsFilesystem, outbox_dir: str, patterns: Any) -> None:
    """Each name is listed once."""
    assert sorted(files.list_names(outbox_dir, patterns)) == sorted(ReferenceScan().list_names(outbox_dir, patterns))


def test_the_pattern_of_a_kind_matches_only_names_of_that_kind(outbox_dir: str) -> None:
    """Every kind except `OTHER` has a pattern."""
    for kind, pattern in zip(layout.KINDS, layout.PATTERNS, strict=True):
        assert all(layout.kind_of(name) is kind for name in ReferenceScan().list_names(outbox_dir, (pattern,)))
    assert set(layout.KINDS) == set(Kind) - {Kind.OTHER}


def test_totals_are_computed_for_each_pattern(files: OsFilesystem, outbox_dir: str) -> None:
    """A name counts for the first pattern that it matches. Timestamps have sixteen digits, as in `layout`."""
    totals = files.file_totals(outbox_dir, layout.PATTERNS)
    assert totals == ReferenceScan().file_totals(outbox_dir, layout.PATTERNS)
    assert all(isinstance(pattern_totals, FileTotals) for pattern_totals in totals)
    sealed = [name for name, _ in ReferenceScan().list_files(outbox_dir) if layout.kind_of(name) is Kind.SEALED]
    seal_times = [sealed_at for sealed_at in map(layout.sealed_at, sealed) if sealed_at is not None]
    plain, compressed = [of_kind for of_kind, kind in zip(totals, layout.KINDS, strict=True) if kind is Kind.SEALED]
    total = plain.combined_with(compressed)
    assert (
        (total.files, total.oldest_micros, total.newest_micros)
        == (len(sealed), min(seal_times), max(seal_times))
        == (len(sealed), SEALED_AT, SEALED_AT + 30)
    )
    assert files.file_totals(outbox_dir, ()) == []


_names = st.one_of(
    st.just(""), st.sampled_from([*OTHER_NAMES, *(layout.sealed_name(SEALED_AT + n, "u") for n in range(-1, 21))])
)


@given(_names, _names, st.integers(0, 60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_first_names_of_a_range_are_listed(outbox_dir: str, after: str, until: str, most: int) -> None:
    """After one name and up to another, with the number of all names in the range."""
    expected = ReferenceScan().first_names(outbox_dir, layout.SEALED_PATTERNS, after, until, most)
    names = sorted(map(os.fsencode, ReferenceScan().list_names(outbox_dir, layout.SEALED_PATTERNS)))
    names = [name for name in names if name > os.fsencode(after) and (not until or name <= os.fsencode(until))]
    assert expected == NamePage([os.fsdecode(name) for name in names[:most]], os.fsdecode(max(names, default=b"")), len(names))
    for files in [OsFilesystem(), *([CompiledOsFilesystem()] if COMPILED else [])]:
        assert files.first_names(outbox_dir, layout.SEALED_PATTERNS, after, until, most) == expected


def test_a_large_directory_is_read_completely(files: OsFilesystem, tmp_path: Path) -> None:
    """It is read in several chunks."""
    names = [f"{number:0{1 + number % 200}d}.ndjson" for number in range(9000)]
    names = sorted({layout.SEALED_PATTERNS[0].begin + name for name in names})
    for name in names:
        (tmp_path / name).touch()
    path = str(tmp_path)
    assert sorted(files.list_names(path, ALL_NAMES)) == names
    assert sorted(name for name, _ in files.list_files(path)) == names
    assert files.first_names(path, ALL_NAMES, limit=5000) == NamePage(names[:5000], names[-1], len(names))
    assert files.file_totals(path, ALL_NAMES)[0].files == len(names)


def test_an_error_of_a_scan_has_the_path(files: OsFilesystem, tmp_path: Path) -> None:
    """For a missing directory and for a file."""
    (tmp_path / "file").touch()
    for path, error in ((str(tmp_path / "missing"), FileNotFoundError), (str(tmp_path / "file"), NotADirectoryError)):
        for scan in (
            lambda path: list(files.list_files(path)),
            lambda path: list(files.list_names(path, ALL_NAMES)),
            lambda path: files.file_totals(path, ALL_NAMES),
            lambda path: files.first_names(path, ALL_NAMES),
        ):
            with pytest.raises(error) as raised:
                scan(path)
            assert raised.value.filename == path


@compiled_only
@pytest.mark.parametrize(
    "wrong", [(), ("path",), (1, ALL_NAMES), ("path", [("", "")]), ("path", ("text",)), ("path", ((1, 2),))]
)
def test_wrong_arguments_raise(wrong: Any) -> None:
    """They are not read as paths or patterns."""
    with pytest.raises(TypeError):
        speedups.scan_sums(*wrong)


class InterruptedScanError(Exception):
    """Raised by the signal handler of a test."""


def test_an_interrupt_ends_a_scan_and_leaves_nothing_open(files: OsFilesystem, tmp_path: Path) -> None:
    """A scan of a large directory on a slow disk would take long."""
    for number in range(6000):
        (tmp_path / str(number)).touch()

    def interrupt(*_: object) -> None:
        raise InterruptedScanError

    def scan_for_ever() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.003)
        while True:
            files.file_totals(str(tmp_path), ALL_NAMES)
            files.first_names(str(tmp_path), ALL_NAMES, limit=10)

    previous_handler = signal.signal(signal.SIGALRM, interrupt)
    open_before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    try:
        with gc_control.no_foreign_garbage():
            for _ in range(20):
                with pytest.raises(InterruptedScanError):
                    scan_for_ever()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
    if open_before:
        assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a file system that allows huge sparse files")
def test_a_sum_of_sizes_that_overflows_is_the_maximum() -> None:
    """The sizes of sparse files may exceed 64 bits. A negative sum would mean that the directory has room."""
    path = tempfile.mkdtemp(dir="/dev/shm")
    try:
        for number in range(3):
            with open(f"{path}/{number}", "wb") as file:
                try:
                    os.truncate(file.fileno(), 2**63 - 1 - 4096)
                except OSError:
                    pytest.skip("this file system does not allow a file of this size")
        for files in [OsFilesystem(), *([CompiledOsFilesystem()] if COMPILED else [])]:
            total = files.file_totals(path, ALL_NAMES)[0]
            assert total.files == 3
            assert total.bytes >= 2**63 - 1
    finally:
        shutil.rmtree(path)


@compiled_only
def test_a_nested_read_does_not_change_the_chunk_that_is_being_read(tmp_path: Path) -> None:
    """A callback of the garbage collector may call the same iterator. The buffer belongs to one call at a time."""
    names = {f"{'n' * (number % 230)}{number}" for number in range(6000)}
    for name in names:
        (tmp_path / name).touch()
    chunks = speedups.DirectoryChunks(str(tmp_path), ALL_NAMES, sizes=True)
    nested: list[Any] = []
    busy = False

    def read_nested(_phase: str, _info: dict[str, int]) -> None:
        nonlocal busy
        if not busy:
            busy = True
            nested.extend(next(chunks, ()))
            busy = False

    thresholds = gc.get_threshold()
    gc.callbacks.append(read_nested)
    gc.set_threshold(50, 1, 1)
    try:
        outer = [entry for chunk in chunks for entry in chunk]
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(read_nested)
    listed = [name for name, _ in (*outer, *nested)]
    assert len(listed) == len(names)
    assert set(listed) == names
