"""The files of an outbox directory and of its sinks' queues, and their content, read without a lock."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout, reader
from pillarbox.store.layout import Kind
from pillarbox.store.reader import BAD_COMPRESSION
from pillarbox.store.windows import count_records, read_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Set as AbstractSet

    from pillarbox.store.directory import Directory
    from pillarbox.store.reader import DamagedRange

_RANGES_SUFFIX = ".spans.json"
_Content = TypeVar("_Content")


class FileProblem(msgspec.Struct, frozen=True):
    """Why a file, or one line of it, could not be read or changed. It was left unchanged."""

    file: str  # path relative to the outbox directory
    problem: str  # what is wrong
    line: int | None = None  # number of the line, from 1; None if the whole file is concerned

    def __str__(self) -> str:
        return f"{self.file}{'' if self.line is None else f', line {self.line}'}: {self.problem}"


class FileRef(NamedTuple):
    """A file of the store, as a directory listing showed it."""

    directory: Directory  # the outbox directory, or a sink's queue in it
    name: str
    kind: Kind
    size: int  # bytes

    @property
    def display_name(self) -> str:
        """The file's path, relative to the outbox directory."""
        return f"{layout.queue_name(self.sink)}/{self.name}" if self.sink else self.name

    @property
    def sink(self) -> str:
        """The sink whose queue holds the file; "" for the outbox directory itself."""
        return self.directory.sink

    @property
    def batch(self) -> str:
        """The id of the batch that the file is or came from; "" for an active segment."""
        name = self.name.removesuffix(_RANGES_SUFFIX)
        if self.kind is Kind.DEAD:
            name = name.removeprefix("dead-")
        elif self.kind in (Kind.CORRUPT, Kind.RANGES):
            name = name.removeprefix("corrupt-")
        return "" if self.kind in (Kind.ACTIVE, Kind.LEGACY_ACTIVE) else layout.batch_id(name)


def all_directories(directory: Directory) -> list[Directory]:
    """The outbox directory and the queues of its sinks."""
    return [directory, *directory.queues()]


def scan_files(directory: Directory) -> list[FileRef]:
    """List the files of the outbox directory, then those of its queues.

    In this order a batch that moves into a queue meanwhile is listed twice rather than not at all.
    """
    files: list[FileRef] = []
    for scanned in all_directories(directory):
        for name, size in scanned.filesystem.list_files(scanned.path):
            kind = layout.kind_of(name)
            if kind not in (Kind.TEMPORARY, Kind.OTHER):
                files.append(FileRef(scanned, name, kind, size))
    return files


def files_by_batch(files: list[FileRef], kinds: AbstractSet[Kind]) -> dict[str, list[FileRef]]:
    """Group the files of some kinds by batch id, the oldest batch first. The files of one batch have the same content."""
    by_batch: dict[str, list[FileRef]] = {}
    for file in sorted(files, key=lambda file: (file.batch, file.kind is not Kind.SEALED, file.directory.path)):
        if file.kind in kinds:
            by_batch.setdefault(file.batch, []).append(file)
    return by_batch


def find_batch_files(directory: Directory, batch: str, kinds: AbstractSet[Kind]) -> list[FileRef]:
    """The files of one batch, of some kinds, at this moment."""
    return [file for file in scan_files(directory) if file.batch == batch and file.kind in kinds]


class BatchListing(NamedTuple):
    """Batches that have dead letters or quarantined bytes, the oldest first, and those of them that are still pending."""

    batches: list[str]
    pending: frozenset[str]  # ids of those whose sealed file still exists


def list_batches(directory: Directory, kind: Kind, matches: Callable[[str], bool] = lambda _batch: True) -> BatchListing:
    """List the batches that have dead letters or quarantined bytes.

    One listing serves both fields of the result, so that no batch whose sealed file exists throughout looks delivered.

    Args:
        directory: The outbox directory, or a sink's queue.
        kind: `Kind.DEAD` or `Kind.CORRUPT`.
        matches: Which batch ids to list.
    """
    prefix, suffix = ("dead-", layout.SUFFIX) if kind is Kind.DEAD else ("corrupt-", _RANGES_SUFFIX)
    batches: set[str] = set()
    sealed: set[str] = set()
    for name, _ in directory.filesystem.list_files(directory.path):
        file_kind = layout.kind_of(name)
        if file_kind is Kind.SEALED:
            sealed.add(layout.batch_id(name))
        elif file_kind is kind or (kind is Kind.CORRUPT and file_kind is Kind.RANGES):
            batch = name.removeprefix(prefix).removesuffix(suffix).removesuffix(layout.SUFFIX)
            if matches(batch):
                batches.add(batch)
    return BatchListing(sorted(batches), frozenset(batches & sealed))


def try_read_file(directory: Directory, name: str) -> bytes | FileProblem | None:
    """A file's bytes, the problem that prevents reading them, or None if the file does not exist any more."""
    return _try_to_read(directory, name, directory.filesystem.read_all)


def try_count_records(directory: Directory, name: str) -> int | FileProblem | None:
    """The number of records in a batch file; otherwise as `try_read_file`."""
    return _try_to_read(directory, name, lambda fd: count_records(directory.filesystem, name, fd)[0])


def _try_to_read(directory: Directory, name: str, read: Callable[[int], _Content]) -> _Content | FileProblem | None:
    try:
        fd = directory.open_existing(name)
        try:
            return read(fd)
        finally:
            directory.filesystem.close(fd)
    except FileNotFoundError:
        return None
    except (OSError, FileUnusableError, MemoryError) as error:
        return _problem_of(name, error)


def _problem_of(name: str, error: OSError | FileUnusableError | MemoryError) -> FileProblem:
    if isinstance(error, FileUnusableError):
        return FileProblem(name, error.problem)
    return FileProblem(
        name, f"cannot be read: {error.strerror if isinstance(error, OSError) else 'there is not enough memory'}"
    )


class FilePart(NamedTuple):
    """A part of a decompressed file: whole lines, except at its end."""

    offset: int
    data: bytes


def read_first_available(files: list[FileRef], report_problem: Callable[[FileProblem], None]) -> Iterator[FilePart] | None:
    """Read the first readable file of several with the same content, decompressed, a part at a time.

    Returns:
        The parts; none if none of the files can be read, which is reported; None if none of them exists any more.
    """
    problems: list[FileProblem] = []
    for file in files:
        parts = _read_parts(file, report_problem)
        try:
            first = next(parts)
        except FileNotFoundError:
            continue
        except (OSError, FileUnusableError, MemoryError) as error:
            problems.append(_problem_of(file.display_name, error))
        else:
            return _report_errors(file, chain([first], parts), report_problem)
    for first_problem in problems[:1]:
        report_problem(first_problem)
    return iter(()) if problems else None


def _read_parts(file: FileRef, report_problem: Callable[[FileProblem], None]) -> Iterator[FilePart]:
    filesystem = file.directory.filesystem
    fd = file.directory.open_existing(file.name)
    try:
        for window in read_windows(filesystem, file.name, fd):
            data, damaged = window.data, window.contents.damaged
            if damaged and damaged[-1].reason.startswith(BAD_COMPRESSION):
                end, problem = damaged[-1].offset, damaged[-1].reason.removeprefix(BAD_COMPRESSION)
                report_problem(FileProblem(file.display_name, f"cannot be read after the first {end} bytes: {problem}"))
                data = data[: end - window.offset]
            yield FilePart(window.offset, data)
    finally:
        filesystem.close(fd)


def _report_errors(
    file: FileRef, parts: Iterator[FilePart], report_problem: Callable[[FileProblem], None]
) -> Iterator[FilePart]:
    try:
        yield from parts
    except (OSError, FileUnusableError, MemoryError) as error:
        report_problem(_problem_of(file.display_name, error))


class ScannedLine(NamedTuple):
    """A line of a file: a record, damaged bytes, or both, where a record follows NUL bytes."""

    offset: int  # offset of the line in the decompressed file
    payload: bytes | None  # the event's JSON
    damage: DamagedRange | None


def split_lines(data: bytes, offset: int = 0) -> Iterator[ScannedLine]:
    """The lines of a file, or of its part that begins at `offset`, without blank ones."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        contents = reader.read_lines(data[start:end], lambda: None)
        if contents.payloads or contents.damaged:
            payload = contents.payloads[0] if contents.payloads else None
            damaged = [msgspec.structs.replace(damage, offset=offset + start + damage.offset) for damage in contents.damaged]
            yield ScannedLine(offset + start, payload, damaged[0] if damaged else None)
        start = end
