"""Reading compressed files, both undamaged and damaged."""

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
    """Records with random data, so that they compress badly."""
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
    """Other tools append frames to a file."""
    packed = compression.compress(PACKED, b"one\n") + compression.compress(PACKED, b"two\n")
    assert compression.decompress(PACKED, packed) == (b"one\ntwo\n", "")


def test_many_frames_are_not_read_to_the_end() -> None:
    """Each costs a copy of what follows it. The lines before the limit are read, and nothing is lost."""
    frame = compression.compress("n.ndjson.zst", record.line(b"1"))
    contents, _ = reader.read_file("n.ndjson.zst", frame * (compression.FRAMES_MAX + 1), lambda: None)
    assert len(contents.payloads) == compression.FRAMES_MAX
    assert contents.damaged[-1].reason == "bad_compression: has more than 100 frames"
    whole, _ = reader.read_file("n.ndjson.zst", frame * compression.FRAMES_MAX, lambda: None)
    assert (len(whole.payloads), whole.damaged) == (compression.FRAMES_MAX, [])


def test_a_truncated_file_gives_the_lines_before_the_cut_and_quarantines_all_its_bytes() -> None:
    """For every length: no exception, only whole lines, and the compressed bytes as the last damaged range."""
    events = lines(40)
    packed = compression.compress(PACKED, b"".join(events))
    for end in range(len(packed)):
        contents, data = read(packed[:end])
        assert contents.payloads == [record.payload(line[:-1]) for line in events[: len(contents.payloads)]]
        last = contents.damaged[-1]
        assert last.reason.startswith("bad_compression: ")
        assert data[last.offset : last.offset + last.length] == packed[:end]


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_alters_no_event(bit: int) -> None:
    """At any position, only events that were written are read, in order; the rest is damaged."""
    events = lines(40)
    payloads = [record.payload(line[:-1]) for line in events]
    packed = compression.compress(PACKED, b"".join(events))
    for position in range(len(packed)):
        flipped = bytearray(packed)
        flipped[position] ^= 1 << bit
        contents, data = read(bytes(flipped))
        remaining = iter(payloads)
        assert all(payload in remaining for payload in contents.payloads)
        if contents.payloads != payloads or contents.damaged:
            last = contents.damaged[-1]
            assert data[last.offset : last.offset + last.length] == flipped


def test_lines_before_the_damage_are_read() -> None:
    """Including data that the library had not returned when it failed: a frame has blocks of 128 KiB."""
    events = lines(20_000)
    plain = b"".join(events)
    packed = bytearray(compression.compress(PACKED, plain))
    packed[len(packed) // 2 :] = b"\xff" * (len(packed) - len(packed) // 2)
    contents, data = read(bytes(packed))
    assert len(contents.payloads) > 0.4 * len(events)
    assert contents.payloads == [record.payload(line[:-1]) for line in events[: len(contents.payloads)]]
    assert data.endswith(packed)
    assert len(contents.damaged) == 2  # the torn line, and the compressed file


@settings(max_examples=300)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_read_or_reported_as_damaged(data: bytes, has_magic: bool) -> None:
    """No exception is raised, and a damaged file is stored with all its bytes."""
    data = b"\x28\xb5\x2f\xfd" + data if has_magic else data
    contents, stored = read(data)
    assert contents.damaged or not contents.payloads
    assert stored.endswith(data) or not contents.damaged


def test_a_decompression_bomb_is_not_decompressed() -> None:
    """The limit of 64 MiB is enough for every batch file. The compressed bytes are quarantined."""
    packed = compression.compress(PACKED, bytes(compression.PLAIN_BYTES_MAX + 1))
    assert len(packed) < 10_000
    assert compression.decompress(PACKED, packed)[0] == b""
    several_frames = compression.compress(PACKED, bytes(compression.PLAIN_BYTES_MAX // 2)) * 3
    plain, problem = compression.decompress(PACKED, several_frames)
    assert (len(plain), problem) == (compression.PLAIN_BYTES_MAX, f"unpacks to more than {compression.PLAIN_BYTES_MAX} bytes")


def test_without_zstd_a_compressed_file_is_left_alone() -> None:
    """The errors of the reader and of the setting name the missing package. Plain files are read without zstd."""
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
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout.splitlines() == [
        f"{PACKED}: needs zstd: pip install 'pillarbox[zstd]'",
        "compress_after needs zstd: pip install 'pillarbox[zstd]'",
    ]
