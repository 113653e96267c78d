"""docs/how-to/inspect.md shows the current output of its commands."""

from __future__ import annotations

import re
from pathlib import Path

from pillarbox import Outbox
from tests.cli.doc_pages import normalized, page_with_current_output
from tests.conftest import event

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "inspect.md"
WRITER = r"(?<=writer )[0-9a-f-]{36}"
TEN_O_CLOCK = 1_795_600_800_000_000  # 2026-11-25T10:00:00Z


def current_page(folder: Path) -> str:
    """The page with the current output of its commands."""
    with Outbox(str(folder / "box"), flush_interval=3600.0) as outbox:
        for number in range(4):
            user = f"u-{number}" if number % 2 == 0 else None
            outbox.enqueue(event(number, scope_id="shop", user_id=user, occurred_at_micros=TEN_O_CLOCK + number * 1_000_000))
        members = {"event_key": "buy", "scope_id": "shop", "user_id": "u-1", "metadata_json": '{"cents":1999}'}
        outbox.enqueue(event(4, occurred_at_micros=TEN_O_CLOCK + 4_000_000, **members))
    return page_with_current_output(PAGE, folder)


def test_the_inspect_page_shows_the_current_output(tmp_path: Path) -> None:
    """All console blocks are run, in the order of the page."""
    documented, printed = (normalized(text) for text in (PAGE.read_text(), current_page(tmp_path)))
    assert re.sub(WRITER, "WRITER", documented) == re.sub(WRITER, "WRITER", printed)
