"""Files that end in `.zst` <-> the lines in them. Pure. zstd is looked for only once there is such a file.

A frame has a checksum, and lines have theirs: what comes out before a damaged place is judged line by line, as always.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout

if TYPE_CHECKING:
    from types import ModuleType

# What a compressed file may hold. A batch and one call of `enqueue_many` are 17 MiB as the settings are; a larger file stays as
# it is. So nothing that we write unpacks to more, and no file can ask for more memory.
PLAIN_BYTES_MAX: Final = 64 * 2**20
LEVEL: Final = 1  # events to a tenth at a gigabyte a second; 3 and 6 are slower and no smaller, 19 takes 300 times as long
INSTALL_COMMAND: Final = "pip install 'pillarbox[zstd]'"
_WINDOW_LOG_MAX: Final = PLAIN_BYTES_MAX.bit_length() - 1


class Decompressed(NamedTuple):
    """What is in a file; with a `problem`, that is what comes before the damaged place."""

    data: bytes
    problem: str = ""


@cache
def _zstd_module() -> ModuleType | None:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd  # noqa: PLC0415 - whoever has no such file need not have it
        else:
            from backports import zstd  # noqa: PLC0415 - as above
    except ImportError:
        return None
    return zstd


def is_available() -> bool:
    """Whether this process can read and write such files."""
    return _zstd_module() is not None


def compress(name: str, data: bytes) -> bytes:
    """The frame that is to be a file's content; the interpreter is free meanwhile. Raises `FileUnusableError` without zstd."""
    zstd = _require_zstd(name)
    options = {zstd.CompressionParameter.compression_level: LEVEL, zstd.CompressionParameter.checksum_flag: 1}
    return bytes(zstd.compress(data, options=options))


def decompressed_lines(name: str, data: bytes) -> bytes:
    """The lines in a file whose bytes are `data`, whatever its ending, as far as they can be had; see `reader.read_file`.

    Raises `FileUnusableError` where zstd is missing.
    """
    return decompress(name, data).data


def decompress(name: str, data: bytes) -> Decompressed:
    """What is in a file whose bytes are `data`, whatever its ending. Raises `FileUnusableError` where zstd is missing."""
    if not name.endswith(layout.COMPRESSED_SUFFIX):
        return Decompressed(data)
    zstd = _require_zstd(name)
    if not data:
        return Decompressed(b"", "empty")
    plain = b""
    while data:
        part, data, problem = _decompress_frame(zstd, data, PLAIN_BYTES_MAX - len(plain))
        plain += part
        if problem:
            return Decompressed(plain, problem)
    return Decompressed(plain)


def _require_zstd(name: str) -> ModuleType:
    zstd = _zstd_module()
    if zstd is None:
        raise FileUnusableError(name, f"needs zstd: {INSTALL_COMMAND}")
    return zstd


def _decompress_frame(zstd: ModuleType, data: bytes, most: int) -> tuple[bytes, bytes, str]:
    """The first frame's lines, at most so many bytes, what comes behind it, and what is wrong with it."""

    def begun(end: int) -> tuple[bytes, bytes, str]:
        decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
        plain = decompressor.decompress(data[:end], max_length=most + 1)
        if len(plain) > most:
            return b"", b"", f"unpacks to more than {PLAIN_BYTES_MAX} bytes"
        return plain, decompressor.unused_data, "" if decompressor.eof else "ends in the middle"

    try:
        return begun(len(data))
    except zstd.ZstdError as error:
        problem = str(error)
    # What comes before the damage is lost with the error. So much of the frame is sound, and so much is not:
    sound, unsound = 0, len(data)
    while unsound - sound > 1:
        middle = (sound + unsound) // 2
        try:
            begun(middle)
        except zstd.ZstdError:
            unsound = middle
        else:
            sound = middle
    return begun(sound)[0], b"", problem
