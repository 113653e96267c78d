"""CSV for a spreadsheet: no cell is run as a formula, and nothing is lost on the way back."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillarbox.cli.csv_cells import escape_cell, unescape_cell
from tests.cli.test_commands import run

FORMULAS = [
    "=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "=cmd|' /C calc'!A0", '=HYPERLINK("http://evil.example")', "\uff1d1", "\uff0b1", "\uff0d1", "\uff20x",
    "'=1", "''=1",
]  # fmt: skip
TEXTS = ["plain", "a=b", "", "'quoted'", "5", " =1", "a\n=1", "https://example.com/?a=b"]
STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def fill(folder: Path, texts: list[str]) -> None:
    lines = [
        {
            "event_id": f"e{number}",
            "event_key": text,
            "scope_kind": "Site",
            "scope_id": "s",
            "user_id": text,
            "occurred_at_micros": -5,
        }
        for number, text in enumerate(texts)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    assert run("enqueue", "-d", "box", "-q", cwd=folder, stdin=text.encode()).returncode == 0


def rows_of(output: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(output.decode(), newline="")))


def test_no_cell_of_an_export_begins_like_a_formula(tmp_path: Path) -> None:
    """A number may begin with a minus: it is not text."""
    fill(tmp_path, FORMULAS + TEXTS)
    rows = rows_of(run("export", "-d", "box", "--format", "csv", cwd=tmp_path).stdout)
    assert [row["event_key"] for row in rows] == [f"'{text}" for text in FORMULAS] + TEXTS
    for row in rows:
        cells = [cell for name, cell in row.items() if name != "occurred_at_micros"]
        assert not [cell for cell in cells if cell.startswith(STARTS)]
        assert row["occurred_at_micros"] == "-5"


def test_raw_cells_are_as_they_are(tmp_path: Path) -> None:
    """For a program that reads CSV."""
    fill(tmp_path, FORMULAS + TEXTS)
    rows = rows_of(run("export", "-d", "box", "--format", "csv", "--raw", cwd=tmp_path).stdout)
    assert [row["event_key"] for row in rows] == FORMULAS + TEXTS


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_import_takes_back_what_export_has_written(tmp_path: Path, raw: list[str]) -> None:
    """Every text arrives as it was, escaped or not."""
    texts = [text for text in FORMULAS + TEXTS if text]
    fill(tmp_path, texts)
    assert run("export", "-d", "box", "--format", "csv", "-o", "events.csv", *raw, cwd=tmp_path).returncode == 0
    assert run("import", "events.csv", "-d", "copy", *raw, cwd=tmp_path).returncode == 0
    events = [json.loads(line) for line in run("export", "-d", "copy", cwd=tmp_path).stdout.splitlines()]
    assert [(event["event_key"], event["user_id"]) for event in events] == [(text, text) for text in texts]


@given(st.text(st.sampled_from("'=+-@\t\r\nx\uff1d") | st.characters(), max_size=8))
def test_the_escape_can_be_taken_back(text: str) -> None:
    """From any text."""
    assert unescape_cell(escape_cell(text)) == text
    assert not escape_cell(text).startswith(STARTS)
