"""Accepting one event per call, compared with queues on local disk and with analytics SDKs that queue in memory.

A contestant opens its store in a directory, returns a function that accepts one event, and closes the store. Encoding is part
of the call; a store that takes bytes or text gets them from the same encoder.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from bench import sample, timing
from bench.plan import Column, Contestant, Goal, Section
from pillarbox import Outbox, TrackingEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from queue import Queue

    from bench.plan import Figures, Round, RoundPaths
    from pillarbox.outcome import Durability

    Put = Callable[[], object]
    Open = Callable[[Path], AbstractContextManager["Opened"]]

ROUNDS = 4
SECONDS = 0.9  # at most, for each of the two loops
EVENTS = 100_000  # likewise
WARM_EVENTS, WARM_SECONDS = 500, 0.1  # before anything counts
CHUNK, CHUNK_SLOW = 100, 5  # events between two looks at the clock; 100 is also what the SDKs send in one request
NOBODY: Final = "http://127.0.0.1:9"  # where the SDKs would send to, if they sent
ONE: Final = sample.event()
PROPERTIES: Final = {"path": "/a/b", "ms": 12}

encode = msgspec.json.Encoder().encode
now = timing.now


class Opened(NamedTuple):
    """A store that accepts events."""

    put: Put
    take: Callable[[], int] = int  # after each CHUNK, unmeasured: what a consumer would take away; returns how many


# What others are measured against


@contextmanager
def pillarbox(folder: Path, durability: Durability = "process") -> Iterator[Opened]:
    with Outbox(str(folder), durability=durability) as outbox:
        yield Opened(partial(outbox.enqueue, ONE))


@contextmanager
def floor(folder: Path) -> Iterator[Opened]:
    fd, write = os.open(folder / "events.ndjson", os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.write
    yield Opened(lambda: write(fd, encode(ONE)))
    os.close(fd)


@contextmanager
def sqlite(folder: Path, synchronous: str) -> Iterator[Opened]:
    with closing(sqlite3.connect(folder / "events.db", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(f"PRAGMA synchronous = {synchronous}")
        database.execute("CREATE TABLE event (id INTEGER PRIMARY KEY, body BLOB NOT NULL)")
        execute = database.execute
        yield Opened(lambda: execute("INSERT INTO event (body) VALUES (?)", (encode(ONE),)))


# Queues from PyPI


@contextmanager
def persist_queue_file(folder: Path) -> Iterator[Opened]:
    import persistqueue

    put = persistqueue.Queue(str(folder), tempdir=str(folder)).put
    yield Opened(lambda: put(encode(ONE)))


@contextmanager
def persist_queue_sqlite(folder: Path) -> Iterator[Opened]:
    import persistqueue

    with closing(persistqueue.SQLiteQueue(str(folder), auto_commit=True)) as queue:
        put = queue.put
        yield Opened(lambda: put(encode(ONE)))


@contextmanager
def diskcache_deque(folder: Path) -> Iterator[Opened]:
    import diskcache

    deque = diskcache.Deque(directory=str(folder))
    append = deque.append
    yield Opened(lambda: append(encode(ONE)))
    deque.cache.close()


@contextmanager
def litequeue(folder: Path) -> Iterator[Opened]:
    import litequeue

    queue = litequeue.LiteQueue(str(folder / "queue.db"))
    put = queue.put
    yield Opened(lambda: put(encode(ONE).decode()))
    queue.conn.close()


class _Msgspec:
    """The encoder for localqueue; Python's json, its default, is slower."""

    dumps = staticmethod(encode)
    loads = staticmethod(msgspec.json.decode)


@contextmanager
def localqueue(folder: Path, durability: str = "RELAXED") -> Iterator[Opened]:
    import localqueue

    mode = localqueue.DurabilityMode[durability]
    with localqueue.SimpleQueue(str(folder), durability=mode, serializer=_Msgspec()) as queue:
        yield Opened(partial(queue.put, ONE))


@contextmanager
def sqloutbox(folder: Path) -> Iterator[Opened]:
    import sqloutbox

    outbox = sqloutbox.Outbox(folder / "outbox.db", "events")
    enqueue = outbox.enqueue
    yield Opened(lambda: enqueue("page_view", encode(ONE)))
    outbox._write_conn.close()


@contextmanager
def logstash_async(folder: Path) -> Iterator[Opened]:
    from logstash_async.database import DatabaseCache

    add = DatabaseCache(str(folder / "cache.db")).add_event
    yield Opened(lambda: add(encode(ONE).decode()))


# SDKs, in memory. They are made not to send, so that no consumer runs; then told that they do, so that they fill their queue.


def taking(queue: Queue[object]) -> Callable[[], int]:
    def take() -> int:
        count = len(queue.queue)
        queue.queue.clear()
        return count

    return take


@contextmanager
def segment(_place: Path) -> Iterator[Opened]:
    from segment.analytics.client import Client

    client = Client("key", host=NOBODY, send=False)
    client.send = True
    properties = PROPERTIES | {"scope_kind": ONE.scope_kind, "scope_id": ONE.scope_id}
    yield Opened(partial(client.track, ONE.user_id, ONE.event_key, properties), taking(client.queue))


@contextmanager
def posthog(_place: Path) -> Iterator[Opened]:
    from posthog import Posthog

    client = Posthog("key", host=NOBODY, send=False)
    client.send = True
    properties = PROPERTIES | {"scope_kind": ONE.scope_kind, "scope_id": ONE.scope_id}
    put = partial(client.capture, ONE.event_key, distinct_id=ONE.user_id, properties=properties)
    yield Opened(put, taking(client.queue))


@contextmanager
def made_in_the_call(folder: Path) -> Iterator[Opened]:
    with Outbox(str(folder)) as outbox:
        enqueue = outbox.enqueue
        yield Opened(
            lambda: enqueue(
                TrackingEvent(
                    event_key="page_view",
                    scope_kind="Site",
                    scope_id="site-1",
                    user_id="user-12345",
                    metadata_json=encode(PROPERTIES).decode(),
                )
            )
        )


# Measuring


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def untimed(opened: Opened, chunk: int, seconds: float, events: int) -> tuple[timing.Mean, int]:
    """The mean of calls made one after another, and their number."""
    put, wall, cpu, count = opened.put, 0.0, 0.0, 0
    while wall < seconds * 1e6 and count < events:
        loop = timing.Stopwatch()
        for _ in range(chunk):
            put()
        spent = loop.mean(1)
        wall, cpu, count = wall + spent.wall, cpu + spent.cpu, count + chunk
        opened.take()
    return timing.Mean(wall / count, cpu / count), count


def timed(opened: Opened, chunk: int, seconds: float, events: int) -> list[int]:
    """The time of each call in nanoseconds."""
    took: list[int] = []
    put, until = opened.put, now() + int(seconds * 1e9)
    while now() < until and len(took) < events:
        for _ in range(chunk):
            began = now()
            put()
            took.append(now() - began)
        opened.take()
    return took


def accepting(opening: Open, *, on_disk: bool = True) -> Callable[[RoundPaths], Figures]:
    """One round of a contestant."""

    def run(folder: RoundPaths) -> Figures:
        seconds, events = (SECONDS / 10, EVENTS // 50) if folder.quick else (SECONDS, EVENTS)
        with opening(folder.own) as opened:
            warm, until = 0, now() + int(WARM_SECONDS * 1e9)
            while warm < WARM_EVENTS and now() < until:
                opened.put()
                warm += 1
            chunk = CHUNK if warm == WARM_EVENTS else CHUNK_SLOW
            if opened.take() != (0 if on_disk else warm):
                raise AssertionError("not every call put its event into the queue")
            mean, count = untimed(opened, chunk, seconds, events)
            took = timed(opened, chunk, seconds, events)
        figures = dict(timing.figures(mean, took))
        if on_disk:
            stored, put = tree_bytes(folder.own), warm + count + len(took)
            if stored < put * len(encode(ONE)):
                raise AssertionError(f"{put} events are not in {stored} bytes")
            figures["bytes"] = stored / put
        os.sync()  # the next contestant's syncs are not to wait for what this one leaves to be written
        return figures

    return run


def fastest(others: tuple[Contestant, ...], ours: str, metric: str) -> Callable[[Round], float]:
    """The lowest figure of the others, divided by ours. A call that is too slow to be made often has no p99."""

    def ratio(found: Round) -> float:
        theirs = [found[other.name][metric] for other in others if metric in found[other.name]]
        if not theirs:
            raise KeyError(metric)
        return min(theirs) / found[ours][metric]

    return ratio


OURS, READY, MADE = "Pillarbox", "Pillarbox, event made beforehand", "Pillarbox, event made in the call"
FROM_PYPI: Final = (
    Contestant("persist-queue, files", accepting(persist_queue_file), ("persist-queue",)),
    Contestant("diskcache.Deque", accepting(diskcache_deque), ("diskcache",)),
    Contestant("litequeue", accepting(litequeue), ("litequeue",)),
    Contestant("localqueue", accepting(localqueue), ("localqueue",)),
    Contestant("sqloutbox", accepting(sqloutbox), ("sqloutbox",)),
)
SEGMENT = Contestant("Segment track(), in memory", accepting(segment, on_disk=False), ("segment-analytics-python",))
POSTHOG = Contestant("PostHog capture(), in memory", accepting(posthog, on_disk=False), ("posthog",))
LATENCIES: Final = (
    Column("mean_us", "mean, us", 2),
    Column("median_us", "median, us", 2),
    Column("p99_us", "p99, us", 1),
    Column("p999_us", "p99.9, us", 1),
    Column("cpu_s", "CPU, s per million", 2),
)
BYTES = Column("bytes", "bytes per event", 0)

QUEUES = Section(
    key="queues",
    title="Accepting one event, compared with other queues on local disk",
    about=(
        "One thread, one event per call. Each call encodes the same event (281 bytes of JSON, the same encoder for all) "
        "and returns when the event survives a kill of the process at any moment. All of these queues promise that and "
        "not more: counted with strace, none syncs each event. persist-queue flushes its files after each event and syncs "
        "them after every hundred; diskcache.Deque, litequeue, localqueue (with its default DurabilityMode.RELAXED) and "
        "sqloutbox use SQLite in WAL mode with synchronous=NORMAL, which syncs at checkpoints. All have their default "
        "settings; localqueue gets the common encoder instead of Python's json. The mean is from calls made one after "
        "another, the percentiles from calls that are timed one by one; both loops end after 0.9 seconds or 100,000 "
        "events. Pillarbox seals its files meanwhile. Bytes are the size of the directory after the queue is closed."
    ),
    rounds=ROUNDS,
    contestants=(
        Contestant("encode + os.write", accepting(floor), ("msgspec",)),
        Contestant(OURS, accepting(pillarbox), ours=True),
        Contestant("sqlite3, WAL, NORMAL", accepting(partial(sqlite, synchronous="NORMAL"))),
        *FROM_PYPI,
    ),
    columns=(*LATENCIES, BYTES),
    goals=tuple(
        Goal(
            f"{name} of the fastest queue from PyPI, relative to Pillarbox",
            fastest(FROM_PYPI, OURS, metric),
            bound,
            at_least=True,
        )
        for name, metric, bound in (("median", "median_us", 5), ("p99", "p99_us", 20))
    ),
    chart="median_us",
    budget_s=110,
)

SYNCED = Section(
    key="synced",
    title="Accepting one event and syncing it, compared with other queues on local disk",
    about=(
        "As above, but each call returns when its event also survives a power loss: counted with strace, each of these "
        "syncs at least once per event. persist-queue's SQLite queue and plain sqlite3 use WAL with synchronous=FULL, as "
        "does localqueue with DurabilityMode.DURABLE; python-logstash-async's database has a rollback journal and is "
        "opened for each event, by a thread that logging does not wait for. All of them wait for the disk, so none is "
        "faster than the disk. Another section measures syncs that callers share."
    ),
    rounds=ROUNDS,
    contestants=(
        Contestant("Pillarbox, power", accepting(partial(pillarbox, durability="power")), ours=True),
        Contestant("sqlite3, WAL, FULL", accepting(partial(sqlite, synchronous="FULL"))),
        Contestant("persist-queue, SQLite", accepting(persist_queue_sqlite), ("persist-queue",)),
        Contestant("localqueue, DURABLE", accepting(partial(localqueue, durability="DURABLE")), ("localqueue",)),
        Contestant("python-logstash-async", accepting(logstash_async), ("python-logstash-async",)),
    ),
    columns=(*LATENCIES, BYTES),
    chart="median_us",
    budget_s=80,
)

TRACKING = Section(
    key="tracking",
    title="Accepting one event, compared with analytics SDKs that keep it in memory",
    about=(
        "One thread, one event per call: the same user, name, scope and properties. The SDKs only put the event into "
        "their queue in memory: their consumers, which would encode and send it in a thread of the same process, do not "
        "run, and the queue is emptied outside of the measured time. Pillarbox has the event in a file when the call "
        "returns, and seals its files meanwhile. It is measured twice: with an event that the call makes from the same "
        "arguments, including id and time, as the SDKs do; and with an event that was made beforehand, as in the other "
        "sections."
    ),
    rounds=ROUNDS,
    contestants=(
        Contestant(MADE, accepting(made_in_the_call), ours=True),
        Contestant(READY, accepting(pillarbox), ours=True),
        SEGMENT,
        POSTHOG,
    ),
    columns=LATENCIES,
    goals=tuple(
        Goal(f"mean of {peer.name}, relative to Pillarbox with {what}", fastest((peer,), ours, "mean_us"), bound, at_least=True)
        for what, ours in (("an event made in the call", MADE), ("an event made beforehand", READY))
        for peer, bound in ((SEGMENT, 5), (POSTHOG, 20))
    ),
    chart="mean_us",
    budget_s=60,
)
SECTIONS: Final = (QUEUES, SYNCED, TRACKING)
