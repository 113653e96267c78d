"""docs/how-to/dead-letters.md shows the current output of its commands."""

from __future__ import annotations

from pathlib import Path

from pillarbox.store import record
from tests.admin.prepared_outboxes import event_json, seal_batch
from tests.cli.doc_pages import normalized, page_with_current_output
from tests.cli.test_commands import run

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "dead-letters.md"


def current_page(folder: Path) -> str:
    """The page with the current output of its commands."""
    box = folder / "box"
    dead = [event_json(1, 17), event_json(2, 17), event_json(3, 5, key="refund")]
    torn = record.line(event_json(5))[:-9]
    changed = record.line(event_json(4)).replace(b'"scope_id":"s"', b'"scope_id":"z"')
    seal_batch(box, *map(record.line, dead), changed, b"\0" * 20 + record.line(event_json(6))[30:], torn)
    run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=folder)
    return page_with_current_output(PAGE, folder)


def test_the_dead_letters_page_shows_the_current_output(tmp_path: Path) -> None:
    """All console blocks are run, in the order of the page."""
    assert normalized(PAGE.read_text()) == normalized(current_page(tmp_path))
