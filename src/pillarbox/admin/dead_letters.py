"""Dead letters: a file of them -> its records, and what many of them have in common."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.delivery.settlement import DeadLetter
from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pillarbox.admin.filters import RecordFilter
    from pillarbox.store.directory import Directory

# In a reason: quoted text, ids, and numbers that are no part of a name. What is between ` are types and members.
_VALUES: Final = re.compile(
    r"""(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
    r"""|(?P<id>\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b)"""
    r"""|(?P<number>(?<![\w`$])[-+]?\d[\d.,_]*(?:e[-+]?\d+)?\b)"""
)

_decode_letter = msgspec.json.Decoder(DeadLetter).decode


class FileProblem(msgspec.Struct, frozen=True):
    """What could not be read or done, and was left as it is; `line` counts from 1."""

    file: str
    problem: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}{'' if self.line is None else f', line {self.line}'}: {self.problem}"


class DeadLetterRecord(NamedTuple):
    """A dead letter, and where it is kept."""

    batch: str
    line: int  # of the file, from 0
    letter: DeadLetter
    event_id: str | None  # None where the event has none that is text or a number
    event_key: str | None

    @property
    def name(self) -> str:
        """What tells this record from all others, also once some of them are gone: `<batch>#<index>`."""
        return f"{self.batch}#{self.letter.index}"


class DeadLetterFile(NamedTuple):
    """What a file of dead letters holds."""

    batch: str
    lines: list[bytes]  # all of them, each with its line feed
    records: list[DeadLetterRecord]
    problems: list[FileProblem]

    def without_lines(self, removed: set[int]) -> bytes:
        """The file's content when the lines in `removed` are taken out; what is no dead letter stays as it is."""
        return b"".join(line for number, line in enumerate(self.lines) if number not in removed)


def partial_decoder(event_type: type[msgspec.Struct], fields: Sequence[str]) -> Callable[[bytes], Any]:
    """An event's JSON -> an object with these fields, whatever their types; None for those that it does not have."""
    names = {field.name: field.encode_name for field in msgspec.structs.fields(event_type)}
    members = [(field, Any, msgspec.field(default=None, name=names.get(field, field))) for field in fields]
    return msgspec.json.Decoder(msgspec.defstruct("_Some", members)).decode


class IdentityDecoder:
    """What of an event every table shows: its id, and its key where the type has one."""

    def __init__(self, event_type: type[msgspec.Struct]) -> None:
        names = {field.name: field.encode_name for field in msgspec.structs.fields(event_type)}
        self.id_field = names.get("event_id", "event_id")
        self._decode = partial_decoder(event_type, ("event_id", "event_key"))

    def decode(self, payload: bytes) -> tuple[str | None, str | None]:
        """(id, key) of an event's JSON; None for what it does not have as text or a whole number."""
        try:
            found = self._decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None, None
        return scalar_text(found.event_id), scalar_text(found.event_key)


def scalar_text(value: object) -> str | None:
    """A member as a line shows it: text, or a whole number; None for all else."""
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def parse(batch: str, data: bytes, identity_decoder: IdentityDecoder) -> DeadLetterFile:
    """A file's bytes -> its dead letters; lines that are none are named."""
    parts = data.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
    records: list[DeadLetterRecord] = []
    problems: list[FileProblem] = []
    for number, line in enumerate(lines):
        if line.isspace():
            continue
        try:
            line.decode()  # msgspec does not look into the strings of a raw value
            letter = _decode_letter(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            problems.append(FileProblem(layout.dead_name(batch), f"is no dead letter ({error}); left as it is", number + 1))
            continue
        records.append(DeadLetterRecord(batch, number, letter, *identity_decoder.decode(bytes(letter.event))))
    return DeadLetterFile(batch, lines, records, problems)


def try_read_file(directory: Directory, name: str) -> bytes | FileProblem | None:
    """A kept file's bytes; None where it has gone meanwhile."""
    try:
        fd = directory.open_existing(name)
    except FileNotFoundError:
        return None
    except FileUnusableError as error:
        return FileProblem(name, error.problem)
    except OSError as error:
        return FileProblem(name, f"cannot be read: {error.strerror}")
    try:
        return directory.filesystem.read_all(fd)
    except OSError as error:
        return FileProblem(name, f"cannot be read: {error.strerror}")
    finally:
        directory.filesystem.close(fd)


class BatchListing(NamedTuple):
    """The batches of which something is kept, in order of age, and those that the deliverer is not done with."""

    batches: list[str]
    pending: frozenset[str]


def list_batches(directory: Directory, kind: Kind, record_filter: RecordFilter) -> BatchListing:
    """List once: a sealed file that is there all the while is in the listing, so none of the `pending` is missed."""
    prefix, suffix = ("dead-", layout.SUFFIX) if kind is Kind.DEAD else ("corrupt-", ".spans.json")
    suffixes = (suffix, layout.SUFFIX)
    batches: set[str] = set()
    sealed: set[str] = set()
    for name, _ in directory.filesystem.list_files(directory.path):
        found = layout.kind_of(name)
        if found is Kind.SEALED:
            sealed.add(layout.batch_id(name))
        elif found is kind or (kind is Kind.CORRUPT and found is Kind.RANGES):
            batch = name.removeprefix(prefix)
            for ending in suffixes:
                batch = batch.removesuffix(ending)
            if record_filter.matches_batch(batch):
                batches.add(batch)
    return BatchListing(sorted(batches), frozenset(batches & sealed))


def read_files(directory: Directory, batches: Iterable[str], identity_decoder: IdentityDecoder) -> Iterator[DeadLetterFile]:
    """The files of dead letters of these batches, one in memory at a time; one that cannot be read holds a trouble only."""
    for batch in batches:
        data = try_read_file(directory, layout.dead_name(batch))
        if isinstance(data, FileProblem):
            yield DeadLetterFile(batch, [], [], [data])
        elif data is not None:
            yield parse(batch, data, identity_decoder)


def mask_values(reason: str) -> str:
    """A reason without the values in it: `occurred_at: 17 is too small` and the same with 18 are one kind of trouble."""

    def kind(match: re.Match[str]) -> str:
        return {"quoted": '"..."', "id": "...", "number": "N"}[match.lastgroup or "id"]

    return _VALUES.sub(kind, reason)


class DeadLetterGroup(msgspec.Struct, frozen=True):
    """Dead letters that have everything in common but their values; times in microseconds since 1970."""

    code: str
    reason: str  # without the values in it
    sink: str
    event_key: str | None
    queue: str  # whose queue they are in, where there are several sinks
    count: int
    first_at_micros: int
    last_at_micros: int


class DeadLetterGrouper:
    """Adds up record by record; keeps one entry a group."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str, str | None, str], tuple[int, int, int]] = {}

    def add(self, record: DeadLetterRecord, queue: str = "") -> None:
        """Count one more."""
        letter = record.letter
        key = (letter.code, mask_values(letter.reason), letter.sink, record.event_key, queue)
        count, first, last = self._counts.get(key, (0, letter.first_at_micros, letter.last_at_micros))
        self._counts[key] = (count + 1, min(first, letter.first_at_micros), max(last, letter.last_at_micros))

    def largest_first(self) -> list[DeadLetterGroup]:
        """The largest first."""
        found = [DeadLetterGroup(*key, *numbers) for key, numbers in self._counts.items()]
        return sorted(found, key=lambda group: (-group.count, -group.last_at_micros, group.code, group.reason))
