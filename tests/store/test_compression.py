"""Compressed files: what is read of them, whole and damaged."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillarbox.store import compression, reader, record
from pillarbox.store.reader import FileContents

NAME = "sealed-0000000000000001-x.ndjson"
PACKED = f"{NAME}.zst"


def lines(count: int) -> list[bytes]:
    """Lines that do not compress to nothing."""
    rng = random.Random(7)
    return [record.line(b'{"n":%d,"x":"%x"}' % (number, rng.getrandbits(200))) for number in range(count)]


def read(data: bytes, name: str = PACKED) -> tuple[FileContents, bytes]:
    return reader.read_file(name, data, lambda: None)


@given(st.binary(max_size=5000))
def test_decompression_returns_what_was_compressed(data: bytes) -> None:
    """For any bytes; a file with another suffix is returned as it is."""
    packed = compression.compress(PACKED, data)
    assert compression.decompress(PACKED, packed) == (data, "")
    assert compression.decompressed_lines(PACKED, packed) == data
    assert compression.decompress(NAME, packed) == (packed, "")


def test_several_frames_are_read_as_one_file() -> None:
    """As other tools write them, appended to each other."""
    packed = compression.compress(PACKED, b"one\n") + compression.compress(PACKED, b"two\n")
    assert compression.decompress(PACKED, packed) == (b"one\ntwo\n", "")


def test_a_truncated_file_gives_the_lines_before_the_cut_and_quarantines_all_its_bytes() -> None:
    """For every length: no exception, only good lines, and the file itself in the last damaged range."""
    events = lines(40)
    packed = compression.compress(PACKED, b"".join(events))
    for end in range(len(packed)):
        found, data = read(packed[:end])
        assert found.payloads == [record.payload(line[:-1]) for line in events[: len(found.payloads)]]
        last = found.damaged[-1]
        assert last.reason.startswith("bad_compression: ")
        assert data[last.offset : last.offset + last.length] == packed[:end]


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_alters_no_event(bit: int) -> None:
    """Wherever it is: only events that were written are read, in order, and the rest is damaged."""
    events = lines(40)
    payloads = [record.payload(line[:-1]) for line in events]
    packed = compression.compress(PACKED, b"".join(events))
    for outbox_dir in range(len(packed)):
        flipped = bytearray(packed)
        flipped[outbox_dir] ^= 1 << bit
        found, data = read(bytes(flipped))
        left = iter(payloads)
        assert all(payload in left for payload in found.payloads)
        if found.payloads != payloads or found.damaged:
            last = found.damaged[-1]
            assert data[last.offset : last.offset + last.length] == flipped


def test_what_comes_before_the_damage_is_read() -> None:
    """Also what the library has not returned before it fails: a frame has blocks of 128 KiB."""
    events = lines(20_000)
    plain = b"".join(events)
    packed = bytearray(compression.compress(PACKED, plain))
    packed[len(packed) // 2 :] = b"\xff" * (len(packed) - len(packed) // 2)
    found, data = read(bytes(packed))
    assert len(found.payloads) > 0.4 * len(events)
    assert found.payloads == [record.payload(line[:-1]) for line in events[: len(found.payloads)]]
    assert data.endswith(packed)
    assert len(found.damaged) == 2  # the line that was cut, and the file


@settings(max_examples=300)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_read_or_reported_as_damaged(data: bytes, begun: bool) -> None:
    """No exception, and no more bytes than the file has."""
    data = b"\x28\xb5\x2f\xfd" + data if begun else data
    found, whole = read(data)
    assert found.damaged or not found.payloads
    assert whole.endswith(data) or not found.damaged


def test_a_decompression_bomb_is_not_decompressed() -> None:
    """64 MiB are enough for every file of ours; the file is quarantined, small as it is."""
    packed = compression.compress(PACKED, bytes(compression.PLAIN_BYTES_MAX + 1))
    assert len(packed) < 10_000
    assert compression.decompress(PACKED, packed)[0] == b""
    many = compression.compress(PACKED, bytes(compression.PLAIN_BYTES_MAX // 2)) * 3
    plain, problem = compression.decompress(PACKED, many)
    assert (len(plain), problem) == (compression.PLAIN_BYTES_MAX, f"unpacks to more than {compression.PLAIN_BYTES_MAX} bytes")


def test_without_zstd_a_compressed_file_is_left_alone() -> None:
    """The error says what is missing, and so does the setting; a plain file is read without importing zstd."""
    script = f"""if True:
        import sys
        from pillarbox.errors import ConfigurationError, FileUnusableError
        from pillarbox.settings import resolve
        from pillarbox.store import reader
        assert reader.read_file({NAME!r}, b"", lambda: None)[0].payloads == []
        assert not any("zstd" in module for module in sys.modules)
        sys.modules["backports"] = sys.modules["backports.zstd"] = sys.modules["compression"] = None
        try:
            reader.read_file({PACKED!r}, b"x", lambda: None)
        except FileUnusableError as error:
            print(error)
        try:
            resolve({{"compress_after": 60}})
        except ConfigurationError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [
        f"{PACKED}: needs zstd: pip install 'pillarbox[zstd]'",
        "compress_after needs zstd: pip install 'pillarbox[zstd]'",
    ]
