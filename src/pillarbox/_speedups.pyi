from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

from pillarbox._native import PyCommitFuture as CommitFuture
from pillarbox._native import PySegmentCounters as SegmentCounters
from pillarbox._native import PyWriterState as WriterState
from pillarbox._native import py_decode_record as decode_record
from pillarbox._native import py_decode_records as decode_records
from pillarbox._native import py_encode_record as encode_record
from pillarbox._native import py_encode_records as encode_records
from pillarbox._native import py_gather_group as gather_group
from pillarbox._native import py_resolve_futures as resolve_futures
from pillarbox.outcome import Durability, Outcome
from pillarbox.store.dirscan import NamePatterns

__all__ = [
    "CommitFuture",
    "DirectoryChunks",
    "Enqueue",
    "EventCheck",
    "SegmentCounters",
    "WriterState",
    "append_locked",
    "check_fork",
    "close_each",
    "create_each",
    "decode_record",
    "decode_records",
    "encode_record",
    "encode_records",
    "gather_group",
    "mark_fork_handled",
    "new_event_id",
    "note_closed",
    "note_open",
    "now_micros",
    "open_existing",
    "open_locked",
    "rename_each",
    "reseed",
    "reset_interpreter",
    "resolve_futures",
    "scan_first",
    "scan_sums",
    "set_fork_handler",
    "sync_directory",
    "sync_each",
]

# append.c

class Enqueue:
    def __init__(
        self,
        writer: WriterState,
        plain: Callable[..., Outcome],
        encode: Callable[[Any], bytes],
        event_type: type,
        bytes_max: int,
        append_unstarted: Callable[[bytes, int], Outcome],
        write: Callable[[int, bytes], int],
        enqueued: Outcome,
        power: bool,
    ) -> None: ...
    def __call__(self, event: Any, *, durability: Durability | None = None) -> Outcome: ...

# dirscan.c

class DirectoryChunks:
    def __init__(self, path: str, patterns: NamePatterns, sizes: bool, counted: bool = False) -> None: ...
    def __iter__(self) -> Iterator[list[Any]]: ...
    def __next__(self) -> list[Any]: ...

def scan_sums(path: str, patterns: NamePatterns) -> list[tuple[int, int, int, int | None, int | None]]: ...
def scan_first(path: str, patterns: NamePatterns, after: str, until: str, most: int) -> tuple[list[str], str, int]: ...

# batch_io.c

def sync_each(descriptors: Iterable[int], /) -> list[int]: ...
def rename_each(sources: Iterable[str], targets: Iterable[str], /) -> tuple[int, int]: ...
def create_each(paths: Iterable[str], flags: int, mode: int, uid: int, gid: int, /) -> tuple[list[int], int]: ...
def open_existing(path: str, flags: int, linked: bool, owner: int, /) -> int: ...
def open_locked(path: str, flags: int, linked: bool, shared: bool, owner: int, /) -> int: ...
def append_locked(lock: str, path: str, lines: bytes, flags: int, below: int, owner: int, /) -> int: ...
def close_each(descriptors: Iterable[int], /) -> None: ...
def sync_directory(path: str, /) -> int: ...

# event.c

def new_event_id() -> str: ...
def now_micros() -> int: ...
def reseed(middle: str, first: int, /) -> None: ...

@final
class EventCheck:
    @property
    def __wrapped__(self) -> Callable[[Any], None]: ...
    def __init__(self, plain: Callable[[Any], None], is_json: Callable[[str], object], /) -> None: ...
    def __get__(self, event: object, event_type: type | None = None, /) -> Callable[..., None]: ...
    def __call__(self, event: Any, /) -> None: ...
    def bind(
        self, event_type: type, texts: tuple[str, ...], texts_or_none: tuple[str, ...], json: str, micros: str, /
    ) -> None: ...

def check_fork() -> None: ...
def set_fork_handler(handler: Callable[[], object], /) -> None: ...
def mark_fork_handled() -> None: ...
def reset_interpreter() -> None: ...
def note_open(fd: int, /) -> None: ...
def note_closed(fd: int, /) -> bool: ...
