"""File names and the states that they stand for. Pure. A file's name is its whole state, and only this module parses names."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

from pillarbox.store.dirscan import NamePattern

SUFFIX: Final = ".ndjson"
COMPRESSED_SUFFIX: Final = f"{SUFFIX}.zst"  # of batch files, waiting or retained, that were compressed
LEGACY_ACTIVE: Final = "active.ndjson"
DELIVER_LOCK: Final = "deliver.lock"
EVICT_LOCK: Final = "evict.lock"
SEAL_REQUEST: Final = "seal.request"
LEDGER: Final = "ledger.ndjson"
LEDGER_LOCK: Final = "ledger.lock"
ADMIN_LOCK: Final = "mend.lock"  # of commands that change dead letters, quarantine or retained batches
# Created when a directory is opened: on a full volume they could not be created any more.
CONTROL_FILES: Final = (DELIVER_LOCK, EVICT_LOCK, LEDGER_LOCK, LEDGER, ADMIN_LOCK, SEAL_REQUEST)
_MICROS_DIGITS: Final = 16  # microseconds since 1970: enough until the year 2286
_DELIVERED: Final = "delivered-"
_QUEUE: Final = "sink-"
_ADDING: Final = ".adding"
_REMOVING: Final = ".removing"
_SINK = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
MICROS_MAX: Final = 10**_MICROS_DIGITS - 1
_SEALED_AT = re.compile(rf"(?:sealed|delivered-\d{{{_MICROS_DIGITS}}})-(\d{{{_MICROS_DIGITS}}})-", re.ASCII)
_DELIVERED_AT = re.compile(rf"{_DELIVERED}(?:(\d{{{_MICROS_DIGITS}}})-)?")


class Kind(Enum):
    """What a file in the directory is."""

    ACTIVE = "active"  # a segment: appended to by one writer, which holds its lock
    LEGACY_ACTIVE = "legacy_active"  # a segment of an older version, which took no lock
    SEALED = "sealed"  # a batch file: complete, immutable, waiting
    CORRUPT = "corrupt"  # quarantined bytes
    DELIVERED = "delivered"  # a delivered batch file that is retained for a while
    RANGES = "spans"  # where the quarantined byte ranges were, and what is wrong with them
    DEAD = "dead"  # dead letters
    TEMPORARY = "aside"  # being written; worthless once its writer is dead
    OTHER = "other"  # a file that is not ours


# The first match counts: a temporary name begins like the final one.
_KINDS: Final[tuple[tuple[str, str, Kind], ...]] = (
    ("active", ".aside", Kind.TEMPORARY),
    ("sealed-", ".aside", Kind.TEMPORARY),
    ("corrupt-", ".aside", Kind.TEMPORARY),
    ("dead-", ".aside", Kind.TEMPORARY),
    ("delivered-", ".aside", Kind.TEMPORARY),
    (LEDGER, ".aside", Kind.TEMPORARY),
    ("active-", SUFFIX, Kind.ACTIVE),
    ("sealed-", SUFFIX, Kind.SEALED),
    ("sealed-", COMPRESSED_SUFFIX, Kind.SEALED),
    ("delivered-", SUFFIX, Kind.DELIVERED),
    ("delivered-", COMPRESSED_SUFFIX, Kind.DELIVERED),
    ("corrupt-", SUFFIX, Kind.CORRUPT),
    ("corrupt-", ".spans.json", Kind.RANGES),
    ("dead-", SUFFIX, Kind.DEAD),
)
# The same as patterns, and the kind that each of them stands for.
PATTERNS: Final = (NamePattern(LEGACY_ACTIVE, None), *(NamePattern(begin, end) for begin, end, _ in _KINDS))
KINDS: Final = (Kind.LEGACY_ACTIVE, *(kind for _, _, kind in _KINDS))
COMPRESSED_PATTERNS: Final = (NamePattern("sealed-", COMPRESSED_SUFFIX),)


def patterns_of(*kinds: Kind) -> tuple[NamePattern, ...]:
    """The patterns that stand for these kinds."""
    return tuple(pattern for pattern, kind in zip(PATTERNS, KINDS, strict=True) if kind in kinds)


SEALED_PATTERNS: Final = patterns_of(Kind.SEALED)


def kind_of(name: str) -> Kind:
    """The kind of file that `name` stands for, by prefix and suffix only."""
    if name == LEGACY_ACTIVE:
        return Kind.LEGACY_ACTIVE
    for prefix, suffix, kind in _KINDS:
        if name.startswith(prefix) and name.endswith(suffix):
            return kind
    return Kind.OTHER


def active_name(writer: str, number: int) -> str:
    """The name of a segment. A writer fills its segments in the order of their numbers, and uses a name once."""
    return f"active-{writer}-{number}{SUFFIX}"


def active_sort_key(name: str) -> tuple[str, int]:
    """A key that sorts the segments of each writer in the order in which it filled them."""
    writer, _, number = name.removesuffix(SUFFIX).rpartition("-")
    return (writer, int(number)) if number.isdecimal() else (name, 0)


def writer_of(name: str) -> str:
    """The writer of a segment; empty for a segment of an older version, which had no writer ids."""
    return escaped(active_sort_key(name)[0].removeprefix("active-")) if kind_of(name) is Kind.ACTIVE else ""


def sealed_name(micros: int, unique: str, like: str = "") -> str:
    """The name of a batch file that was sealed at `micros` microseconds since 1970, with the suffix of the name `like`."""
    return f"sealed-{micros:0{_MICROS_DIGITS}d}-{unique}{COMPRESSED_SUFFIX if like.endswith(COMPRESSED_SUFFIX) else SUFFIX}"


def sealed_at(name: str) -> int | None:
    """The seal time in the name of a batch file, in microseconds since 1970; None if the name has none."""
    match = _SEALED_AT.match(name)
    return int(match[1]) if match else None


def batch_id(name: str) -> str:
    """The batch id of a batch file: its name when it was sealed, without the suffix."""
    batch = escaped(name.removesuffix(COMPRESSED_SUFFIX).removesuffix(SUFFIX))
    return _DELIVERED_AT.sub("sealed-", batch, count=1) if batch.startswith(_DELIVERED) else batch


def escaped(name: str) -> str:
    r"""A file name as text for JSON, ledgers and destinations: bytes that are not UTF-8 become `\xNN`."""
    return name if name.isascii() else name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def delivered_name(name: str, micros: int) -> str:
    """The name of a batch file that was delivered at `micros` microseconds since 1970. Sorts by that time."""
    return f"{_DELIVERED}{micros:0{_MICROS_DIGITS}d}-{name.removeprefix('sealed-')}"


def delivered_at(name: str) -> int | None:
    """The delivery time in the name of a retained file, in microseconds since 1970; None if the name has none."""
    match = _DELIVERED_AT.match(name)
    return int(match[1]) if match and match[1] else None


def compressed_name(name: str) -> str:
    """The name of a batch file once it is compressed."""
    return name.removesuffix(COMPRESSED_SUFFIX).removesuffix(SUFFIX) + COMPRESSED_SUFFIX


def plain_name(name: str) -> str:
    """The name that a compressed file had before; empty for a plain file."""
    return name.removesuffix(COMPRESSED_SUFFIX) + SUFFIX if name.endswith(COMPRESSED_SUFFIX) else ""


def corrupt_name(batch: str) -> str:
    """The name of the file with the damaged bytes of a batch."""
    return f"corrupt-{batch}{SUFFIX}"


def ranges_name(batch: str) -> str:
    """The name of the file that describes these byte ranges."""
    return f"corrupt-{batch}.spans.json"


def dead_name(batch: str) -> str:
    """The name of the file with the dead letters of a batch."""
    return f"dead-{batch}{SUFFIX}"


def temporary_name(name: str, unique: str) -> str:
    """The name under which a file is written before it gets its own; a different one for each attempt."""
    return f"{name}.{unique}.aside"


def is_sink_name(name: str) -> bool:
    """Whether a sink may have this name, which becomes part of the name of a directory."""
    return _SINK.fullmatch(name) is not None


def queue_name(sink: str) -> str:
    """The name of the directory that is the queue of a sink."""
    return _QUEUE + sink


def sink_of_queue(name: str) -> str | None:
    """The sink whose queue a directory is, by the directory's name; None if it is not a queue."""
    sink = name.removeprefix(_QUEUE)
    return sink if name.startswith(_QUEUE) and is_sink_name(sink) else None


def adding_name(sink: str) -> str:
    """The name of a requested queue, until it holds all batches that it starts with."""
    return queue_name(sink) + _ADDING


def sink_of_adding(name: str) -> str | None:
    """The sink of a requested queue, by the directory's name; None if it is not such a queue."""
    return sink_of_queue(name.removesuffix(_ADDING)) if name.endswith(_ADDING) else None


def removing_name(sink: str) -> str:
    """The name of a queue that is being removed."""
    return queue_name(sink) + _REMOVING


def is_removing_name(name: str) -> bool:
    """Whether a directory is a queue that is being removed."""
    return name.endswith(_REMOVING) and sink_of_queue(name.removesuffix(_REMOVING)) is not None
