"""docs/reference/sessions.md shows the current output of the commands, beside writers and a delivery worker."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_sessions_page_shows_the_current_output() -> None:
    """If it does not, run tools/sessions to update the page."""
    page = (ROOT / "docs" / "reference" / "sessions.md").read_text()
    assert page == runpy.run_path(str(ROOT / "tools" / "sessions"))["sessions"]()
