"""Damaged bytes -> the events that can be had from them, and how sure that is. Pure."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple
from zlib import crc32

from pillarbox.admin.mend import InvalidReplayError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.admin.mend import ReplayValidator

_HEAD: Final = re.compile(rb'\s*\{\s*"event"\s*:\s*')
_CRC: Final = re.compile(rb'\s*,\s*"crc"\s*:\s*"([0-9a-f]{0,8})')
_RECORD_START: Final = b'{"event":'
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_STARTS_MAX: Final = 100  # places in one piece at which a record is looked for; a line that ran into another has two
_scan = json.JSONDecoder().raw_decode


class SalvagedEvent(NamedTuple):
    """An event that was in damaged bytes."""

    payload: bytes
    verified: bool  # its checksum fits
    how: str


class SalvageResult(NamedTuple):
    """What a span holds: events, and for each piece of it that holds none, why."""

    events: list[SalvagedEvent]
    problems: list[str]


def salvage(data: bytes, validator: ReplayValidator) -> SalvageResult:
    """Look for events in a damaged span, which NUL bytes may have torn into pieces."""
    events: list[SalvagedEvent] = []
    problems: list[str] = []
    for piece in data.split(b"\0"):
        if piece and not piece.isspace():
            found, problem = _salvage_piece(piece.removeprefix(_BYTE_ORDER_MARK), validator)
            events += found
            if not found:
                problems.append(problem)
    if not events and not problems:
        problems.append("is nothing but NUL bytes" if b"\0" in data else "is empty")
    return SalvageResult(events, problems)


def _salvage_piece(piece: bytes, validator: ReplayValidator) -> tuple[list[SalvagedEvent], str]:
    """The events in bytes that were one line, or why there is none."""
    events: list[SalvagedEvent] = []
    problem = ""
    done = 0  # bytes of the piece that are in an event already
    for start in islice(_candidate_offsets(piece), _STARTS_MAX):
        if start < done:
            continue
        try:
            found, length = _event_at_start(piece[start:], validator)
            # In the middle, only a checksum tells a record from what an event or its remains may hold.
            if start and not found.verified:
                continue
            validator.validate(found.payload)
        except InvalidReplayError as unfit:
            problem = problem or str(unfit)
            continue
        events.append(found)
        done = start + length
    return events, problem


def _candidate_offsets(piece: bytes) -> Iterator[int]:
    yield 0
    start = piece.find(_RECORD_START, 1)
    while start > 0:
        yield start
        start = piece.find(_RECORD_START, start + 1)


def _event_at_start(piece: bytes, validator: ReplayValidator) -> tuple[SalvagedEvent, int]:
    """The event that a piece begins with, and how many bytes that is; raises `InvalidReplayError`."""
    head = _HEAD.match(piece)
    if head is None:
        return _bare_event(piece, validator)
    payload = _json_object(piece[head.end() :])
    end = head.end() + len(payload)
    crc = _CRC.match(piece, end)
    digits, right = (crc[1] if crc else b"").decode(), f"{crc32(payload):08x}"
    if digits == right:
        return SalvagedEvent(payload, verified=True, how="whole, its checksum fits"), end
    cut = crc is None or piece[crc.end() : crc.end() + 1] in (b"", b"\n", b"{")
    if not (right.startswith(digits) and cut):
        how = "its checksum does not fit: what the event says may be wrong"
    elif digits:
        how = f"its checksum is cut off; the {len(digits)} digits that are left fit"
    else:
        how = "it has no checksum"
    return SalvagedEvent(payload, verified=False, how=how), end


def _bare_event(piece: bytes, validator: ReplayValidator) -> tuple[SalvagedEvent, int]:
    """An event that stands by itself, or in an envelope of another shape."""
    value = _json_object(piece.lstrip())
    inner = validator.parse_fields(value).get("event")
    if inner is not None:
        return SalvagedEvent(
            bytes(inner), verified=False, how="in an envelope of another shape, which no checksum covers"
        ), len(value)
    return SalvagedEvent(value, verified=False, how="an event by itself, which no checksum covers"), len(value)


def _json_object(data: bytes) -> bytes:
    """The JSON object that some bytes begin with; raises `InvalidReplayError`."""
    text = data.decode("utf-8", "surrogateescape")  # what comes after it may be anything
    if not text.startswith("{"):
        raise InvalidReplayError("is no JSON object")
    try:
        _, end = _scan(text)
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")
        raise InvalidReplayError(
            f"is no whole JSON: {problem[0].lower()}{problem[1:]} at character {error.pos} of the event"
        ) from None
    except (ValueError, RecursionError):
        raise InvalidReplayError("is no JSON that can be read") from None
    return text[:end].encode("utf-8", "surrogateescape")
