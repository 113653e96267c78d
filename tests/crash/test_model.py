"""The model of a loss of power itself: what may be left, and what may not."""

from __future__ import annotations

import random

import pytest

from pillarbox.errors import FileUnusableError
from pillarbox.store.filesystem import Filesystem
from pillarbox.testing.crash import CrashFilesystem, Disk, Killed, MisuseError, Op, State
from pillarbox.testing.durability_model import NAMES_MAX, DurabilityModel

A, B, C = "/d/a", "/d/b", "/d/c"


def machine(**files: bytes) -> tuple[Disk, CrashFilesystem]:
    disk = Disk({f"/d/{name}": data for name, data in files.items()})
    filesystem = CrashFilesystem(disk)
    filesystem.make_directory("/d")
    return disk, filesystem


def named(disk: Disk, filesystem: CrashFilesystem, path: str = A) -> int:
    """A new, empty file whose name is durable."""
    fd = filesystem.create(path)
    filesystem.sync_directory("/d")
    return fd


def left(disk: Disk) -> list[State]:
    """Everything that may be left, with any number of torn files; what can be listed is what is admitted."""
    survivors = DurabilityModel(disk.trace)
    states = list(survivors.states(torn=9))
    assert all(survivors.admits(state) for state in states)
    assert len(states) == survivors.count(torn=9)
    return states


def contents(disk: Disk, path: str = A) -> set[bytes | None]:
    return {state.get(path) for state in left(disk)}


def test_it_is_a_file_system() -> None:
    """Every verb of the protocol; the type checker looks at the signatures."""
    filesystem: Filesystem = CrashFilesystem(Disk())
    assert {verb for verb in dir(Filesystem) if not verb.startswith("_")} <= set(dir(filesystem))


def test_an_unsynced_write_is_lost_there_sized_or_torn() -> None:
    """At every byte; torn, the rest is missing or NUL."""
    disk, filesystem = machine()
    filesystem.write(named(disk, filesystem), b"abc")
    assert contents(disk) == {b"", b"abc", b"\0\0\0", b"a", b"ab", b"a\0\0", b"ab\0", b"\0", b"\0\0"}


def test_a_synced_write_is_there() -> None:
    """Whatever else is not."""
    disk, filesystem = machine()
    fd = named(disk, filesystem)
    filesystem.write(fd, b"abc")
    filesystem.sync_data(fd)
    filesystem.write(fd, b"d")
    assert contents(disk) == {b"abc", b"abcd", b"abc\0"}


def test_a_later_write_may_be_there_without_an_earlier_one() -> None:
    """NUL bytes are in the gap, and one write at most is torn."""
    disk, filesystem = machine()
    fd = named(disk, filesystem)
    filesystem.write(fd, b"ab")
    filesystem.write(fd, b"cd")
    found = contents(disk)
    assert {b"", b"ab", b"abcd", b"\0\0cd", b"ab\0\0", b"\0\0\0\0", b"abc", b"a\0cd", b"\0\0c"} <= found
    assert not {b"cd", b"a\0c\0", b"abd", b"b"} & found


def test_a_state_by_chance_is_one_of_them_and_each_may_come() -> None:
    """For what is too much to enumerate."""
    disk, filesystem = machine(b=b"1")
    fd = filesystem.create(A)
    filesystem.write(fd, b"ab")
    filesystem.truncate(fd, 1)
    filesystem.rename(B, C)
    survivors = DurabilityModel(disk.trace)
    states = {tuple(sorted(state.items())) for state in survivors.states()}
    chance = random.Random(1)
    assert {tuple(sorted(survivors.random_state(chance).items())) for _ in range(2000)} == states


def test_more_unsynced_names_than_can_be_told_apart_are_not_enumerated() -> None:
    """But a state by chance is to be had."""
    disk, filesystem = machine()
    for number in range(NAMES_MAX + 1):
        filesystem.create(f"/d/{number}")
    survivors = DurabilityModel(disk.trace)
    assert survivors.unsynced_names == NAMES_MAX + 1
    with pytest.raises(OverflowError):
        next(survivors.states())
    assert len(survivors.random_state(random.Random(1))) < NAMES_MAX


def test_a_torn_file_does_not_tear_another_unless_asked_for() -> None:
    """The bound of an enumeration; what a real disk leaves is admitted however many are torn."""
    disk, filesystem = machine()
    one, two = filesystem.create(A), named(disk, filesystem, B)
    filesystem.write(one, b"ab")
    filesystem.write(two, b"cd")
    both = {A: b"a", B: b"c"}
    survivors = DurabilityModel(disk.trace)
    assert both not in list(survivors.states())
    assert both in list(survivors.states(torn=2))
    assert survivors.admits(both)


def test_a_write_is_torn_at_chosen_bytes_only_where_that_is_asked_for() -> None:
    """From either end."""
    disk, filesystem = machine()
    filesystem.write(named(disk, filesystem), b"abcdef")
    states = {state[A].strip(b"\0") for state in DurabilityModel(disk.trace).states(tears=(1, -1, 9))}
    assert states == {b"", b"a", b"abcde", b"abcdef"}


def test_a_truncation_may_be_undone() -> None:
    """And what was written after it may be there all the same."""
    disk, filesystem = machine(a=b"abc")
    fd = filesystem.open_lock_file(A)
    filesystem.truncate(fd, 1)
    filesystem.write(fd, b"X")
    wiped = {b"a\0\0", b"aX\0"}  # the old size, with the rest of the page wiped
    assert contents(disk) == {b"abc", b"a", b"aX", b"a\0", b"aXc"} | wiped


def test_a_file_that_is_replaced_may_be_old_new_or_between() -> None:
    """It is for what may be lost."""
    disk, filesystem = machine(a=b"old.")
    filesystem.overwrite(filesystem.open_lock_file(A), b"new")
    assert {b"old.", b"new", b"new.", b"old", b"ned."} <= contents(disk) | {b"ned."}
    assert not {b"", b"xyz"} & contents(disk)


def test_what_a_failed_sync_left_is_doomed() -> None:
    """A second sync answers, and is believed for what was written in between only."""
    disk, filesystem = machine()
    fd = named(disk, filesystem)
    filesystem.write(fd, b"a")
    filesystem.sync_failed(fd)
    filesystem.write(fd, b"b")
    filesystem.sync_data(fd)
    assert contents(disk) == {b"ab", b"\0b"}
    filesystem.write(fd, b"c")
    filesystem.sync_failed(fd)
    filesystem.sync_data(fd)
    assert contents(disk) == {b"ab", b"\0b", b"abc", b"\0bc", b"ab\0", b"\0b\0"}


def test_a_name_may_be_durable_before_the_data_and_the_data_before_the_name() -> None:
    """Neither waits for the other."""
    disk, filesystem = machine()
    fd = named(disk, filesystem)
    filesystem.write(fd, b"a")
    assert contents(disk) == {b"", b"a", b"\0"}
    disk, filesystem = machine()
    fd = filesystem.create(A)
    filesystem.write(fd, b"a")
    filesystem.sync_data(fd)
    assert contents(disk) == {None, b"a"}


def test_a_rename_may_be_undone_until_the_directory_is_synced() -> None:
    """The file is under one name, never both or none."""
    disk, filesystem = machine(a=b"1")
    filesystem.rename(A, B)
    assert left(disk) == [{A: b"1"}, {B: b"1"}]
    filesystem.sync_directory("/d")
    assert left(disk) == [{B: b"1"}]


def test_a_rename_may_be_there_without_the_creation_or_another_rename() -> None:
    """Names change each for itself."""
    disk, filesystem = machine()
    filesystem.create(A)
    filesystem.rename(A, B)
    filesystem.rename(B, C)
    assert sorted(map(sorted, left(disk))) == [[], [A], [B], [C]]


def test_a_rename_over_a_file_leaves_the_one_or_the_other() -> None:
    """Never neither."""
    disk, filesystem = machine(a=b"new", b=b"old")
    filesystem.rename(A, B)
    assert left(disk) == [{A: b"new", B: b"old"}, {B: b"new"}]


def test_an_unlink_may_be_undone_until_the_directory_is_synced() -> None:
    """The file comes back with what is durable of it."""
    disk, filesystem = machine(a=b"1", b=b"2")
    filesystem.unlink(A)
    filesystem.unlink(B)
    assert sorted(map(sorted, left(disk))) == [[], [A], [A, B], [B]]
    filesystem.sync_directory("/d")
    assert left(disk) == [{}]


def test_another_directorys_sync_makes_no_name_durable() -> None:
    """Nor does a file's."""
    disk, filesystem = machine(a=b"1")
    filesystem.make_directory("/e")
    filesystem.rename(A, B)
    filesystem.sync_directory("/e")
    filesystem.sync_data(filesystem.open_existing(B))
    assert left(disk) == [{A: b"1"}, {B: b"1"}]


Q, QA, QB = "/d/q", "/d/q/a", "/d/q/b"


def queue(**files: bytes) -> tuple[Disk, CrashFilesystem]:
    """A machine with a durable directory in the other one."""
    disk, filesystem = machine(**files)
    filesystem.make_directory(Q)
    return disk, filesystem


def names(disk: Disk) -> list[list[str]]:
    return sorted(sorted(path for path in state if path != "/d/q/") for state in left(disk))


def test_a_link_is_unsure_until_its_own_directory_is_synced() -> None:
    """That of the name that it was made of changes nothing."""
    disk, filesystem = queue(a=b"1")
    filesystem.link(A, QA)
    assert names(disk) == [[A], [A, QA]]
    filesystem.sync_directory("/d")
    filesystem.sync_data(filesystem.open_existing(A, allow_links=True))
    assert names(disk) == [[A], [A, QA]]
    filesystem.sync_directory(Q)
    assert names(disk) == [[A, QA]]
    assert Disk(disk.files, disk.links).files == disk.files


def test_a_link_may_be_there_without_the_name_that_it_was_made_of_and_the_other_way_round() -> None:
    """Both unsynced, any of the two, both, or none; with one content."""
    disk, filesystem = queue()
    filesystem.write(filesystem.create(A), b"1")
    filesystem.link(A, QA)
    assert names(disk).count([]) == 1
    assert {tuple(sorted(state.items())) for state in left(disk) if len(state) == 3} == {
        ((A, data), ("/d/q/", b""), (QA, data)) for data in (b"", b"1", b"\0")
    }
    assert DurabilityModel(disk.trace).admits({A: b"1", "/d/q/": b"", QA: b"1"})
    assert not DurabilityModel(disk.trace).admits({A: b"1", "/d/q/": b"", QA: b""})


def test_an_unlink_of_one_name_leaves_the_others() -> None:
    """Each for itself; the file goes with the last."""
    disk, filesystem = queue(a=b"1")
    filesystem.link(A, QA)
    filesystem.sync_directory(Q)
    filesystem.unlink(A)
    assert names(disk) == [[A, QA], [QA]]
    filesystem.unlink(QA)
    assert names(disk) == [[], [A], [A, QA], [QA]]
    filesystem.sync_directory("/d")
    assert names(disk) == [[], [QA]]


def test_a_link_that_is_not_synced_before_the_other_name_goes_may_be_lost_with_it() -> None:
    """What a distributor must not do."""
    disk, filesystem = queue(a=b"1")
    filesystem.link(A, QA)
    filesystem.unlink(A)
    filesystem.sync_directory("/d")
    assert names(disk) == [[], [QA]]


def test_a_rename_of_one_name_leaves_the_others() -> None:
    """It takes its own old name away, and no other."""
    disk, filesystem = queue(a=b"1")
    filesystem.link(A, QA)
    filesystem.rename(QA, QB)
    assert names(disk) == [[A], [A, QA], [A, QB]]
    filesystem.sync_directory(Q)
    assert names(disk) == [[A, QB]]


def test_a_rename_between_two_names_of_one_file_does_nothing() -> None:
    """As rename(2) says: both names stay."""
    disk, filesystem = machine(a=b"1")
    filesystem.link(A, B)
    filesystem.sync_directory("/d")
    filesystem.rename(A, B)
    assert left(disk) == [{A: b"1", B: b"1"}]


def test_a_directory_that_was_made_and_not_synced_is_lost_with_what_is_in_it() -> None:
    """Though that was synced; a process that dies in `make_directory` leaves such a one."""
    disk, filesystem = machine(a=b"1")
    filesystem.make_directory(Q)
    assert disk.trace[-2:] == [Op("make_directory", Q, disk.numbers[Q]), Op("sync_directory", "/d")]
    disk.trace.pop()
    filesystem.link(A, QA)
    filesystem.sync_directory(Q)
    assert left(disk) == [{A: b"1"}, {A: b"1", "/d/q/": b"", QA: b"1"}]
    filesystem.make_directory(Q)
    assert left(disk) == [{A: b"1", "/d/q/": b"", QA: b"1"}]


def test_a_directory_keeps_what_is_in_it_when_it_is_renamed() -> None:
    """Under the one name or the other, never both or none; what is made in it later goes where it goes."""
    disk, filesystem = queue()
    filesystem.create(QA)
    filesystem.sync_directory(Q)
    filesystem.rename(Q, "/d/r")
    filesystem.create("/d/r/b")
    assert sorted(map(sorted, left(disk))) == [
        ["/d/q/", QA],
        ["/d/q/", QA, QB],
        ["/d/r/", "/d/r/a"],
        ["/d/r/", "/d/r/a", "/d/r/b"],
    ]
    filesystem.sync_directory("/d/r")
    assert sorted(map(sorted, left(disk))) == [["/d/q/", QA, QB], ["/d/r/", "/d/r/a", "/d/r/b"]]
    assert filesystem.subdirectories("/d") == ["r"]
    assert (filesystem.inspect_directory(Q), [name for name, _ in filesystem.list_files("/d/r")]) == (None, ["a", "b"])


def test_a_directory_that_is_removed_may_come_back_with_what_was_in_it() -> None:
    """Or be gone though the removal of what was in it is not there."""
    disk, filesystem = queue()
    filesystem.create(QA)
    filesystem.sync_directory(Q)
    filesystem.unlink(QA)
    filesystem.remove_directory(Q)
    assert sorted(map(sorted, left(disk))) == [[], ["/d/q/"], ["/d/q/", QA]]
    filesystem.sync_directory("/d")
    assert left(disk) == [{}]


def test_a_lock_is_the_files_whatever_name_it_was_opened_under() -> None:
    """Shared ones stand beside each other, and keep an exclusive one out."""
    disk, one = queue(a=b"")
    two = CrashFilesystem(disk)
    one.link(A, QA)
    here, there = one.open_existing(A, allow_links=True), two.open_existing(QA, allow_links=True)
    assert one.lock_shared(here)
    assert two.lock_shared(there)
    assert not one.lock(here)  # which costs the shared one, as flock(2) says
    assert two.lock(there)
    assert not one.lock_shared(here)
    two.kill()
    assert one.lock_shared(here)
    assert (one.is_file_at(here, A), one.is_file_at(here, QA)) == (True, True)
    one.unlink(A)
    assert (one.is_file_at(here, A), one.has_name(here)) == (False, True)


def test_a_file_with_several_names_is_opened_by_who_expects_it_only() -> None:
    """As the real one is; a stranger may have made the other name."""
    _disk, filesystem = queue(a=b"")
    filesystem.link(A, QA)
    for verb in (filesystem.open_existing, filesystem.open_lock_file, filesystem.open_append):
        with pytest.raises(FileUnusableError):
            verb(A)
    assert filesystem.open_existing(QA, allow_links=True)


def test_directories_answer_as_the_kernel_does() -> None:
    """What is taken, missing, or not empty."""
    _disk, filesystem = queue(a=b"")
    for verb in (lambda: filesystem.link(A, A), lambda: filesystem.link(A, Q), lambda: filesystem.create(Q)):
        with pytest.raises(FileExistsError):
            verb()
    for source, target in ((B, QA), (A, "/d/r/a")):
        with pytest.raises(FileNotFoundError):
            filesystem.link(source, target)
    for look in (filesystem.remove_directory, filesystem.subdirectories):
        with pytest.raises(FileNotFoundError):
            look("/d/r")
    filesystem.make_directory("/d/r/s")
    for path in ("/d/r", "/d/q"):
        filesystem.link(A, QA) if path == Q else None
        with pytest.raises(OSError, match="not empty"):
            filesystem.remove_directory(path)
    with pytest.raises(OSError, match="not empty"):
        filesystem.rename(Q, "/d/r")
    with pytest.raises(FileExistsError):
        filesystem.rename(Q, A)
    filesystem.rename("/d/r/s", "/d/r/t")
    filesystem.make_directory("/d/r/s")
    filesystem.rename("/d/r/s", "/d/r/t")
    assert filesystem.subdirectories("/d/r") == ["t"]


def test_a_state_that_no_loss_of_power_leaves_is_not_admitted() -> None:
    """Foreign names, foreign bytes, a synced byte missing."""
    disk, filesystem = machine(a=b"1")
    fd = filesystem.open_lock_file(A)
    filesystem.write(fd, b"23")
    survivors = DurabilityModel(disk.trace)
    for data in (b"1", b"12", b"1\0\0", b"1\0", b"123"):
        assert survivors.admits({A: data})
    for state in ({}, {A: b""}, {A: b"13"}, {A: b"1234"}, {A: b"\0"}, {A: b"1", B: b""}, {A: b"x23"}):
        assert not survivors.admits(state)


def test_files_that_are_ignored_are_as_if_they_were_never_made() -> None:
    """Locks."""
    disk, filesystem = machine()
    filesystem.write(filesystem.open_lock_file(B), b"beat")
    filesystem.sync_data(named(disk, filesystem))
    survivors = DurabilityModel(disk.trace, ignoring={"b"})
    assert list(survivors.states()) == [{A: b""}]
    assert survivors.admits({A: b"", B: b"anything"})


def test_the_death_of_a_process_loses_its_descriptors_and_locks_and_nothing_else() -> None:
    """Whatever its handlers still try."""
    disk, one = machine()
    two = CrashFilesystem(disk)
    fd = one.create(A)
    assert one.lock(fd)
    one.write(fd, b"1")
    again = two.open_existing(A)
    assert not two.lock(again)
    one.kill()
    assert two.lock(again)
    with pytest.raises(Killed):
        one.write(fd, b"2")
    with pytest.raises(Killed):
        one.close(fd)
    assert disk.files == DurabilityModel(disk.trace).complete_state() == {A: b"1"}


def test_locks_are_of_open_file_descriptions_and_follow_the_file() -> None:
    """As `flock` is; a rename takes it along, a second opening has none."""
    _disk, filesystem = machine(a=b"")
    one, two = filesystem.open_existing(A), filesystem.open_existing(A)
    assert filesystem.lock(one)
    assert filesystem.lock(one)
    assert not filesystem.lock(two)
    filesystem.rename(A, B)
    assert not filesystem.lock(filesystem.open_existing(B))
    assert (filesystem.is_file_at(one, A), filesystem.is_file_at(one, B), filesystem.has_name(one)) == (False, True, True)
    filesystem.unlink(B)
    assert not filesystem.has_name(one)
    filesystem.close(one)
    assert filesystem.lock(two)


def test_a_descriptor_that_is_closed_or_to_read_is_not_used() -> None:
    """The kernel would answer something that the code may take for trouble with the disk."""
    _disk, filesystem = machine(a=b"")
    fd = filesystem.open_existing(A)
    with pytest.raises(MisuseError):
        filesystem.write(fd, b"1")
    filesystem.close(fd)
    with pytest.raises(MisuseError):
        filesystem.close(fd)


def test_what_is_missing_or_there_already_is_said_as_the_kernel_says_it() -> None:
    """Errors are `OSError`s."""
    _disk, filesystem = machine(a=b"")
    with pytest.raises(FileExistsError):
        filesystem.create(A)
    with pytest.raises(FileExistsError):
        filesystem.make_directory(A)
    for verb in (filesystem.open_existing, filesystem.unlink, lambda path: filesystem.rename(path, C)):
        with pytest.raises(FileNotFoundError):
            verb(B)
    with pytest.raises(FileNotFoundError):
        filesystem.list_files("/e")
    with pytest.raises(FileNotFoundError):
        filesystem.create("/e/a")
