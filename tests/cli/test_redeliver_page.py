"""docs/how-to/redeliver.md shows the current output of its commands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.admin.prepared_outboxes import seal_batch
from tests.cli.doc_pages import normalized, page_with_current_output
from tests.cli.test_commands import run

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "redeliver.md"


def current_page(folder: Path) -> str:
    """The page with the current output of its commands."""
    box = folder / "box"
    (folder / "keep.toml").write_text(re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)[0])
    for first in (0, 3, 6):
        seal_batch(box, first=first)
        run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", "-c", "keep.toml", cwd=folder)
        if not first:
            shutil.copy(folder / "events.db", folder / "copy.db")
    shutil.move(folder / "copy.db", folder / "events.db")
    return page_with_current_output(PAGE, folder)


def test_the_redelivery_page_shows_the_current_output(tmp_path: Path) -> None:
    """All console blocks are run, in the order of the page."""
    assert normalized(PAGE.read_text()) == normalized(current_page(tmp_path))
