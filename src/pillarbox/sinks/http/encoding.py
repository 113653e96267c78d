"""Encodes a batch as a request body. The events' JSON is sent as it is stored; only CloudEvents need three of its fields."""

from __future__ import annotations

import gzip
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.sinks.base import YIELD_EVERY_RECORDS, Rejection

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pillarbox.sinks.base import Batch
    from pillarbox.sinks.http.url import HttpSettings

GZIP_LEVEL: Final = 1  # 500 events become ten times smaller in 0.2 ms; level 6 takes three times as long and saves 2 % more
ZSTD_LEVEL: Final = 1  # smaller than gzip in a third of its time; level 3 is no smaller
_DAY_S: Final = 86_400
_MICROS_DIGITS_MAX: Final = 20  # digits of a signed 64-bit integer
_YEARS: Final = range(1, 10_000)  # the years that RFC 3339 can write, without the year 0


class EncodedBody(NamedTuple):
    """A request body, the batch indexes of the records in it, and the rejections of the others."""

    content: bytes
    indexes: Sequence[int]
    rejected: dict[int, Rejection]


class BodyEncoder:
    """Encodes batches for one destination. The same batch always becomes the same bytes."""

    def __init__(self, settings: HttpSettings, event_type: type[msgspec.Struct]) -> None:
        self._settings = settings
        self._cloudevents = CloudEventsEncoder(settings, event_type) if settings.format == "cloudevents" else None

    def encode(self, batch: Batch) -> EncodedBody:
        """Encode and compress a batch."""
        indexes: Sequence[int] = range(len(batch))
        rejected: dict[int, Rejection] = {}
        if self._cloudevents is not None:
            items, indexes, rejected = self._cloudevents.encode(batch)
            plain = b"[" + b",".join(items) + b"]"
        elif self._settings.format == "json":
            plain = b"[" + b",".join(batch.payloads) + b"]"
        else:
            plain = b"\n".join(batch.payloads) + b"\n"
        return EncodedBody(compress(self._settings.compress, plain), indexes, rejected)


def compress(encoding: str, data: bytes) -> bytes:
    """Compress data for a `Content-Encoding`. Releases the GIL, and leaves the time out of gzip's header."""
    if encoding == "gzip":
        return gzip.compress(data, GZIP_LEVEL, mtime=0)
    if encoding == "zstd":
        return bytes(zstd.compress(data, ZSTD_LEVEL))
    return data


class CloudEventsEncoder:
    """Encodes events as CloudEvents 1.0 in the JSON format; `data` is the event, byte for byte."""

    def __init__(self, settings: HttpSettings, event_type: type[msgspec.Struct]) -> None:
        names = {field.name: field.encode_name for field in msgspec.structs.fields(event_type)}
        names_by_attribute = {
            "id": names["event_id"],
            "micros": names.get("occurred_at_micros"),
            "type": names.get(settings.cloudevent_type_field or ""),
        }
        fields = [(attribute, msgspec.Raw, _optional_raw_field(name)) for attribute, name in names_by_attribute.items() if name]
        head: Any = msgspec.defstruct("Head", fields, frozen=True)
        self._decode = msgspec.json.Decoder(head).decode
        self._source = msgspec.json.encode(settings.cloudevent_source)
        self._type = msgspec.json.encode(settings.cloudevent_type or event_type.__name__)

    def encode(self, batch: Batch) -> tuple[list[bytes], list[int], dict[int, Rejection]]:
        """Return the CloudEvents, the batch index of each, and the rejections of records that cannot be CloudEvents."""
        items: list[bytes] = []
        indexes: list[int] = []
        rejected: dict[int, Rejection] = {}
        for index, payload in enumerate(batch.payloads):
            if index % YIELD_EVERY_RECORDS == 0:
                batch.yield_gil()
            try:
                head = self._decode(payload)
            except (msgspec.DecodeError, RecursionError) as error:
                rejected[index] = Rejection("wrong_type", str(error))
                continue
            event_id = _as_json_string(bytes(head.id))
            if event_id is None:
                rejected[index] = Rejection("wrong_type", "a CloudEvent needs an id, and event_id is neither text nor a number")
                continue
            items.append(self._encode_event(payload, event_id, head))
            indexes.append(index)
        return items, indexes, rejected

    def _encode_event(self, payload: bytes, event_id: bytes, head: Any) -> bytes:
        kind = _as_json_string(bytes(getattr(head, "type", b""))) or self._type
        time = format_rfc3339(bytes(getattr(head, "micros", b"")))
        return b'{"specversion":"1.0","id":%b,"source":%b,"type":%b%b,"datacontenttype":"application/json","data":%b}' % (
            event_id,
            self._source,
            kind,
            b',"time":"%b"' % time if time else b"",
            payload,
        )


def _optional_raw_field(name: str) -> Any:
    """Declare a field that keeps its raw JSON, empty where a record does not have the field."""
    return msgspec.field(default_factory=msgspec.Raw, name=name)


def _as_json_string(raw: bytes) -> bytes | None:
    """Return a JSON string or number as a JSON string; None for an empty string or another type."""
    if raw[:1] == b'"':
        return raw if raw != b'""' else None
    return b'"%b"' % raw if raw[:1].isdigit() or raw[:1] == b"-" else None


def format_rfc3339(raw: bytes) -> bytes | None:
    """Format microseconds since 1970 (a JSON integer) as RFC 3339; None where that is not possible."""
    if len(raw) > _MICROS_DIGITS_MAX or not raw.removeprefix(b"-").isdigit():
        return None
    seconds, micros = divmod(int(raw), 10**6)
    day, second = divmod(seconds, _DAY_S)
    date = _civil_date(day)
    if date is None:
        return None
    return b"%bT%02d:%02d:%02d.%06dZ" % (date, second // 3600, second // 60 % 60, second % 60, micros)


@lru_cache(maxsize=64)
def _civil_date(day: int) -> bytes | None:
    """Return the date of a day counted from 1970-01-01, by Howard Hinnant's algorithm `civil_from_days`."""
    era, day_of_era = divmod(day + 719_468, 146_097)  # an era is 400 years; days count from 0000-03-01
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    months_since_march = (5 * day_of_year + 2) // 153
    month = months_since_march + 3 if months_since_march < 10 else months_since_march - 9
    year = year_of_era + era * 400 + (month <= 2)
    day_of_month = day_of_year - (153 * months_since_march + 2) // 5 + 1
    return b"%04d-%02d-%02d" % (year, month, day_of_month) if year in _YEARS else None
