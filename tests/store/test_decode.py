"""Decoding well-formed lines gives the same results in C and in Python.

`tools/check` runs the tests of the store with both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillarbox._native import decode_record, decode_records, py_decode_record, py_decode_records, py_encode_record

check = msgspec.json.Decoder(msgspec.Raw).decode
JSON = st.sampled_from([b"{}", b'{"n":1}', b'{"t":"\xc3\xa9"}', b"[1, 2]", b'""', b'{"deep":%b}' % (b"[" * 90 + b"]" * 90)])
INVALID_JSON = st.sampled_from([b"", b"{", b"1,2", b'{"t":"\xff"}', b'"\xc3"', b"{}\0", b"[" * 10_000, b'{"t":"\r"}'])
LINES = st.one_of(
    JSON.map(py_encode_record),
    JSON.map(py_encode_record),
    INVALID_JSON.map(py_encode_record),
    JSON.map(lambda value: b'{"event":%b}\n' % value),
    st.sampled_from([b"\n", b"  \n", b"\r\n", b'{"event":{},"crc":"00000000"}\n', b"\0\0\0\n", b'{"event"']),
)


@given(st.lists(LINES, max_size=12), st.integers(0, 12), st.integers(0, 400))
def test_lines_are_decoded_alike_in_c_and_python(lines: list[bytes], most: int, cut: int) -> None:
    """From the beginning, and from the end of each call, to the end of a file that may be torn."""
    data = b"".join(lines)
    data = data[: len(data) - min(cut, len(data))] if cut % 3 == 0 else data
    offset = 0
    while offset <= len(data):
        decoded = decode_records(data, offset, most, decode_record, check)
        assert decoded == py_decode_records(data, offset, most, py_decode_record, check)
        payloads, end = decoded
        assert data[offset:end] == b"".join(map(py_encode_record, payloads))
        assert len(payloads) <= most
        offset = (data.find(b"\n", end) if b"\n" in data[end:] else len(data)) + 1


@pytest.mark.parametrize("decode", [decode_records, py_decode_records])
def test_no_more_lines_are_decoded_than_requested(decode: Any) -> None:
    """The next call decodes the rest, after other threads could run."""
    line = py_encode_record(b"{}")
    assert decode(line * 7, 0, 3, decode_record, check) == ([b"{}"] * 3, 3 * len(line))
    assert decode(line * 7, 5 * len(line), 3, decode_record, check) == ([b"{}"] * 2, 7 * len(line))
    assert decode(line * 7, 0, 0, decode_record, check) == ([], 0)
    assert decode(line * 7, 7 * len(line), 3, decode_record, check) == ([], 7 * len(line))


@pytest.mark.parametrize("decode", [decode_records, py_decode_records])
def test_an_offset_outside_the_data_raises(decode: Any) -> None:
    """It is not clipped to the data."""
    for offset in (-1, 2):
        with pytest.raises(ValueError, match="offset"):
            decode(b"x", offset, 1, decode_record, check)


@pytest.mark.parametrize("decode", [decode_records, py_decode_records])
def test_an_interrupt_is_not_taken_for_a_damaged_line(decode: Any) -> None:
    """It is raised. Any other exception means that the line is damaged, and the reader reports it."""
    data = py_encode_record(b"{}") * 3

    def raises(error: type[BaseException]) -> Any:
        def check_payload(_payload: bytes) -> None:
            raise error

        return check_payload

    with pytest.raises(KeyboardInterrupt):
        decode(data, 0, 3, decode_record, raises(KeyboardInterrupt))
    assert decode(data, 0, 3, decode_record, raises(RecursionError)) == ([], 0)


def test_the_environment_can_disable_the_compiled_decoder() -> None:
    """`PILLARBOX_PURE_PYTHON=1` selects the decoder in Python."""
    code = "from pillarbox._native import decode_records, py_decode_records; print(decode_records is py_decode_records)"
    environment = os.environ | {"PILLARBOX_PURE_PYTHON": "1"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert process.stdout == "True\n"
