"""docs/reference/sessions.md: what the tools print, beside writers and a deliverer."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_recorded_sessions_are_what_the_tools_print_now() -> None:
    """Mend the page with tools/sessions."""
    page = (ROOT / "docs" / "reference" / "sessions.md").read_text()
    assert page == runpy.run_path(str(ROOT / "tools" / "sessions"))["sessions"]()
