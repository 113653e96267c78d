"""What the package logs is one line a record, whatever stands in the names, events and answers that it quotes."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pillarbox import Outbox, TrackingEvent
from pillarbox.delivery.process.protocol import LogLine
from pillarbox.delivery.process.supervisor import _log_child_line
from pillarbox.escaping import one_line, printable
from tests.conftest import wait_until
from tests.sinks.http_server import CannedResponse, Server, always

EVIL = "x\x1b[2J\nCRITICAL forged\r\u202e\x9b\udc80"


class Anything(msgspec.Struct):
    """An event with a field of any type."""

    event_id: str
    value: object = None


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """What a handler of the application writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("LOG %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    yield stream
    logging.getLogger().removeHandler(handler)


def check_lines(text: str) -> None:
    """Every line begins as the format says, or is an indented one of a traceback."""
    assert text
    for line in text.splitlines():
        assert line.isprintable()
        assert line.startswith(("LOG ", "  "))


def test_no_argument_of_a_log_line_begins_another_one(output: io.StringIO) -> None:
    """Texts, exceptions, objects, numbers; a number stays one."""
    log = logging.getLogger("pillarbox")
    for value in (EVIL, ValueError(EVIL), Path(f"/{EVIL}"), EVIL.encode(errors="replace"), {EVIL: EVIL}, None):
        log.warning("%s: %r failed", value, value)
    log.warning("%d of %g at %s", 5, 0.5, EVIL)
    log.warning("%(name)s", {"name": EVIL})
    log.warning(EVIL)  # as relayed from a child process
    check_lines(output.getvalue())
    assert "LOG WARNING 5 of 0.5 at x\\x1b[2J\\nCRITICAL forged" in output.getvalue()


def test_a_traceback_is_indented(output: io.StringIO) -> None:
    """The message of an exception may contain a line feed."""

    def fail() -> None:
        raise ValueError(EVIL) from KeyError(EVIL)

    try:
        fail()
    except ValueError:
        logging.getLogger("pillarbox").exception("%s: a defect", EVIL)
    check_lines(output.getvalue())
    assert "  ValueError: x" in output.getvalue()


def test_a_log_line_of_a_child_process_is_escaped(output: io.StringIO) -> None:
    """With its traceback."""
    _log_child_line(LogLine("pillarbox", logging.ERROR, EVIL, 0.0, f"Traceback\nValueError: {EVIL}"))
    check_lines(output.getvalue())


def test_an_outbox_logs_no_forged_line(output: io.StringIO, tmp_path: Path) -> None:
    """Its directory, a file in it, the key of an event and the answer of a server are all hostile."""
    name = EVIL.replace("\udc80", "").replace("/", "")
    box = tmp_path / name
    answer = CannedResponse(503, f"<title>{EVIL}</title>".encode(errors="replace"))
    with Server(always(answer)) as server:
        outbox = Outbox(str(box), sink=server.url(), event_type=Anything, flush_interval=0.05)
        (box / f"sealed-{name}.ndjson").symlink_to("/dev/null")
        os.mkfifo(box / f"active-{name}.ndjson")
        assert outbox.enqueue(Anything("1", {EVIL: {1, 2}})) is not None
        assert not outbox.enqueue(Anything("2", {EVIL: object()}))
        assert outbox.enqueue(Anything("3"))
        wait_until(lambda: outbox.stats().state.name == "waiting")
        outbox.close(1.0)
    (tmp_path / "file").write_text("")
    check_lines(output.getvalue())
    assert "forged" in output.getvalue()


def test_escaping_leaves_printable_text_alone() -> None:
    """And shows what it escapes."""
    assert printable("Größe ✓") == "Größe ✓"
    assert one_line("a\tb\nc\x7f") == "a\\tb\\nc\\x7f"
    assert printable("a\nb\x1b") == "a\nb\\x1b"


def test_an_event_of_the_default_type_is_logged_escaped_too(output: io.StringIO, tmp_path: Path) -> None:
    """The name of its class and of a field come from the application."""
    with Outbox(str(tmp_path / "box")) as outbox:
        assert not outbox.enqueue(msgspec.defstruct(f"Evil{EVIL}".encode("ascii", "replace").decode(), [("x", int)])(1))
        assert outbox.enqueue(TrackingEvent(event_key=EVIL[:5], scope_kind="s", scope_id="1"))
    check_lines(output.getvalue())
