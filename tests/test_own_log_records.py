"""A handler that stores log records in an outbox can leave out those that delivery causes."""

from __future__ import annotations

import logging
import logging.config
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

import pillarbox
from pillarbox import Outbox, SkipOwnLogRecords, TrackingEvent, is_own_log_record
from tests.conftest import event
from tests.sinks.http_server import CannedResponse, Server, always


class StoringHandler(logging.Handler):
    """Stores each record as an event."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self.outbox = outbox
        self.stored: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.stored.append(record.name)
        self.outbox.enqueue(TrackingEvent(event_key="log", scope_kind="Site", scope_id=record.name))


class KeepingHandler(logging.Handler):
    """Keeps each record."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record)


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger at DEBUG, without a handler that a test adds."""
    logger = logging.getLogger()
    before, level = logger.handlers[:], logger.level
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.setLevel(level)
    logger.handlers[:] = before


@pytest.mark.parametrize("deliver", ["thread", "process"])
def test_an_outbox_that_stores_its_own_log_does_not_feed_itself(
    deliver: Literal["thread", "process"], root: logging.Logger, tmp_path: Path
) -> None:
    """Each delivery over HTTP logs dozens of records at DEBUG; here the server also fails at first."""
    answers = iter([CannedResponse(503), CannedResponse(503)])
    with Server(lambda _request: next(answers, CannedResponse())) as server:
        outbox = Outbox(tmp_path / "box", sink=server.url(), flush_interval=0.01, deliver=deliver)
        handler = StoringHandler(outbox)
        handler.addFilter(SkipOwnLogRecords())
        root.addHandler(handler)
        everything = KeepingHandler()
        root.addHandler(everything)
        with outbox:
            logging.getLogger("application").info("an event of the application")
            threading.Thread(target=logging.getLogger("application.job").debug, args=("another",)).start()
            assert outbox.flush(60)
            assert outbox.stats().accepted == 2
    assert handler.stored == ["application", "application.job"]
    own = {record.name.partition(".")[0] for record in everything.seen if is_own_log_record(record)}
    assert own >= ({"pillarbox", "httpcore", "asyncio"} if deliver == "thread" else {"pillarbox"})


def test_the_filter_can_be_named_in_a_configuration(root: logging.Logger, tmp_path: Path) -> None:
    """`logging.config` creates it from its name."""
    path = tmp_path / "log"
    configuration = {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"not_pillarbox": {"()": "pillarbox.SkipOwnLogRecords"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(path), "filters": ["not_pillarbox"]}},
        "root": {"level": "DEBUG", "handlers": ["file"]},
    }
    with Server(always(CannedResponse())) as server:
        logging.config.dictConfig(configuration)
        outbox = Outbox(tmp_path / "box", sink=server.url())
        root.info("from the application")
        assert outbox.enqueue(event(1))
        assert outbox.flush(60)
        outbox.close()
    for handler in root.handlers[:]:
        handler.close()
    assert path.read_text() == "from the application\n"


def test_every_thread_of_the_package_is_told_from_an_applications() -> None:
    """Each thread is started with a name that begins with `pillarbox-`."""
    package = Path(pillarbox.__file__).parent
    for module in package.rglob("*.py"):
        for part in module.read_text().split("threads.Thread(")[1:]:
            arguments = part.partition(")\n")[0]
            named = (
                'name="pillarbox-' in arguments or "name=_RELAY_THREAD" in arguments or "name=self._thread_name" in arguments
            )
            assert named or module.parent.name == "cli", (module, arguments)
