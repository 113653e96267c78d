"""Which files there are at the moment, in the directory and in the queues of its sinks; and their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from pillarbox.admin.dead_letters import FileProblem
from pillarbox.errors import FileUnusableError
from pillarbox.store import compression, layout, reader
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Set as AbstractSet

    from pillarbox.store.directory import Directory
    from pillarbox.store.reader import DamagedRange


class FileRef(NamedTuple):
    """A file of ours that was seen."""

    directory: Directory  # the outbox directory, or a sink's queue in it
    name: str
    kind: Kind
    size: int  # bytes

    @property
    def display_name(self) -> str:
        """Its name as an operator finds it, from the outbox directory on."""
        return f"{layout.queue_name(self.sink)}/{self.name}" if self.sink else self.name

    @property
    def sink(self) -> str:
        """Whose queue it is in; "" for the outbox directory itself."""
        return self.directory.sink

    @property
    def batch(self) -> str:
        """The id of the batch that it is, or was taken from; empty for an active file, which is none yet."""
        name = self.name.removesuffix(".spans.json")
        if self.kind is Kind.DEAD:
            name = name.removeprefix("dead-")
        elif self.kind in (Kind.CORRUPT, Kind.RANGES):
            name = name.removeprefix("corrupt-")
        return "" if self.kind in (Kind.ACTIVE, Kind.LEGACY_ACTIVE) else layout.batch_id(name)


def all_directories(directory: Directory) -> list[Directory]:
    """The outbox directory, and the queues of its sinks."""
    return [directory, *directory.queues()]


def scan_files(directory: Directory) -> list[FileRef]:
    """The files in the directory, then those in its queues: what moves there meanwhile is seen twice rather than never."""
    files: list[FileRef] = []
    for found_in in all_directories(directory):
        for name, size in found_in.filesystem.list_files(found_in.path):
            kind = layout.kind_of(name)
            if kind not in (Kind.TEMPORARY, Kind.OTHER):
                files.append(FileRef(found_in, name, kind, size))
    return files


def files_by_batch(files: list[FileRef], kinds: AbstractSet[Kind]) -> dict[str, list[FileRef]]:
    """The sealed or delivered files by batch, the oldest batch first; several files of a batch have the same content."""
    by_batch: dict[str, list[FileRef]] = {}
    for sight in sorted(files, key=lambda one: (one.batch, one.kind is not Kind.SEALED, one.directory.path)):
        if sight.kind in kinds:
            by_batch.setdefault(sight.batch, []).append(sight)
    return by_batch


def find_batch_files(directory: Directory, batch: str, kinds: AbstractSet[Kind]) -> list[FileRef]:
    """Wherever a batch is now, in whatever state of these."""
    return [sight for sight in scan_files(directory) if sight.batch == batch and sight.kind in kinds]


def read_first_available(files: list[FileRef], report_problem: Callable[[FileProblem], None]) -> bytes | None:
    """The lines of the first of some files with the same content that is there; None where all have gone.

    What cannot be read is told, and has no lines.
    """
    problems: list[FileProblem] = []
    for sight in files:
        try:
            data, problem = compression.decompress(sight.name, _read_bytes(sight.directory, sight.name))
        except FileNotFoundError:
            continue
        except FileUnusableError as error:
            problems.append(FileProblem(sight.display_name, error.problem))
        except OSError as error:
            problems.append(FileProblem(sight.display_name, f"cannot be read: {error.strerror}"))
        else:
            if problem:
                report_problem(FileProblem(sight.display_name, f"cannot be read behind the first {len(data)} bytes: {problem}"))
            return data
    for trouble in problems[:1]:
        report_problem(trouble)
    return b"" if problems else None


def _read_bytes(directory: Directory, name: str) -> bytes:
    fd = directory.open_existing(name)
    try:
        return directory.filesystem.read_all(fd)
    finally:
        directory.filesystem.close(fd)


class ScannedLine(NamedTuple):
    """A line of a file: a record, or damaged bytes, or both, where a record stands behind NUL bytes."""

    offset: int  # of the line, in the file as it was written
    payload: bytes | None  # the event's JSON
    damage: DamagedRange | None


def split_lines(data: bytes, offset: int = 0) -> Iterator[ScannedLine]:
    """The lines of a file, or of a part of it that begins at `offset`; blank ones are left out."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        contents = reader.read_lines(data[start:end], lambda: None)
        if contents.payloads or contents.damaged:
            payload = contents.payloads[0] if contents.payloads else None
            spans = [replace(span, offset=offset + start + span.offset) for span in contents.damaged]
            yield ScannedLine(offset + start, payload, spans[0] if spans else None)
        start = end
