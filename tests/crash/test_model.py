"""The durability model: the states that a power loss may leave, and those that it cannot leave."""

from __future__ import annotations

import random

import pytest

from pillarbox.errors import FileUnusableError
from pillarbox.store.filesystem import Filesystem
from pillarbox.testing.crash import CrashFilesystem, Disk, Killed, MisuseError, Op, State
from pillarbox.testing.durability_model import NAMES_MAX, DurabilityModel

A, B, C = "/d/a", "/d/b", "/d/c"


def new_disk(**files: bytes) -> tuple[Disk, CrashFilesystem]:
    disk = Disk({f"/d/{name}": data for name, data in files.items()})
    filesystem = CrashFilesystem(disk)
    filesystem.make_directory("/d")
    return disk, filesystem


def create_durable(disk: Disk, filesystem: CrashFilesystem, path: str = A) -> int:
    """Create an empty file whose name is durable. Returns its descriptor."""
    fd = filesystem.create(path)
    filesystem.sync_directory("/d")
    return fd


def states_after_power_loss(disk: Disk) -> list[State]:
    """All states that a power loss may leave, with any number of torn files. The model admits each of them."""
    model = DurabilityModel(disk.trace)
    states = list(model.states(torn=9))
    assert all(model.admits(state) for state in states)
    assert len(states) == model.count(torn=9)
    return states


def contents(disk: Disk, path: str = A) -> set[bytes | None]:
    return {state.get(path) for state in states_after_power_loss(disk)}


def test_the_simulated_disk_has_every_operation_of_a_filesystem() -> None:
    """The type checker compares the signatures."""
    filesystem: Filesystem = CrashFilesystem(Disk())
    assert {verb for verb in dir(Filesystem) if not verb.startswith("_")} <= set(dir(filesystem))


def test_an_unsynced_write_may_be_lost_complete_sized_or_torn() -> None:
    """It may be torn at every byte; the rest is missing or NUL."""
    disk, filesystem = new_disk()
    filesystem.write(create_durable(disk, filesystem), b"abc")
    assert contents(disk) == {b"", b"abc", b"\0\0\0", b"a", b"ab", b"a\0\0", b"ab\0", b"\0", b"\0\0"}


def test_a_synced_write_survives() -> None:
    """Later, unsynced writes may be lost."""
    disk, filesystem = new_disk()
    fd = create_durable(disk, filesystem)
    filesystem.write(fd, b"abc")
    filesystem.sync_data(fd)
    filesystem.write(fd, b"d")
    assert contents(disk) == {b"abc", b"abcd", b"abc\0"}


def test_a_later_write_may_survive_without_an_earlier_one() -> None:
    """The gap has NUL bytes, and at most one write is torn."""
    disk, filesystem = new_disk()
    fd = create_durable(disk, filesystem)
    filesystem.write(fd, b"ab")
    filesystem.write(fd, b"cd")
    possible = contents(disk)
    assert {b"", b"ab", b"abcd", b"\0\0cd", b"ab\0\0", b"\0\0\0\0", b"abc", b"a\0cd", b"\0\0c"} <= possible
    assert not {b"cd", b"a\0c\0", b"abd", b"b"} & possible


def test_random_states_cover_exactly_the_possible_states() -> None:
    """Random states are for models with too many states to enumerate."""
    disk, filesystem = new_disk(b=b"1")
    fd = filesystem.create(A)
    filesystem.write(fd, b"ab")
    filesystem.truncate(fd, 1)
    filesystem.rename(B, C)
    model = DurabilityModel(disk.trace)
    states = {tuple(sorted(state.items())) for state in model.states()}
    chance = random.Random(1)
    assert {tuple(sorted(model.random_state(chance).items())) for _ in range(2000)} == states


def test_too_many_unsynced_names_are_not_enumerated() -> None:
    """A random state is still possible."""
    disk, filesystem = new_disk()
    for number in range(NAMES_MAX + 1):
        filesystem.create(f"/d/{number}")
    model = DurabilityModel(disk.trace)
    assert model.unsynced_names == NAMES_MAX + 1
    with pytest.raises(OverflowError):
        next(model.states())
    assert len(model.random_state(random.Random(1))) < NAMES_MAX


def test_only_one_file_is_torn_unless_more_are_requested() -> None:
    """This bounds an enumeration. `admits` allows any number of torn files, as a real disk may leave."""
    disk, filesystem = new_disk()
    fd_a, fd_b = filesystem.create(A), create_durable(disk, filesystem, B)
    filesystem.write(fd_a, b"ab")
    filesystem.write(fd_b, b"cd")
    both_torn = {A: b"a", B: b"c"}
    model = DurabilityModel(disk.trace)
    assert both_torn not in list(model.states())
    assert both_torn in list(model.states(torn=2))
    assert model.admits(both_torn)


def test_the_positions_of_tears_can_be_chosen() -> None:
    """Counted from either end of the write."""
    disk, filesystem = new_disk()
    filesystem.write(create_durable(disk, filesystem), b"abcdef")
    states = {state[A].strip(b"\0") for state in DurabilityModel(disk.trace).states(tears=(1, -1, 9))}
    assert states == {b"", b"a", b"abcde", b"abcdef"}


def test_a_truncation_may_be_undone() -> None:
    """A write after it may survive nevertheless."""
    disk, filesystem = new_disk(a=b"abc")
    fd = filesystem.open_lock_file(A)
    filesystem.truncate(fd, 1)
    filesystem.write(fd, b"X")
    wiped = {b"a\0\0", b"aX\0"}  # the old size, with the rest of the page wiped
    assert contents(disk) == {b"abc", b"a", b"aX", b"a\0", b"aXc"} | wiped


def test_an_overwritten_file_may_be_old_new_or_mixed() -> None:
    """`overwrite` is for data that may be lost."""
    disk, filesystem = new_disk(a=b"old.")
    filesystem.overwrite(filesystem.open_lock_file(A), b"new")
    assert {b"old.", b"new", b"new.", b"old", b"ned."} <= contents(disk) | {b"ned."}
    assert not {b"", b"xyz"} & contents(disk)


def test_data_of_a_failed_sync_may_be_lost() -> None:
    """A second sync succeeds, but makes only the data durable that was written in between."""
    disk, filesystem = new_disk()
    fd = create_durable(disk, filesystem)
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
    """They are independent."""
    disk, filesystem = new_disk()
    fd = create_durable(disk, filesystem)
    filesystem.write(fd, b"a")
    assert contents(disk) == {b"", b"a", b"\0"}
    disk, filesystem = new_disk()
    fd = filesystem.create(A)
    filesystem.write(fd, b"a")
    filesystem.sync_data(fd)
    assert contents(disk) == {None, b"a"}


def test_a_rename_may_be_undone_until_the_directory_is_synced() -> None:
    """The file has one of the names, never both or none."""
    disk, filesystem = new_disk(a=b"1")
    filesystem.rename(A, B)
    assert states_after_power_loss(disk) == [{A: b"1"}, {B: b"1"}]
    filesystem.sync_directory("/d")
    assert states_after_power_loss(disk) == [{B: b"1"}]


def test_a_rename_may_survive_without_the_creation_or_another_rename() -> None:
    """Changes of names are independent."""
    disk, filesystem = new_disk()
    filesystem.create(A)
    filesystem.rename(A, B)
    filesystem.rename(B, C)
    assert sorted(map(sorted, states_after_power_loss(disk))) == [[], [A], [B], [C]]


def test_a_rename_over_a_file_leaves_the_old_or_the_new_file() -> None:
    """One of the two always has the name."""
    disk, filesystem = new_disk(a=b"new", b=b"old")
    filesystem.rename(A, B)
    assert states_after_power_loss(disk) == [{A: b"new", B: b"old"}, {B: b"new"}]


def test_an_unlink_may_be_undone_until_the_directory_is_synced() -> None:
    """The file reappears with its durable data."""
    disk, filesystem = new_disk(a=b"1", b=b"2")
    filesystem.unlink(A)
    filesystem.unlink(B)
    assert sorted(map(sorted, states_after_power_loss(disk))) == [[], [A], [A, B], [B]]
    filesystem.sync_directory("/d")
    assert states_after_power_loss(disk) == [{}]


def test_the_sync_of_another_directory_makes_no_name_durable() -> None:
    """Neither does the sync of a file."""
    disk, filesystem = new_disk(a=b"1")
    filesystem.make_directory("/e")
    filesystem.rename(A, B)
    filesystem.sync_directory("/e")
    filesystem.sync_data(filesystem.open_existing(B))
    assert states_after_power_loss(disk) == [{A: b"1"}, {B: b"1"}]


Q, QA, QB = "/d/q", "/d/q/a", "/d/q/b"


def queue(**files: bytes) -> tuple[Disk, CrashFilesystem]:
    """A disk with a durable directory inside the other one."""
    disk, filesystem = new_disk(**files)
    filesystem.make_directory(Q)
    return disk, filesystem


def possible_names(disk: Disk) -> list[list[str]]:
    return sorted(sorted(path for path in state if path != "/d/q/") for state in states_after_power_loss(disk))


def test_a_link_may_be_lost_until_its_own_directory_is_synced() -> None:
    """A sync of the directory of the original name does not help."""
    disk, filesystem = queue(a=b"1")
    filesystem.link(A, QA)
    assert possible_names(disk) == [[A], [A, QA]]
    filesystem.sync_directory("/d")
    filesystem.sync_data(filesystem.open_existing(A, allow_links=True))
    assert possible_names(disk) == [[A], [A, QA]]
    filesystem.sync_directory(Q)
    assert possible_names(disk) == [[A, QA]]
    assert Disk(disk.files, disk.links).files == disk.files


def test_an_unsynced_link_and_its_original_name_survive_independently() -> None:
    """One, both or none of the names survive, with the same contents."""
    disk, filesystem = queue()
    filesystem.write(filesystem.create(A), b"1")
    filesystem.link(A, QA)
    assert possible_names(disk).count([]) == 1
    assert {tuple(sorted(state.items())) for state in states_after_power_loss(disk) if len(state) == 3} == {
        ((A, data), ("/d/q/", b""), (QA, data)) for data in (b"", b"1", b"\0")
    }
    assert DurabilityModel(disk.trace).admits({A: b"1", "/d/q/": b"", QA: b"1"})
    assert not DurabilityModel(disk.trace).admits({A: b"1", "/d/q/": b"", QA: b""})


def test_an_unlink_removes_only_one_name() -> None:
    """The unlinks are independent, and the file is removed with its last name."""
    disk, filesystem = queue(a=b"1")
    filesystem.link(A, QA)
    filesystem.sync_directory(Q)
    filesystem.unlink(A)
    assert possible_names(disk) == [[A, QA], [QA]]
    filesystem.unlink(QA)
    assert possible_names(disk) == [[], [A], [A, QA], [QA]]
    filesystem.sync_directory("/d")
    assert possible_names(disk) == [[], [QA]]


def test_a_file_is_lost_if_its_name_is_removed_before_its_link_is_synced() -> None:
    """The fan-out must not do this."""
    disk, filesystem = queue(a=b"1")
    filesystem.link(A, QA)
    filesystem.unlink(A)
    filesystem.sync_directory("/d")
    assert possible_names(disk) == [[], [QA]]


def test_a_rename_changes_only_one_name() -> None:
    """The other links keep their names."""
    disk, filesystem = queue(a=b"1")
    filesystem.link(A, QA)
    filesystem.rename(QA, QB)
    assert possible_names(disk) == [[A], [A, QA], [A, QB]]
    filesystem.sync_directory(Q)
    assert possible_names(disk) == [[A, QB]]


def test_a_rename_between_two_names_of_one_file_does_nothing() -> None:
    """Both names stay, as rename(2) says."""
    disk, filesystem = new_disk(a=b"1")
    filesystem.link(A, B)
    filesystem.sync_directory("/d")
    filesystem.rename(A, B)
    assert states_after_power_loss(disk) == [{A: b"1", B: b"1"}]


def test_an_unsynced_directory_is_lost_with_its_contents() -> None:
    """Even if they were synced. A process that is killed in `make_directory` leaves such a directory."""
    disk, filesystem = new_disk(a=b"1")
    filesystem.make_directory(Q)
    assert disk.trace[-2:] == [Op("make_directory", Q, disk.numbers[Q]), Op("sync_directory", "/d")]
    disk.trace.pop()
    filesystem.link(A, QA)
    filesystem.sync_directory(Q)
    assert states_after_power_loss(disk) == [{A: b"1"}, {A: b"1", "/d/q/": b"", QA: b"1"}]
    filesystem.make_directory(Q)
    assert states_after_power_loss(disk) == [{A: b"1", "/d/q/": b"", QA: b"1"}]


def test_a_renamed_directory_keeps_its_contents() -> None:
    """It has one of the names, never both or none, and so have files that are created in it later."""
    disk, filesystem = queue()
    filesystem.create(QA)
    filesystem.sync_directory(Q)
    filesystem.rename(Q, "/d/r")
    filesystem.create("/d/r/b")
    assert sorted(map(sorted, states_after_power_loss(disk))) == [
        ["/d/q/", QA],
        ["/d/q/", QA, QB],
        ["/d/r/", "/d/r/a"],
        ["/d/r/", "/d/r/a", "/d/r/b"],
    ]
    filesystem.sync_directory("/d/r")
    assert sorted(map(sorted, states_after_power_loss(disk))) == [["/d/q/", QA, QB], ["/d/r/", "/d/r/a", "/d/r/b"]]
    assert filesystem.subdirectories("/d") == ["r"]
    assert (filesystem.inspect_directory(Q), [name for name, _ in filesystem.list_files("/d/r")]) == (None, ["a", "b"])


def test_a_removed_directory_may_reappear_with_its_contents() -> None:
    """Or it is removed although the removal of its files was not durable."""
    disk, filesystem = queue()
    filesystem.create(QA)
    filesystem.sync_directory(Q)
    filesystem.unlink(QA)
    filesystem.remove_directory(Q)
    assert sorted(map(sorted, states_after_power_loss(disk))) == [[], ["/d/q/"], ["/d/q/", QA]]
    filesystem.sync_directory("/d")
    assert states_after_power_loss(disk) == [{}]


def test_a_lock_belongs_to_the_file_not_to_the_name() -> None:
    """Several shared locks may be held, and prevent an exclusive one."""
    disk, first = queue(a=b"")
    second = CrashFilesystem(disk)
    first.link(A, QA)
    fd, linked_fd = first.open_existing(A, allow_links=True), second.open_existing(QA, allow_links=True)
    assert first.lock_shared(fd)
    assert second.lock_shared(linked_fd)
    assert not first.lock(fd)  # and it loses its shared lock, as flock(2) says
    assert second.lock(linked_fd)
    assert not first.lock_shared(fd)
    second.kill()
    assert first.lock_shared(fd)
    assert (first.is_file_at(fd, A), first.is_file_at(fd, QA)) == (True, True)
    first.unlink(A)
    assert (first.is_file_at(fd, A), first.has_name(fd)) == (False, True)


def test_a_file_with_several_names_is_opened_only_with_allow_links() -> None:
    """As on the real file system: somebody else may have created the other name."""
    _disk, filesystem = queue(a=b"")
    filesystem.link(A, QA)
    for verb in (filesystem.open_existing, filesystem.open_lock_file, filesystem.open_append):
        with pytest.raises(FileUnusableError):
            verb(A)
    assert filesystem.open_existing(QA, allow_links=True)


def test_directory_operations_raise_the_errors_of_the_kernel() -> None:
    """For existing, missing and non-empty targets."""
    _disk, filesystem = queue(a=b"")
    for verb in (lambda: filesystem.link(A, A), lambda: filesystem.link(A, Q), lambda: filesystem.create(Q)):
        with pytest.raises(FileExistsError):
            verb()
    for source, target in ((B, QA), (A, "/d/r/a")):
        with pytest.raises(FileNotFoundError):
            filesystem.link(source, target)
    for operation in (filesystem.remove_directory, filesystem.subdirectories):
        with pytest.raises(FileNotFoundError):
            operation("/d/r")
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


def test_impossible_states_are_not_admitted() -> None:
    """Unknown names, unknown bytes, or a missing synced byte."""
    disk, filesystem = new_disk(a=b"1")
    fd = filesystem.open_lock_file(A)
    filesystem.write(fd, b"23")
    model = DurabilityModel(disk.trace)
    for data in (b"1", b"12", b"1\0\0", b"1\0", b"123"):
        assert model.admits({A: data})
    for state in ({}, {A: b""}, {A: b"13"}, {A: b"1234"}, {A: b"\0"}, {A: b"1", B: b""}, {A: b"x23"}):
        assert not model.admits(state)


def test_ignored_files_do_not_affect_the_model() -> None:
    """For example lock files."""
    disk, filesystem = new_disk()
    filesystem.write(filesystem.open_lock_file(B), b"beat")
    filesystem.sync_data(create_durable(disk, filesystem))
    model = DurabilityModel(disk.trace, ignoring={"b"})
    assert list(model.states()) == [{A: b""}]
    assert model.admits({A: b"", B: b"anything"})


def test_a_killed_process_loses_only_its_descriptors_and_locks() -> None:
    """Its later calls have no effect."""
    disk, killed = new_disk()
    other = CrashFilesystem(disk)
    fd = killed.create(A)
    assert killed.lock(fd)
    killed.write(fd, b"1")
    other_fd = other.open_existing(A)
    assert not other.lock(other_fd)
    killed.kill()
    assert other.lock(other_fd)
    with pytest.raises(Killed):
        killed.write(fd, b"2")
    with pytest.raises(Killed):
        killed.close(fd)
    assert disk.files == DurabilityModel(disk.trace).complete_state() == {A: b"1"}


def test_locks_belong_to_open_file_descriptions() -> None:
    """Like those of `flock`: a renamed file stays locked, and a second descriptor does not hold the lock."""
    _disk, filesystem = new_disk(a=b"")
    locked_fd, other_fd = filesystem.open_existing(A), filesystem.open_existing(A)
    assert filesystem.lock(locked_fd)
    assert filesystem.lock(locked_fd)
    assert not filesystem.lock(other_fd)
    filesystem.rename(A, B)
    assert not filesystem.lock(filesystem.open_existing(B))
    assert (filesystem.is_file_at(locked_fd, A), filesystem.is_file_at(locked_fd, B), filesystem.has_name(locked_fd)) == (
        False,
        True,
        True,
    )
    filesystem.unlink(B)
    assert not filesystem.has_name(locked_fd)
    filesystem.close(locked_fd)
    assert filesystem.lock(other_fd)


def test_wrong_use_of_a_descriptor_raises() -> None:
    """The kernel would return an error that the code could mistake for one of the disk."""
    _disk, filesystem = new_disk(a=b"")
    fd = filesystem.open_existing(A)
    with pytest.raises(MisuseError):
        filesystem.write(fd, b"1")
    filesystem.close(fd)
    with pytest.raises(MisuseError):
        filesystem.close(fd)


def test_missing_and_existing_files_raise_the_errors_of_the_kernel() -> None:
    """For every operation on files and directories."""
    _disk, filesystem = new_disk(a=b"")
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
