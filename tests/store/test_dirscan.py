"""What is asked of a directory is answered alike, compiled and in Python."""

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
from pillarbox.store.dirscan import ALL_NAMES, FileEntry, FileTotals, NamePage, NamePattern, PortableScanOps
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import CompiledOsFilesystem, OsFilesystem
from tests.store import gc_control

STAMP = 1_700_000_000_000_000
OTHERS = [
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
    f"delivered-{STAMP}-{STAMP}-u.ndjson",
    "ledger.ndjson",
    ".ndjson",
    "n",
]
compiled_only = pytest.mark.skipif(not COMPILED, reason="the listing is not compiled here")


@pytest.fixture(scope="module")
def outbox_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with files of every kind, and with what is no file."""
    path = tmp_path_factory.mktemp("listing")
    names = [*OTHERS, *(layout.sealed_name(STAMP + number, "u") for number in range(20))]
    names += [layout.compressed_name(layout.sealed_name(STAMP + number, "u")) for number in (3, 30)]
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
        pytest.skip("the listing is not compiled here")
    return CompiledOsFilesystem()


class Expected(PortableScanOps):
    """Answers from what the operating system says."""

    def list_files(self, path: str) -> Iterator[FileEntry]:
        found = [Path(path, name) for name in os.listdir(path)]
        return iter([FileEntry(one.name, one.stat().st_size) for one in found if one.is_file() and not one.is_symlink()])


def test_regular_files_are_listed_and_nothing_else(files: OsFilesystem, outbox_dir: str) -> None:
    """With their sizes; no directory, pipe or link."""
    assert sorted(files.list_files(outbox_dir)) == sorted(Expected().list_files(outbox_dir))
    assert all(isinstance(entry, FileEntry) for entry in files.list_files(outbox_dir))


@pytest.mark.parametrize(
    "patterns", [ALL_NAMES, layout.SEALED_PATTERNS, layout.COMPRESSED_PATTERNS, layout.PATTERNS, (), (NamePattern("n", None),)]
)
def test_names_are_those_that_follow_a_pattern(files: OsFilesystem, outbox_dir: str, patterns: Any) -> None:
    """Each once."""
    assert sorted(files.list_names(outbox_dir, patterns)) == sorted(Expected().list_names(outbox_dir, patterns))


def test_patterns_say_what_the_kind_of_a_name_is(outbox_dir: str) -> None:
    """And nothing is counted under another."""
    for kind, pattern in zip(layout.KINDS, layout.PATTERNS, strict=True):
        assert all(layout.kind_of(name) is kind for name in Expected().list_names(outbox_dir, (pattern,)))
    assert set(layout.KINDS) == set(Kind) - {Kind.OTHER}


def test_sums_are_by_pattern(files: OsFilesystem, outbox_dir: str) -> None:
    """The first that a name follows; stamps are sixteen digits, as layout reads them."""
    sums = files.file_totals(outbox_dir, layout.PATTERNS)
    assert sums == Expected().file_totals(outbox_dir, layout.PATTERNS)
    assert all(isinstance(one, FileTotals) for one in sums)
    sealed = [name for name, _ in Expected().list_files(outbox_dir) if layout.kind_of(name) is Kind.SEALED]
    stamps = [stamp for stamp in map(layout.sealed_at, sealed) if stamp is not None]
    both = [one for one, kind in zip(sums, layout.KINDS, strict=True) if kind is Kind.SEALED]
    total = both[0].combined_with(both[1])
    assert (
        (total.files, total.oldest_micros, total.newest_micros)
        == (len(sealed), min(stamps), max(stamps))
        == (len(sealed), STAMP, STAMP + 30)
    )
    assert files.file_totals(outbox_dir, ()) == []


_names = st.one_of(st.just(""), st.sampled_from([*OTHERS, *(layout.sealed_name(STAMP + n, "u") for n in range(-1, 21))]))


@given(_names, _names, st.integers(0, 60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_first_in_order_are_named(outbox_dir: str, after: str, until: str, most: int) -> None:
    """Behind one name and up to another, and how many there are in all."""
    expected = Expected().first_names(outbox_dir, layout.SEALED_PATTERNS, after, until, most)
    wanted = sorted(map(os.fsencode, Expected().list_names(outbox_dir, layout.SEALED_PATTERNS)))
    wanted = [name for name in wanted if name > os.fsencode(after) and (not until or name <= os.fsencode(until))]
    assert expected == NamePage(
        [os.fsdecode(name) for name in wanted[:most]], os.fsdecode(max(wanted, default=b"")), len(wanted)
    )
    for files in [OsFilesystem(), *([CompiledOsFilesystem()] if COMPILED else [])]:
        assert files.first_names(outbox_dir, layout.SEALED_PATTERNS, after, until, most) == expected


def test_a_directory_of_any_size_is_read_whole(files: OsFilesystem, tmp_path: Path) -> None:
    """Though it is read in parts."""
    names = [f"{number:0{1 + number % 200}d}.ndjson" for number in range(9000)]
    names = sorted({layout.SEALED_PATTERNS[0].begin + name for name in names})
    for name in names:
        (tmp_path / name).touch()
    path = str(tmp_path)
    assert sorted(files.list_names(path, ALL_NAMES)) == names
    assert sorted(name for name, _ in files.list_files(path)) == names
    assert files.first_names(path, ALL_NAMES, limit=5000) == NamePage(names[:5000], names[-1], len(names))
    assert files.file_totals(path, ALL_NAMES)[0].files == len(names)


def test_what_cannot_be_listed_is_an_error_that_names_it(files: OsFilesystem, tmp_path: Path) -> None:
    """A directory that is not there, and a file."""
    (tmp_path / "file").touch()
    for path, error in ((str(tmp_path / "missing"), FileNotFoundError), (str(tmp_path / "file"), NotADirectoryError)):
        for ask in (
            lambda path: list(files.list_files(path)),
            lambda path: list(files.list_names(path, ALL_NAMES)),
            lambda path: files.file_totals(path, ALL_NAMES),
            lambda path: files.first_names(path, ALL_NAMES),
        ):
            with pytest.raises(error) as raised:
                ask(path)
            assert raised.value.filename == path


@compiled_only
@pytest.mark.parametrize(
    "wrong", [(), ("path",), (1, ALL_NAMES), ("path", [("", "")]), ("path", ("text",)), ("path", ((1, 2),))]
)
def test_what_makes_no_sense_is_refused(wrong: Any) -> None:
    """Rather than read as if it did."""
    with pytest.raises(TypeError):
        speedups.scan_sums(*wrong)


class StruckError(Exception):
    """By a signal."""


def test_an_interrupt_ends_a_listing_and_leaves_nothing_open(files: OsFilesystem, tmp_path: Path) -> None:
    """A directory may be large and its disk slow."""
    for number in range(6000):
        (tmp_path / str(number)).touch()

    def interrupt(*_: object) -> None:
        raise StruckError

    def ask_for_ever() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.003)
        while True:
            files.file_totals(str(tmp_path), ALL_NAMES)
            files.first_names(str(tmp_path), ALL_NAMES, limit=10)

    before = signal.signal(signal.SIGALRM, interrupt)
    open_before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    try:
        with gc_control.no_foreign_garbage():
            for _ in range(20):
                with pytest.raises(StruckError):
                    ask_for_ever()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if open_before:
        assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a file system that takes files of any size")
def test_sizes_that_overflow_add_up_to_the_greatest_number() -> None:
    """Sparse files may have more bytes together than a number of 64 bits holds; a negative sum would mean that there is room."""
    path = tempfile.mkdtemp(dir="/dev/shm")
    try:
        for number in range(3):
            with open(f"{path}/{number}", "wb") as file:
                try:
                    os.truncate(file.fileno(), 2**63 - 1 - 4096)
                except OSError:
                    pytest.skip("this file system takes no file that is so large")
        for files in [OsFilesystem(), *([CompiledOsFilesystem()] if COMPILED else [])]:
            total = files.file_totals(path, ALL_NAMES)[0]
            assert total.files == 3
            assert total.bytes >= 2**63 - 1
    finally:
        shutil.rmtree(path)


@compiled_only
def test_who_reads_on_while_a_chunk_is_made_does_not_change_it(tmp_path: Path) -> None:
    """The garbage collector may call anything, also the same iterator; the buffer belongs to one call at a time."""
    names = {f"{'n' * (number % 230)}{number}" for number in range(6000)}
    for name in names:
        (tmp_path / name).touch()
    chunks = speedups.DirectoryChunks(str(tmp_path), ALL_NAMES, sizes=True)
    inner: list[Any] = []
    busy = False

    def read_on(_phase: str, _info: dict[str, int]) -> None:
        nonlocal busy
        if not busy:
            busy = True
            inner.extend(next(chunks, ()))
            busy = False

    before = gc.get_threshold()
    gc.callbacks.append(read_on)
    gc.set_threshold(50, 1, 1)
    try:
        outer = [entry for chunk in chunks for entry in chunk]
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(read_on)
    found = [name for name, _ in (*outer, *inner)]
    assert len(found) == len(names)
    assert set(found) == names
