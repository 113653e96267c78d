"""Compresses batch files, and decompresses files that end in `.zst`. Pure. zstd is imported only once it is needed.

A frame has a checksum, and so has each line. The lines before a damaged place are checked one by one, as always.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout

if TYPE_CHECKING:
    from types import ModuleType

# The largest content that is compressed. A batch and one call of `enqueue_many` have 17 MiB with the default settings; a larger
# file is not compressed. So no file of ours decompresses to more, and a forged one cannot use more memory.
PLAIN_BYTES_MAX: Final = 64 * 2**20
FRAMES_MAX: Final = 100  # frames in a file: ours have one, and each costs a copy of the bytes after it
LEVEL: Final = 1  # compresses events to a tenth at 1 GB/s; levels 3 and 6 are slower and no smaller, 19 takes 300 times as long
INSTALL_COMMAND: Final = "pip install 'pillarbox[zstd]'"
_WINDOW_LOG_MAX: Final = PLAIN_BYTES_MAX.bit_length() - 1


class Decompressed(NamedTuple):
    """The content of a file; if it has a `problem`, only the content before the damaged place."""

    data: bytes
    problem: str = ""


@cache
def _zstd_module() -> ModuleType | None:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd  # noqa: PLC0415 - optional: needed only for compressed files
        else:
            from backports import zstd  # noqa: PLC0415 - as above
    except ImportError:
        return None
    return zstd


def is_available() -> bool:
    """Whether zstd is installed."""
    return _zstd_module() is not None


def compress(name: str, data: bytes) -> bytes:
    """Compress the content of a file to one frame, without the GIL. Raises `FileUnusableError` if zstd is missing."""
    zstd = _require_zstd(name)
    options = {zstd.CompressionParameter.compression_level: LEVEL, zstd.CompressionParameter.checksum_flag: 1}
    return bytes(zstd.compress(data, options=options))


def decompressed_lines(name: str, data: bytes) -> bytes:
    """The lines in a file with the content `data`, compressed or not, as far as they can be recovered.

    Raises `FileUnusableError` if zstd is missing. `reader.read_file` also returns the damaged bytes.
    """
    return decompress(name, data).data


def decompress(name: str, data: bytes) -> Decompressed:
    """The content of a file, decompressed if its name says that it is compressed.

    Raises `FileUnusableError` if zstd is missing.
    """
    if not name.endswith(layout.COMPRESSED_SUFFIX):
        return Decompressed(data)
    zstd = _require_zstd(name)
    if not data:
        return Decompressed(b"", "empty")
    parts: list[bytes] = []
    size, problem = 0, ""
    while data and not problem:
        if len(parts) == FRAMES_MAX:
            problem = f"has more than {FRAMES_MAX} frames"
            break
        part, data, problem = _decompress_frame(zstd, data, PLAIN_BYTES_MAX - size)
        parts.append(part)
        size += len(part)
    return Decompressed(b"".join(parts), problem)


def _require_zstd(name: str) -> ModuleType:
    zstd = _zstd_module()
    if zstd is None:
        raise FileUnusableError(name, f"needs zstd: {INSTALL_COMMAND}")
    return zstd


def _decompress_frame(zstd: ModuleType, data: bytes, most: int) -> tuple[bytes, bytes, str]:
    """Decompress the first frame; returns its content of at most `most` bytes, the bytes after it, and the problem."""

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
    # The exception discards what comes before the damage. Bisect for the longest part of the frame that decompresses.
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
