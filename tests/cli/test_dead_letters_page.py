"""docs/how-to/dead-letters.md: its commands run and print what the page shows."""

from __future__ import annotations

from pathlib import Path

from pillarbox.store import record
from tests.admin.prepared_outboxes import event_json, seal_batch
from tests.cli.doc_pages import as_run, without_what_differs
from tests.cli.test_commands import run

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "dead-letters.md"


def session(folder: Path) -> str:
    """The page with the output that its commands print now."""
    box = folder / "box"
    dead = [event_json(1, 17), event_json(2, 17), event_json(3, 5, key="refund")]
    torn = record.line(event_json(5))[:-9]
    changed = record.line(event_json(4)).replace(b'"scope_id":"s"', b'"scope_id":"z"')
    seal_batch(box, *map(record.line, dead), changed, b"\0" * 20 + record.line(event_json(6))[30:], torn)
    run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=folder)
    return as_run(PAGE, folder)


def test_the_page_on_dead_letters_shows_what_the_commands_print(tmp_path: Path) -> None:
    """All of them, in their order."""
    assert without_what_differs(PAGE.read_text()) == without_what_differs(session(tmp_path))
