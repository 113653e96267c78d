"""docs/how-to/inspect.md: its commands run and print what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

from pillarbox import Outbox
from tests.cli.doc_pages import as_run, without_what_differs
from tests.conftest import event

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "inspect.md"
WRITER = r"(?<=writer )[0-9a-f-]{36}"
TEN = 1_795_600_800_000_000  # 2026-11-25T10:00:00Z


def session(folder: Path) -> str:
    """The page with the output that its commands print now."""
    with Outbox(str(folder / "box"), flush_interval=3600.0) as outbox:
        for number in range(4):
            user = f"u-{number}" if number % 2 == 0 else None
            outbox.enqueue(event(number, scope_id="shop", user_id=user, occurred_at_micros=TEN + number * 1_000_000))
        members = {"event_key": "buy", "scope_id": "shop", "user_id": "u-1", "metadata_json": '{"cents":1999}'}
        outbox.enqueue(event(4, occurred_at_micros=TEN + 4_000_000, **members))
    return as_run(PAGE, folder)


def test_the_page_on_inspection_shows_what_the_commands_print(tmp_path: Path) -> None:
    """All of them, in their order."""
    said, printed = (without_what_differs(text) for text in (PAGE.read_text(), session(tmp_path)))
    assert re.sub(WRITER, "WRITER", said) == re.sub(WRITER, "WRITER", printed)
