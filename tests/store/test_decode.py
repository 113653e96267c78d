"""The reader's simple case, compiled, does what it does in Python; `tools/check` runs the tests of the store with both."""

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
NO_JSON = st.sampled_from([b"", b"{", b"1,2", b'{"t":"\xff"}', b'"\xc3"', b"{}\0", b"[" * 10_000, b'{"t":"\r"}'])
LINES = st.one_of(
    JSON.map(py_encode_record),
    JSON.map(py_encode_record),
    NO_JSON.map(py_encode_record),
    JSON.map(lambda value: b'{"event":%b}\n' % value),
    st.sampled_from([b"\n", b"  \n", b"\r\n", b'{"event":{},"crc":"00000000"}\n', b"\0\0\0\n", b'{"event"']),
)


@given(st.lists(LINES, max_size=12), st.integers(0, 12), st.integers(0, 400))
def test_lines_are_read_the_same_compiled_and_in_python(lines: list[bytes], most: int, cut: int) -> None:
    """From the beginning and from where each call has ended, to the end of a file that may be torn."""
    data = b"".join(lines)
    data = data[: len(data) - min(cut, len(data))] if cut % 3 == 0 else data
    offset = 0
    while offset <= len(data):
        found = decode_records(data, offset, most, decode_record, check)
        assert found == py_decode_records(data, offset, most, py_decode_record, check)
        payloads, end = found
        assert data[offset:end] == b"".join(map(py_encode_record, payloads))
        assert len(payloads) <= most
        offset = (data.find(b"\n", end) if b"\n" in data[end:] else len(data)) + 1


@pytest.mark.parametrize("decode", [decode_records, py_decode_records])
def test_no_more_lines_are_read_than_are_asked_for(decode: Any) -> None:
    """The rest is for the next call, after others had the interpreter."""
    line = py_encode_record(b"{}")
    assert decode(line * 7, 0, 3, decode_record, check) == ([b"{}"] * 3, 3 * len(line))
    assert decode(line * 7, 5 * len(line), 3, decode_record, check) == ([b"{}"] * 2, 7 * len(line))
    assert decode(line * 7, 0, 0, decode_record, check) == ([], 0)
    assert decode(line * 7, 7 * len(line), 3, decode_record, check) == ([], 7 * len(line))


@pytest.mark.parametrize("decode", [decode_records, py_decode_records])
def test_where_nothing_is_to_be_read_is_an_error(decode: Any) -> None:
    """Rather than read as if it were."""
    for offset in (-1, 2):
        with pytest.raises(ValueError, match="offset"):
            decode(b"x", offset, 1, decode_record, check)


@pytest.mark.parametrize("decode", [decode_records, py_decode_records])
def test_an_interrupt_is_not_taken_for_a_damaged_line(decode: Any) -> None:
    """It comes through; what else is raised is the line's, for the reader to judge."""
    data = py_encode_record(b"{}") * 3

    def raises(error: type[BaseException]) -> Any:
        def look(_payload: bytes) -> None:
            raise error

        return look

    with pytest.raises(KeyboardInterrupt):
        decode(data, 0, 3, decode_record, raises(KeyboardInterrupt))
    assert decode(data, 0, 3, decode_record, raises(RecursionError)) == ([], 0)


def test_the_reader_in_python_is_used_where_that_is_asked_for() -> None:
    """With `PILLARBOX_PURE_PYTHON=1`, as where there was no compiler."""
    code = "from pillarbox._native import decode_records, py_decode_records; print(decode_records is py_decode_records)"
    environment = os.environ | {"PILLARBOX_PURE_PYTHON": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert found.stdout == "True\n"
