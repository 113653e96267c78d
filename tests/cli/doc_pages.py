"""Runs the console blocks of documentation pages, and compares pages without the parts that change from run to run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.cli.test_commands import run


def normalized(text: str) -> str:
    """Replace times and batch ids with placeholders, because they differ in every run."""
    text = re.sub(r"sealed-\d{16}-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "BATCH", text)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", text)


def page_with_current_output(page: Path, folder: Path) -> str:
    """The page, with each console block replaced by the current output of its commands in this folder."""

    def current_output(match: re.Match[str]) -> str:
        sessions = []
        for command in re.findall(r"^\$ pillarbox (.*)$", match[0], re.MULTILINE):
            completed = run(*shlex.split(command), cwd=folder)
            sessions.append(f"$ pillarbox {command}\n{(completed.stdout + completed.stderr).decode()}")
        return "```console\n" + "".join(sessions) + "```"

    return re.sub(r"```console\n.*?```", current_output, page.read_text(), flags=re.DOTALL)
