"""Pages of the documents whose console blocks are run: what their commands print now."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.cli.test_commands import run


def without_what_differs(text: str) -> str:
    """Times, batch ids, and the seconds within a table."""
    text = re.sub(r"sealed-\d{16}-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "BATCH", text)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", text)


def as_run(page: Path, folder: Path) -> str:
    """The page, with what its commands print in this folder."""

    def output(match: re.Match[str]) -> str:
        printed = []
        for command in re.findall(r"^\$ pillarbox (.*)$", match[0], re.MULTILINE):
            done = run(*shlex.split(command), cwd=folder)
            printed.append(f"$ pillarbox {command}\n{(done.stdout + done.stderr).decode()}")
        return "```console\n" + "".join(printed) + "```"

    return re.sub(r"```console\n.*?```", output, page.read_text(), flags=re.DOTALL)
