"""docs/mending.md: its commands run, and print what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from pillarbox.store import record
from tests.cli.test_commands import run
from tests.kept.stage import payload, sealed

PAGE = Path(__file__).parents[2] / "docs" / "mending.md"


def without_what_differs(text: str) -> str:
    """Times, batch ids, and the seconds within a table."""
    text = re.sub(r"sealed-\d{16}-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "BATCH", text)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", text)


def session(folder: Path) -> str:
    """The page, with what its commands print now."""
    box = folder / "box"
    dead = [payload(1, 17), payload(2, 17), payload(3, 5, key="refund")]
    torn = record.line(payload(5))[:-9]
    changed = record.line(payload(4)).replace(b'"scope_id":"s"', b'"scope_id":"z"')
    sealed(box, *map(record.line, dead), changed, b"\0" * 20 + record.line(payload(6))[30:], torn)
    run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=folder)

    def output(match: re.Match[str]) -> str:
        printed = []
        for command in re.findall(r"^\$ pillarbox (.*)$", match[0], re.MULTILINE):
            done = run(*shlex.split(command), cwd=folder)
            printed.append(f"$ pillarbox {command}\n{(done.stdout + done.stderr).decode()}")
        return "```console\n" + "".join(printed) + "```"

    return re.sub(r"```console\n.*?```", output, PAGE.read_text(), flags=re.DOTALL)


def test_the_page_on_mending_says_what_the_commands_print(tmp_path: Path) -> None:
    """All of them, one after the other."""
    assert without_what_differs(PAGE.read_text()) == without_what_differs(session(tmp_path))
