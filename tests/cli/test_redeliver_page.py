"""docs/how-to/redeliver.md: its commands run and print what the page shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.admin.prepared_outboxes import seal_batch
from tests.cli.doc_pages import as_run, without_what_differs
from tests.cli.test_commands import run

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "redeliver.md"


def session(folder: Path) -> str:
    """The page with the output that its commands print now."""
    box = folder / "box"
    (folder / "keep.toml").write_text(re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)[0])
    for first in (0, 3, 6):
        seal_batch(box, first=first)
        run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", "-c", "keep.toml", cwd=folder)
        if not first:
            shutil.copy(folder / "events.db", folder / "copy.db")
    shutil.move(folder / "copy.db", folder / "events.db")
    return as_run(PAGE, folder)


def test_the_page_on_redelivery_shows_what_the_commands_print(tmp_path: Path) -> None:
    """All of them, in their order."""
    assert without_what_differs(PAGE.read_text()) == without_what_differs(session(tmp_path))
