"""What is asked of a directory is answered alike, compiled and in Python."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pillarbox.store import layout, speed
from pillarbox.store.dirscan import ALL, ByListing, Entry, First, Pattern, Sum
from pillarbox.store.filesystem import CompiledFilesystem, RealFilesystem
from pillarbox.store.layout import Kind
from tests.store import collector

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
compiled_only = pytest.mark.skipif(speed.listing is None, reason="the listing is not compiled here")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
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
def files(request: pytest.FixtureRequest) -> RealFilesystem:
    if request.param == "plain":
        return RealFilesystem()
    if speed.listing is None:
        pytest.skip("the listing is not compiled here")
    return CompiledFilesystem()


class Expected(ByListing):
    """Answers from what the operating system says."""

    def listing(self, path: str) -> Iterator[Entry]:
        found = [Path(path, name) for name in os.listdir(path)]
        return iter([Entry(one.name, one.stat().st_size) for one in found if one.is_file() and not one.is_symlink()])


def test_regular_files_are_listed_and_nothing_else(files: RealFilesystem, place: str) -> None:
    """With their sizes; no directory, pipe or link."""
    assert sorted(files.listing(place)) == sorted(Expected().listing(place))
    assert all(isinstance(entry, Entry) for entry in files.listing(place))


@pytest.mark.parametrize("patterns", [ALL, layout.SEALED, layout.COPIES, layout.PATTERNS, (), (Pattern("n", None),)])
def test_names_are_those_that_follow_a_pattern(files: RealFilesystem, place: str, patterns: Any) -> None:
    """Each once."""
    assert sorted(files.names(place, patterns)) == sorted(Expected().names(place, patterns))


def test_patterns_say_what_the_kind_of_a_name_is(place: str) -> None:
    """And nothing is counted under another."""
    for kind, pattern in zip(layout.KINDS, layout.PATTERNS, strict=True):
        assert all(layout.kind_of(name) is kind for name in Expected().names(place, (pattern,)))
    assert set(layout.KINDS) == set(Kind) - {Kind.OTHER}


def test_sums_are_by_pattern(files: RealFilesystem, place: str) -> None:
    """The first that a name follows; stamps are sixteen digits, as layout reads them."""
    sums = files.sums(place, layout.PATTERNS)
    assert sums == Expected().sums(place, layout.PATTERNS)
    assert all(isinstance(one, Sum) for one in sums)
    sealed = [name for name, _ in Expected().listing(place) if layout.kind_of(name) is Kind.SEALED]
    stamps = [stamp for stamp in map(layout.stamp_of, sealed) if stamp is not None]
    both = [one for one, kind in zip(sums, layout.KINDS, strict=True) if kind is Kind.SEALED]
    total = both[0].plus(both[1])
    assert (
        (total.files, total.oldest, total.newest) == (len(sealed), min(stamps), max(stamps)) == (len(sealed), STAMP, STAMP + 30)
    )
    assert files.sums(place, ()) == []


_names = st.one_of(st.just(""), st.sampled_from([*OTHERS, *(layout.sealed_name(STAMP + n, "u") for n in range(-1, 21))]))


@given(_names, _names, st.integers(0, 60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_first_in_order_are_named(place: str, after: str, until: str, most: int) -> None:
    """Behind one name and up to another, and how many there are in all."""
    expected = Expected().first(place, layout.SEALED, after, until, most)
    wanted = sorted(map(os.fsencode, Expected().names(place, layout.SEALED)))
    wanted = [name for name in wanted if name > os.fsencode(after) and (not until or name <= os.fsencode(until))]
    assert expected == First([os.fsdecode(name) for name in wanted[:most]], os.fsdecode(max(wanted, default=b"")), len(wanted))
    assert RealFilesystem().first(place, layout.SEALED, after, until, most) == expected


def test_a_directory_of_any_size_is_read_whole(files: RealFilesystem, tmp_path: Path) -> None:
    """Though it is read in parts."""
    names = [f"{number:0{1 + number % 200}d}.ndjson" for number in range(9000)]
    names = sorted({layout.SEALED[0].begin + name for name in names})
    for name in names:
        (tmp_path / name).touch()
    path = str(tmp_path)
    assert sorted(files.names(path, ALL)) == names
    assert sorted(name for name, _ in files.listing(path)) == names
    assert files.first(path, ALL, most=5000) == First(names[:5000], names[-1], len(names))
    assert files.sums(path, ALL)[0].files == len(names)


def test_what_cannot_be_listed_is_an_error_that_names_it(files: RealFilesystem, tmp_path: Path) -> None:
    """A directory that is not there, and a file."""
    (tmp_path / "file").touch()
    for path, error in ((str(tmp_path / "missing"), FileNotFoundError), (str(tmp_path / "file"), NotADirectoryError)):
        for ask in (
            lambda path: list(files.listing(path)),
            lambda path: list(files.names(path, ALL)),
            lambda path: files.sums(path, ALL),
            lambda path: files.first(path, ALL),
        ):
            with pytest.raises(error) as raised:
                ask(path)
            assert raised.value.filename == path


@compiled_only
@pytest.mark.parametrize("wrong", [(), ("path",), (1, ALL), ("path", [("", "")]), ("path", ("text",)), ("path", ((1, 2),))])
def test_what_makes_no_sense_is_refused(wrong: Any) -> None:
    """Rather than read as if it did."""
    from pillarbox.store import _listing

    with pytest.raises(TypeError):
        _listing.sums(*wrong)


class StruckError(Exception):
    """By a signal."""


def test_an_interrupt_ends_a_listing_and_leaves_nothing_open(files: RealFilesystem, tmp_path: Path) -> None:
    """A directory may be large and its disk slow."""
    for number in range(6000):
        (tmp_path / str(number)).touch()

    def interrupt(*_: object) -> None:
        raise StruckError

    def ask_for_ever() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.003)
        while True:
            files.sums(str(tmp_path), ALL)
            files.first(str(tmp_path), ALL, most=10)

    before = signal.signal(signal.SIGALRM, interrupt)
    open_before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    try:
        with collector.only_own_garbage():
            for _ in range(20):
                with pytest.raises(StruckError):
                    ask_for_ever()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if open_before:
        assert len(os.listdir("/proc/self/fd")) == open_before
