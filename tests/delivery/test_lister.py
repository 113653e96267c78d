"""A backlog that is listed in pages is delivered like one that is listed at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pillarbox.clock import SystemClock
from pillarbox.delivery.config import DeliveryConfig
from pillarbox.delivery.fetcher import BatchLister
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.dirscan import NamePage, NamePatterns
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.testing import RecordingSink
from tests.conftest import wait_until
from tests.delivery.worker_setup import QUICK_CONFIG, PoisonedSink, drain_worker, make_worker, remaining_files, seal_batch

PARTS = QUICK_CONFIG._replace(page_files=2)


@pytest.fixture
def outbox_dir(tmp_path: Path) -> Directory:
    directory = Directory(str(tmp_path / "outbox"), OsFilesystem(), SystemClock())
    directory.ensure_usable()
    return directory


def seal_files(outbox_dir: Directory, files: int) -> list[str]:
    """Seal so many files of one event each; returns their batch ids."""
    return [seal_batch(outbox_dir, stamp, b"%d" % stamp) for stamp in range(1, files + 1)]


def pages_of(backlog: BatchLister) -> list[list[str]]:
    """All pages, as batch ids."""
    found = [backlog.list_first_page(everything=False)]
    while backlog.has_more:
        found.append(backlog.list_next_page())
    return [list(map(layout.batch_id, names)) for names in found]


@pytest.mark.parametrize("files", range(7))
@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_each_page_begins_where_the_last_one_ended(outbox_dir: Directory, files: int, at_once: int) -> None:
    """Each name is listed once and in order, and there is a sync before each page."""
    batches, syncs = seal_files(outbox_dir, files), []
    backlog = BatchLister(outbox_dir, lambda: syncs.append(1), at_once)
    parts = pages_of(backlog)
    assert [batch for part in parts for batch in part] == batches
    assert all(len(part) <= at_once for part in parts)
    assert len(syncs) == (len(parts) if files else 0)
    assert list(map(layout.batch_id, backlog.list_first_page(everything=True))) == batches
    assert not backlog.has_more


def test_batches_sealed_after_the_scan_began_are_for_the_next_scan(outbox_dir: Directory) -> None:
    """So a scan ends, however fast batches are sealed."""
    batches = seal_files(outbox_dir, 3)
    backlog = BatchLister(outbox_dir, lambda: None, 2)
    first = backlog.list_first_page(everything=False)
    later = seal_batch(outbox_dir, 4, b"4")
    assert list(map(layout.batch_id, [*first, *backlog.list_next_page()])) == batches
    assert not backlog.has_more
    assert pages_of(backlog) == [batches[:2], [batches[2], later]]


def test_a_page_says_nothing_about_names_outside_it(outbox_dir: Directory) -> None:
    """The state of files outside the page is kept."""
    seal_files(outbox_dir, 5)
    names = outbox_dir.batch_names()
    backlog = BatchLister(outbox_dir, lambda: None, 2)
    assert [name for name in names if not backlog.is_outside_page(name)] == names
    backlog.list_first_page(everything=False)
    silent = [[name for name in names if backlog.is_outside_page(name)]]
    while backlog.has_more:
        backlog.list_next_page()
        silent.append([name for name in names if backlog.is_outside_page(name)])
    assert silent == [names[2:], [*names[:2], names[4]], names[:4]]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_of_a_plain_file_and_its_compressed_copy_the_plain_one_is_listed(outbox_dir: Directory, at_once: int) -> None:
    """Also if they would be on different pages."""
    batches = seal_files(outbox_dir, 3)
    for batch in batches:
        Path(outbox_dir.path_of(batch + layout.COMPRESSED_SUFFIX)).touch()
    backlog = BatchLister(outbox_dir, lambda: None, at_once)
    names = backlog.list_first_page(everything=False)
    while backlog.has_more:
        names += backlog.list_next_page()
    assert names == [batch + layout.SUFFIX for batch in batches]


def test_a_link_in_a_queue_does_not_count_before_the_fan_out_is_complete(outbox_dir: Directory) -> None:
    """It counts once the name in the outbox directory is deleted."""
    batches = seal_files(outbox_dir, 4)
    queue = outbox_dir.queue("a")
    queue.ensure_usable()
    for batch in batches:
        os.link(outbox_dir.path_of(batch + layout.SUFFIX), queue.path_of(batch + layout.SUFFIX))
    backlog = BatchLister(queue, lambda: None, 2)
    assert pages_of(backlog) == [[]]
    for batch in batches[:3]:
        outbox_dir.remove(batch + layout.SUFFIX)
    assert [batch for part in pages_of(backlog) for batch in part] == batches[:3]
    outbox_dir.remove(batches[3] + layout.SUFFIX)
    assert pages_of(backlog) == [batches[:2], batches[2:]]


@pytest.mark.parametrize("combines", [False, True])
@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_backlog_in_pages_is_delivered_in_order(outbox_dir: Directory, in_flight: int, combines: bool) -> None:
    """Completely and without duplicates."""
    seal_files(outbox_dir, 9)
    sink = RecordingSink()
    sink.capabilities = sink.capabilities._replace(combines_files=combines, concurrent=True)
    drain_worker(make_worker(outbox_dir, sink, config=PARTS._replace(max_in_flight=in_flight)))
    assert sink.payloads == [b"%d" % stamp for stamp in range(1, 10)]
    assert remaining_files(outbox_dir) == []


def test_files_that_cannot_be_sent_do_not_delay_later_pages(outbox_dir: Directory) -> None:
    """A whole page of files that are unreadable or locked by another process."""
    batches = seal_files(outbox_dir, 7)
    Path(outbox_dir.path).chmod(0o777)  # others may have planted a file with a second link
    for batch in batches[:2]:
        os.link(outbox_dir.path_of(batch + layout.SUFFIX), f"{outbox_dir.path}/{batch}.second")
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink, config=PARTS)
    drain_worker(worker)
    assert sink.calls == batches[2:]
    assert worker.state.name == "degraded"
    for batch in batches[:2]:
        os.unlink(f"{outbox_dir.path}/{batch}.second")
    drain_worker(make_worker(outbox_dir, sink, config=PARTS))
    assert sink.calls == [*batches[2:], *batches[:2]]


def test_a_rejected_batch_on_any_page_is_decided_after_another_is_accepted(outbox_dir: Directory) -> None:
    """It is deferred, and then the whole directory is listed."""
    batches = seal_files(outbox_dir, 3)
    seal_batch(outbox_dir, 4, b'"poison"')
    batches += [seal_batch(outbox_dir, stamp, b"%d" % stamp) for stamp in range(5, 9)]
    sink = PoisonedSink()
    worker = make_worker(outbox_dir, sink, config=PARTS)
    drain_worker(worker)
    assert worker.counters.dead == 1
    assert sorted(set(sink.payloads)) == sorted(b"%d" % stamp for stamp in (1, 2, 3, 5, 6, 7, 8))


class _FailingListing(OsFilesystem):
    """Lists the first page, and fails once at a later one."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = 0

    def first_names(self, path: str, patterns: NamePatterns, after: str = "", until: str = "", limit: int = 0) -> NamePage:
        if after and not self.failed:
            self.failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return super().first_names(path, patterns, after, until, limit)


def test_after_a_page_that_cannot_be_listed_a_new_scan_begins(outbox_dir: Directory) -> None:
    """No batch counts as delivered meanwhile."""
    batches = seal_files(outbox_dir, 5)
    filesystem = _FailingListing()
    sink = RecordingSink()
    drain_worker(make_worker(Directory(outbox_dir.path, filesystem, SystemClock()), sink, config=PARTS))
    assert filesystem.failed == 1
    assert sink.calls == batches


def test_a_worker_is_not_idle_while_the_next_page_cannot_be_listed(outbox_dir: Directory) -> None:
    """Even if no batch of the first page could be sent."""
    batches = seal_files(outbox_dir, 3)
    Path(outbox_dir.path).chmod(0o777)
    for batch in batches[:2]:
        os.link(outbox_dir.path_of(batch + layout.SUFFIX), f"{outbox_dir.path}/{batch}.second")
    filesystem = _FailingListing()
    sink = RecordingSink()
    worker = make_worker(Directory(outbox_dir.path, filesystem, SystemClock()), sink, config=PARTS)
    drain_worker(worker)
    wait_until(lambda: filesystem.failed == 1)
    assert sink.calls == [batches[2]]


def test_the_default_page_has_thousands_of_names() -> None:
    """So listings are rare, and the names take only a few MiB."""
    assert DeliveryConfig().page_files == 16_384
