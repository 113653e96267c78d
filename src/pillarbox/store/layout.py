"""File names <-> states. Pure: a name says everything about a file's state, and only this module knows how."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

from pillarbox.store.dirscan import NamePattern

SUFFIX: Final = ".ndjson"
COMPRESSED_SUFFIX: Final = f"{SUFFIX}.zst"  # of what waits or is kept, where that is wanted
LEGACY_ACTIVE: Final = "active.ndjson"
DELIVER_LOCK: Final = "deliver.lock"
EVICT_LOCK: Final = "evict.lock"
SEAL_REQUEST: Final = "seal.request"
LEDGER: Final = "ledger.ndjson"
LEDGER_LOCK: Final = "ledger.lock"
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

    ACTIVE = "active"  # appended to by one writer, which holds its lock
    LEGACY_ACTIVE = "legacy_active"  # left by the older, non-locking writer
    SEALED = "sealed"  # complete, immutable, waiting
    CORRUPT = "corrupt"  # quarantined bytes
    DELIVERED = "delivered"  # settled, and kept for a while
    RANGES = "spans"  # where the quarantined bytes stood and why they are there
    DEAD = "dead"  # dead letters
    TEMPORARY = "aside"  # being written aside; worthless once its writer is gone
    OTHER = "other"  # not ours


# First match wins: an `.aside` name begins like the name it will get.
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
# The same as patterns, and the kind for which each of them stands.
PATTERNS: Final = (NamePattern(LEGACY_ACTIVE, None), *(NamePattern(begin, end) for begin, end, _ in _KINDS))
KINDS: Final = (Kind.LEGACY_ACTIVE, *(kind for _, _, kind in _KINDS))
COMPRESSED_PATTERNS: Final = (NamePattern("sealed-", COMPRESSED_SUFFIX),)


def patterns_of(*kinds: Kind) -> tuple[NamePattern, ...]:
    """The patterns that stand for these kinds."""
    return tuple(pattern for pattern, kind in zip(PATTERNS, KINDS, strict=True) if kind in kinds)


SEALED_PATTERNS: Final = patterns_of(Kind.SEALED)


def kind_of(name: str) -> Kind:
    """The state that `name` stands for, by prefix and suffix only."""
    if name == LEGACY_ACTIVE:
        return Kind.LEGACY_ACTIVE
    for prefix, suffix, kind in _KINDS:
        if name.startswith(prefix) and name.endswith(suffix):
            return kind
    return Kind.OTHER


def active_name(writer: str, number: int) -> str:
    """The name of an active file of a writer, which fills them in the order of their numbers; used once."""
    return f"active-{writer}-{number}{SUFFIX}"


def active_sort_key(name: str) -> tuple[str, int]:
    """What to sort active files by, so that each writer's are in the order in which it filled them."""
    writer, _, number = name.removesuffix(SUFFIX).rpartition("-")
    return (writer, int(number)) if number.isdecimal() else (name, 0)


def writer_of(name: str) -> str:
    """The writer of an active file; empty for an older system's, which had none."""
    return active_sort_key(name)[0].removeprefix("active-") if kind_of(name) is Kind.ACTIVE else ""


def sealed_name(micros: int, unique: str, like: str = "") -> str:
    """The name of a file sealed at `micros` microseconds since 1970, with the same ending as another of its content."""
    return f"sealed-{micros:0{_MICROS_DIGITS}d}-{unique}{COMPRESSED_SUFFIX if like.endswith(COMPRESSED_SUFFIX) else SUFFIX}"


def sealed_at(name: str) -> int | None:
    """The seal time in the name of a sealed or delivered file, or None where somebody named it otherwise."""
    match = _SEALED_AT.match(name)
    return int(match[1]) if match else None


def batch_id(name: str) -> str:
    """The batch id of a sealed file: its name without the ending; of a delivered file, what it was when it was sealed."""
    batch = name.removesuffix(COMPRESSED_SUFFIX).removesuffix(SUFFIX)
    return _DELIVERED_AT.sub("sealed-", batch, count=1) if batch.startswith(_DELIVERED) else batch


def delivered_name(name: str, micros: int) -> str:
    """Where a sealed file is kept for a while that was delivered at `micros` since 1970; sorts by that time."""
    return f"{_DELIVERED}{micros:0{_MICROS_DIGITS}d}-{name.removeprefix('sealed-')}"


def delivered_at(name: str) -> int | None:
    """The time of delivery in the name of a delivered file, in microseconds since 1970; None where somebody named it."""
    match = _DELIVERED_AT.match(name)
    return int(match[1]) if match and match[1] else None


def compressed_name(name: str) -> str:
    """What a sealed file is called once it is compressed."""
    return name.removesuffix(COMPRESSED_SUFFIX).removesuffix(SUFFIX) + COMPRESSED_SUFFIX


def plain_name(name: str) -> str:
    """What a compressed file was called before; empty where the file is a plain one."""
    return name.removesuffix(COMPRESSED_SUFFIX) + SUFFIX if name.endswith(COMPRESSED_SUFFIX) else ""


def corrupt_name(batch: str) -> str:
    """Where the damaged bytes of a batch are kept."""
    return f"corrupt-{batch}{SUFFIX}"


def ranges_name(batch: str) -> str:
    """Where it is written which bytes those were, and why."""
    return f"corrupt-{batch}.spans.json"


def dead_name(batch: str) -> str:
    """Where the dead letters of a batch are kept."""
    return f"dead-{batch}{SUFFIX}"


def temporary_name(name: str, unique: str) -> str:
    """The name under which a file is written before it gets its own; another one for each attempt."""
    return f"{name}.{unique}.aside"


def is_sink_name(name: str) -> bool:
    """Whether one of several sinks may be called so: it becomes the name of a directory."""
    return _SINK.fullmatch(name) is not None


def queue_name(sink: str) -> str:
    """The directory in which the files wait that one of several sinks is to get."""
    return _QUEUE + sink


def sink_of_queue(name: str) -> str | None:
    """The sink that a directory is the queue of; None where it is none."""
    sink = name.removeprefix(_QUEUE)
    return sink if name.startswith(_QUEUE) and is_sink_name(sink) else None


def adding_name(sink: str) -> str:
    """What a queue is called that is to begin with what waits, until it holds all of that."""
    return queue_name(sink) + _ADDING


def sink_of_adding(name: str) -> str | None:
    """The sink whose queue a directory is to become; None where it is no such thing."""
    return sink_of_queue(name.removesuffix(_ADDING)) if name.endswith(_ADDING) else None


def removing_name(sink: str) -> str:
    """What a queue is called whose files are being removed."""
    return queue_name(sink) + _REMOVING


def is_removing_name(name: str) -> bool:
    """Whether a directory is a queue that is being removed."""
    return name.endswith(_REMOVING) and sink_of_queue(name.removesuffix(_REMOVING)) is not None
