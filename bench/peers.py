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
from bench.definitions import Column, Contestant, Goal, Section
from pillarbox import Outbox, TrackingEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from queue import Queue

    from bench.definitions import Figures, Round, RoundPaths
    from pillarbox.outcome import Durability

    Put = Callable[[], object]
    Open = Callable[[Path], AbstractContextManager["OpenStore"]]

ROUNDS = 4
SECONDS = 0.9  # at most, for each of the two loops
EVENTS = 100_000  # likewise
WARM_EVENTS, WARM_SECONDS = 500, 0.1  # before anything counts
CHUNK, CHUNK_SLOW = 100, 5  # events between two checks of the time; the SDKs also send 100 in one request
CLOSED_URL: Final = "http://127.0.0.1:9"  # the SDKs are not supposed to send
EVENT: Final = sample.event()
PROPERTIES: Final = {"path": "/a/b", "ms": 12}

encode = msgspec.json.Encoder().encode
now = timing.now


class OpenStore(NamedTuple):
    """An open store."""

    put: Put
    remove_queued: Callable[[], int] = (
        int  # called after each chunk, not timed: removes events as a consumer would; returns their number
    )


# Pillarbox and the baselines


@contextmanager
def pillarbox(folder: Path, durability: Durability = "process") -> Iterator[OpenStore]:
    with Outbox(str(folder), durability=durability) as outbox:
        yield OpenStore(partial(outbox.enqueue, EVENT))


@contextmanager
def encode_and_write(folder: Path) -> Iterator[OpenStore]:
    fd, write = os.open(folder / "events.ndjson", os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.write
    yield OpenStore(lambda: write(fd, encode(EVENT)))
    os.close(fd)


@contextmanager
def sqlite(folder: Path, synchronous: str) -> Iterator[OpenStore]:
    with closing(sqlite3.connect(folder / "events.db", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(f"PRAGMA synchronous = {synchronous}")
        database.execute("CREATE TABLE event (id INTEGER PRIMARY KEY, body BLOB NOT NULL)")
        execute = database.execute
        yield OpenStore(lambda: execute("INSERT INTO event (body) VALUES (?)", (encode(EVENT),)))


# Queues from PyPI


@contextmanager
def persist_queue_file(folder: Path) -> Iterator[OpenStore]:
    import persistqueue

    put = persistqueue.Queue(str(folder), tempdir=str(folder)).put
    yield OpenStore(lambda: put(encode(EVENT)))


@contextmanager
def persist_queue_sqlite(folder: Path) -> Iterator[OpenStore]:
    import persistqueue

    with closing(persistqueue.SQLiteQueue(str(folder), auto_commit=True)) as queue:
        put = queue.put
        yield OpenStore(lambda: put(encode(EVENT)))


@contextmanager
def diskcache_deque(folder: Path) -> Iterator[OpenStore]:
    import diskcache

    deque = diskcache.Deque(directory=str(folder))
    append = deque.append
    yield OpenStore(lambda: append(encode(EVENT)))
    deque.cache.close()


@contextmanager
def litequeue(folder: Path) -> Iterator[OpenStore]:
    import litequeue

    queue = litequeue.LiteQueue(str(folder / "queue.db"))
    put = queue.put
    yield OpenStore(lambda: put(encode(EVENT).decode()))
    queue.conn.close()


class _Msgspec:
    """The encoder for localqueue; Python's json, its default, is slower."""

    dumps = staticmethod(encode)
    loads = staticmethod(msgspec.json.decode)


@contextmanager
def localqueue(folder: Path, durability: str = "RELAXED") -> Iterator[OpenStore]:
    import localqueue

    mode = localqueue.DurabilityMode[durability]
    with localqueue.SimpleQueue(str(folder), durability=mode, serializer=_Msgspec()) as queue:
        yield OpenStore(partial(queue.put, EVENT))


@contextmanager
def sqloutbox(folder: Path) -> Iterator[OpenStore]:
    import sqloutbox

    outbox = sqloutbox.Outbox(folder / "outbox.db", "events")
    enqueue = outbox.enqueue
    yield OpenStore(lambda: enqueue("page_view", encode(EVENT)))
    outbox._write_conn.close()


@contextmanager
def logstash_async(folder: Path) -> Iterator[OpenStore]:
    from logstash_async.database import DatabaseCache

    add = DatabaseCache(str(folder / "cache.db")).add_event
    yield OpenStore(lambda: add(encode(EVENT).decode()))


# SDKs, in memory. They are created with send=False, so that no consumer runs; then send=True makes them fill their queue.


def remover(queue: Queue[object]) -> Callable[[], int]:
    def remove_queued() -> int:
        count = len(queue.queue)
        queue.queue.clear()
        return count

    return remove_queued


@contextmanager
def segment(_folder: Path) -> Iterator[OpenStore]:
    from segment.analytics.client import Client

    client = Client("key", host=CLOSED_URL, send=False)
    client.send = True
    properties = PROPERTIES | {"scope_kind": EVENT.scope_kind, "scope_id": EVENT.scope_id}
    yield OpenStore(partial(client.track, EVENT.user_id, EVENT.event_key, properties), remover(client.queue))


@contextmanager
def posthog(_folder: Path) -> Iterator[OpenStore]:
    from posthog import Posthog

    client = Posthog("key", host=CLOSED_URL, send=False)
    client.send = True
    properties = PROPERTIES | {"scope_kind": EVENT.scope_kind, "scope_id": EVENT.scope_id}
    put = partial(client.capture, EVENT.event_key, distinct_id=EVENT.user_id, properties=properties)
    yield OpenStore(put, remover(client.queue))


@contextmanager
def pillarbox_with_new_events(folder: Path) -> Iterator[OpenStore]:
    with Outbox(str(folder)) as outbox:
        enqueue = outbox.enqueue
        yield OpenStore(
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


def untimed(store: OpenStore, chunk: int, seconds: float, events: int) -> tuple[timing.Mean, int]:
    """The mean of calls made one after another, and their number."""
    put, wall, cpu, count = store.put, 0.0, 0.0, 0
    while wall < seconds * 1e6 and count < events:
        loop = timing.Stopwatch()
        for _ in range(chunk):
            put()
        spent = loop.mean(1)
        wall, cpu, count = wall + spent.wall, cpu + spent.cpu, count + chunk
        store.remove_queued()
    return timing.Mean(wall / count, cpu / count), count


def timed(store: OpenStore, chunk: int, seconds: float, events: int) -> list[int]:
    """The time of each call in nanoseconds."""
    call_times: list[int] = []
    put, until = store.put, now() + int(seconds * 1e9)
    while now() < until and len(call_times) < events:
        for _ in range(chunk):
            began = now()
            put()
            call_times.append(now() - began)
        store.remove_queued()
    return call_times


def round_of(open_store: Open, *, on_disk: bool = True) -> Callable[[RoundPaths], Figures]:
    """One round of a contestant."""

    def run(folder: RoundPaths) -> Figures:
        seconds, events = (SECONDS / 10, EVENTS // 50) if folder.quick else (SECONDS, EVENTS)
        with open_store(folder.own) as store:
            warm, until = 0, now() + int(WARM_SECONDS * 1e9)
            while warm < WARM_EVENTS and now() < until:
                store.put()
                warm += 1
            chunk = CHUNK if warm == WARM_EVENTS else CHUNK_SLOW
            if store.remove_queued() != (0 if on_disk else warm):
                raise AssertionError("not every call put its event into the queue")
            mean, count = untimed(store, chunk, seconds, events)
            call_times = timed(store, chunk, seconds, events)
        figures = dict(timing.figures(mean, call_times))
        if on_disk:
            stored, put = tree_bytes(folder.own), warm + count + len(call_times)
            if stored < put * len(encode(EVENT)):
                raise AssertionError(f"{put} events are not in {stored} bytes")
            figures["bytes"] = stored / put
        os.sync()  # so that the next contestant does not wait for the writeback of this one
        return figures

    return run


def fastest(others: tuple[Contestant, ...], pillarbox_name: str, metric: str) -> Callable[[Round], float]:
    """The lowest figure of the others, divided by ours. A slow call is made too rarely to have a p99."""

    def ratio(figures: Round) -> float:
        values = [figures[other.name][metric] for other in others if metric in figures[other.name]]
        if not values:
            raise KeyError(metric)
        return min(values) / figures[pillarbox_name][metric]

    return ratio


OURS, READY, MADE = "Pillarbox", "Pillarbox, event made beforehand", "Pillarbox, event made in the call"
FROM_PYPI: Final = (
    Contestant("persist-queue, files", round_of(persist_queue_file), ("persist-queue",)),
    Contestant("diskcache.Deque", round_of(diskcache_deque), ("diskcache",)),
    Contestant("litequeue", round_of(litequeue), ("litequeue",)),
    Contestant("localqueue", round_of(localqueue), ("localqueue",)),
    Contestant("sqloutbox", round_of(sqloutbox), ("sqloutbox",)),
)
SEGMENT = Contestant("Segment track(), in memory", round_of(segment, on_disk=False), ("segment-analytics-python",))
POSTHOG = Contestant("PostHog capture(), in memory", round_of(posthog, on_disk=False), ("posthog",))
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
        Contestant("encode + os.write", round_of(encode_and_write), ("msgspec",)),
        Contestant(OURS, round_of(pillarbox), ours=True),
        Contestant("sqlite3, WAL, NORMAL", round_of(partial(sqlite, synchronous="NORMAL"))),
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
        Contestant("Pillarbox, power", round_of(partial(pillarbox, durability="power")), ours=True),
        Contestant("sqlite3, WAL, FULL", round_of(partial(sqlite, synchronous="FULL"))),
        Contestant("persist-queue, SQLite", round_of(persist_queue_sqlite), ("persist-queue",)),
        Contestant("localqueue, DURABLE", round_of(partial(localqueue, durability="DURABLE")), ("localqueue",)),
        Contestant("python-logstash-async", round_of(logstash_async), ("python-logstash-async",)),
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
        Contestant(MADE, round_of(pillarbox_with_new_events), ours=True),
        Contestant(READY, round_of(pillarbox), ours=True),
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
