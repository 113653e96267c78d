"""One line <-> one record. Pure.

A line is `{"event":VALUE,"crc":"xxxxxxxx"}` and a line feed; `crc` is the CRC-32 (IEEE 802.3, as in zlib) of the bytes of VALUE
in eight lower-case hex digits. Lines of older writers have no `crc`. Nothing else is a record.
"""

from __future__ import annotations

from zlib import crc32

import msgspec

from pillarbox._native import RECORD_OVERHEAD_BYTES as OVERHEAD
from pillarbox._native import decode_record, decode_records
from pillarbox._native import encode_record as line

__all__ = ["OVERHEAD", "DamagedRecordError", "line", "payload", "payloads"]


class DamagedRecordError(Exception):
    """The bytes are not a record; `reason` is the rule that they break."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    event: msgspec.Raw
    crc: str | msgspec.UnsetType = msgspec.UNSET


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_check_value = msgspec.json.Decoder(msgspec.Raw).decode


def payload(line: bytes) -> bytes:
    """The event's JSON in a line without its line feed. Raises `DamagedRecordError`."""
    # The shape that we write is recognised without a JSON parser; the value in it is checked all the same.
    value = decode_record(line)
    if value is not None:
        if not value.isascii():
            _check_utf8(value)
        try:
            _check_value(value)
        except (msgspec.DecodeError, RecursionError):
            raise DamagedRecordError("bad_json") from None
        return value
    return _payload_by_parser(line)


def payloads(data: bytes, offset: int, most: int) -> tuple[list[bytes], int]:
    """The payloads of up to `most` lines from an offset on, as `payload` returns them, and where they end.

    They end at the latest before the first line that is damaged, has another shape than ours, or has no line feed.
    """
    return decode_records(data, offset, most, decode_record, _check_value)


def _payload_by_parser(line: bytes) -> bytes:
    _check_utf8(line)
    try:
        envelope = _decode_envelope(line)
    except msgspec.ValidationError:
        raise DamagedRecordError("not_a_record") from None
    except (msgspec.DecodeError, RecursionError):
        raise DamagedRecordError("nul_bytes" if b"\0" in line else "bad_json") from None
    value = bytes(envelope.event)
    if envelope.crc is not msgspec.UNSET and envelope.crc != f"{crc32(value):08x}":
        raise DamagedRecordError("bad_checksum")
    return value


def _check_utf8(text: bytes) -> None:
    # msgspec does not check the strings in a raw value.
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError:
            raise DamagedRecordError("bad_utf8") from None
