"""`pillarbox sinks`, and the other commands on a directory with several sinks: real processes, files and servers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from pillarbox.store import layout
from pillarbox.store.queue_changes import request_queue
from tests.cli.test_commands import CLEAN, NO_SEAL_BY_AGE, PILLARBOX, delivered_event_ids, event_line, run
from tests.conftest import wait_until
from tests.delivery.fanout_setup import balanced_totals, batch_files, enqueue_files, open_directory, reject_poison
from tests.sinks.http_server import CannedResponse, Server, always, closed_port_url


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "box"


def output_of(folder: Path, *words: object, code: int = 0, environ: dict[str, str] | None = None) -> str:
    """The standard output of a command, or its standard error without line wrapping if it fails."""
    completed = run(*words, cwd=folder, environ=environ)
    assert completed.returncode == code, (completed.stdout, completed.stderr)
    text = (completed.stderr if code else completed.stdout).decode()
    return " ".join(line.strip(" │╭╮╰╯─") for line in text.splitlines()) if code else text


def fill_queues(box: Path, *sinks: str, files: int = 2) -> None:
    """Create a directory with pending files for sinks that are all down and have been tried."""
    with Outbox(str(box), sinks=dict.fromkeys(sinks, closed_port_url())) as outbox:
        enqueue_files(outbox, files)
        wait_until(lambda: not batch_files(box) and all(len(batch_files(box / f"sink-{sink}")) == files for sink in sinks))
        wait_until(lambda: {sink.state.name for sink in outbox.stats().sinks.values()} == {"waiting"})


def test_list_shows_the_queue_of_each_sink(box: Path) -> None:
    """As a table and as JSON, also a requested queue. A directory with a single sink has none."""
    folder = box.parent
    run("enqueue", "-d", "plain", cwd=folder, stdin=event_line(1))
    assert output_of(folder, "sinks", "list", "-d", "plain") == "no queues: this outbox has no more than one sink\n"
    assert json.loads(output_of(folder, "sinks", "list", "-d", "plain", "--json")) == []
    fill_queues(box, "live", "warehouse")
    output_of(folder, "sinks", "add", "third", "-d", "box")
    head, *rows = output_of(folder, "sinks", "list", "-d", "box").splitlines()
    assert head.split() == ["sink", "pending", "bytes", "dead", "quarantined", "state"]
    assert [row.split()[0] for row in rows] == ["live", "warehouse", "third"]
    assert rows[2].endswith("requested; will start with the current backlog")
    assert "waiting: cannot connect to" in rows[0]
    live, _, third = json.loads(output_of(folder, "sinks", "list", "-d", "box", "--json"))
    size = sum(file.stat().st_size for file in (box / "sink-live").glob("sealed-*"))
    counts = {"sealed_files": 2, "sealed_bytes": size, "dead_files": 0, "quarantine_files": 0, "delivered_files": 0}
    assert live == {"sink": "live", **counts, "state": live["state"], "requested": False}
    assert third == {"sink": "third", **dict.fromkeys(counts, 0), "state": "", "requested": True}


def test_an_impossible_change_is_rejected(box: Path) -> None:
    """The message says what to do, and nothing changes."""
    folder = box.parent
    fill_queues(box, "live", "warehouse")
    request_queue(open_directory(box), "third")
    before = sorted(str(path) for path in box.rglob("*"))
    error_messages = {
        ("add", "live"): "live already has a queue",
        ("add", "No_Name"): "'No_Name' is not a name; use 1 to 32 of the characters a-z, 0-9, _ and -",
        ("remove", "lvie"): "lvie has no queue here; the queues are: live, warehouse",
        ("remove", "live"): "live has 2 batches pending; give --discard to delete them",
        (
            "remove",
            "live",
            "--return-batches",
        ): "--return-batches is for the last sink; the queues of other sinks have these batches too",
        ("rename", "live", "third"): "third already has a queue, or a request for one",
        ("rename", "live", "../live"): "'../live' is not a name",
        ("rename", "gone", "new"): "gone has no queue here",
    }
    for words, text in error_messages.items():
        assert text in output_of(folder, "sinks", *words, "-d", "box", code=2)
    assert sorted(str(path) for path in box.rglob("*")) == before
    assert "box/nothing: cannot be listed" in output_of(folder, "sinks", "list", "-d", "box/nothing", code=2)
    assert not (box / "nothing").exists()


def test_a_queue_with_dead_letters_is_not_removed(box: Path) -> None:
    """The message counts them and names the commands that repair or purge them."""
    fill_queues(box, "live", files=1)
    text = output_of(box.parent, "sinks", "remove", "live", "-d", "box", code=2)
    assert "live has 1 batch pending; give --discard to delete them, or --return-batches to return them to the outbox" in text
    (box / "sink-live" / layout.dead_name("sealed-x")).write_bytes(b"{}\n")
    text = output_of(box.parent, "sinks", "remove", "live", "--discard", "-d", "box", code=2)
    assert (
        "1 file of dead letters, 0 files of quarantine; replay, repair or purge them first: pillarbox dead list -d box/sink-live"
        in text
    )
    assert "dead-sealed-x.ndjson, line 1" in output_of(box.parent, "dead", "list", "-d", "box/sink-live", code=1)
    assert len(batch_files(box / "sink-live")) == 1


def test_a_request_for_a_queue_can_be_cancelled(box: Path) -> None:
    """It can be made and cancelled again; without a request, the command fails."""
    folder = box.parent
    fill_queues(box, "live")
    for _ in range(2):
        output_of(folder, "sinks", "add", "third", "-d", "box")
        assert output_of(folder, "sinks", "remove", "third", "-d", "box") == "request for third cancelled\n"
        assert not (box / "sink-third.adding").exists()
    assert "third has no queue here" in output_of(folder, "sinks", "remove", "third", "-d", "box", code=2)


def test_an_interrupted_removal_of_a_queue_is_completed_later(box: Path) -> None:
    """Its files are not counted. The next removal or the delivery worker deletes them."""
    folder = box.parent
    fill_queues(box, "live", "old")
    usage = open_directory(box).disk_usage()
    (box / "sink-old").rename(box / "sink-old.removing")
    assert open_directory(box).disk_usage() == usage
    assert [queue["sink"] for queue in json.loads(output_of(folder, "sinks", "list", "-d", "box", "--json"))] == ["live"]
    with Outbox(str(box), sinks={"live": closed_port_url(), "old": closed_port_url()}) as outbox:
        wait_until((box / "sink-old").exists)
        wait_until(lambda: not (box / "sink-old.removing").exists())
        enqueue_files(outbox, 1)
        wait_until(lambda: len(batch_files(box / "sink-old")) == 1)
    (box / "sink-old.removing").mkdir()
    (box / "sink-old.removing" / "sealed-y.ndjson").write_bytes(b"")
    assert output_of(folder, "sinks", "remove", "old", "--discard", "-d", "box") == "removed old; 1 batch deleted\n"
    assert sorted(path.name for path in box.glob("sink-*")) == ["sink-live"]


@pytest.fixture
def delivering(box: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`pillarbox deliver` to the sinks `live` and `warehouse`."""
    box.mkdir(mode=0o700)
    sinks = ["--sink", f"live={closed_port_url()}", "--sink", "warehouse=sqlite:///w.db"]
    command = [*PILLARBOX, "deliver", "-d", "box", *sinks]
    process = subprocess.Popen(command, cwd=box.parent, env=CLEAN, stderr=subprocess.PIPE)
    lock = box / "sink-live" / "deliver.lock"
    try:
        wait_until(lambda: lock.exists() and lock.stat().st_size > 0)  # the worker has the lock and wrote its first heartbeat
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_queue_with_a_delivery_worker_cannot_be_removed_or_renamed(box: Path, delivering: subprocess.Popen[bytes]) -> None:
    """The message says what to do; afterwards, the command succeeds."""
    folder = box.parent
    remedy = "a process delivers box/sink-live: stop it, or restart it without live among its sinks"
    for words in (["remove", "live", "--discard"], ["rename", "live", "new"]):
        assert remedy in output_of(folder, "sinks", *words, "-d", "box", code=2)
    assert "a process delivers box: " in output_of(folder, "sinks", "remove", "live", "--return-batches", "-d", "box", code=2)
    delivering.terminate()
    assert delivering.wait(60) == 0
    assert output_of(folder, "sinks", "rename", "live", "new", "-d", "box") == "renamed live to new\n"
    assert output_of(folder, "sinks", "remove", "new", "-d", "box") == "removed new\n"


def test_several_sinks_can_be_set_wherever_settings_can(tmp_path: Path) -> None:
    """Options win over the environment, and that over TOML, whether they name one sink or several."""
    two = {"a": "sqlite:///a.db", "b": "sqlite:///b.db"}
    (tmp_path / "p.toml").write_text(
        '[outbox]\ndirectory = "box"\n[outbox.sinks]\na = "sqlite:///a.db"\nb = "sqlite:///b.db"\n'
    )
    options = [word for name, url in two.items() for word in ("--sink", f"{name}={url}")]
    several = {"PILLARBOX_SINKS": " ".join(f"{name}={url}" for name, url in two.items())}
    single = {"PILLARBOX_SINK": "sqlite:///single.db"}
    variants: list[tuple[list[str], dict[str, str]]] = [
        (["-d", "box", *options], {}),
        (["-d", "box"], several),
        (["-c", "p.toml"], {}),
        (["-d", "box", *options], single),
    ]
    for number, (words, environ) in enumerate(variants):
        run("enqueue", "-d", "box", cwd=tmp_path, stdin=event_line(number))
        completed = run("deliver", *words, "--once", cwd=tmp_path, environ=environ)
        assert (completed.returncode, completed.stdout[:11]) == (0, b"delivered 2"), completed.stderr
        assert (
            delivered_event_ids(tmp_path / "a.db")
            == delivered_event_ids(tmp_path / "b.db")
            == [f"e-{event_number:06d}" for event_number in range(number + 1)]
        )
    run("enqueue", "-d", "one", cwd=tmp_path, stdin=event_line(1))
    run("deliver", "-c", "p.toml", "-d", "one", "--once", cwd=tmp_path, environ=single)
    assert delivered_event_ids(tmp_path / "single.db") == ["e-000001"]
    assert not (tmp_path / "one" / "sink-a").exists()
    assert "sinks" in output_of(tmp_path, "deliver", "-d", "box", code=2, environ=single | several)


@pytest.mark.parametrize(
    ("sinks", "text"),
    [
        (["a=sqlite:///a.db", "sqlite:///b.db"], "give each sink a different name: --sink NAME=URL --sink NAME=URL"),
        (["sqlite:///a.db", "sqlite:///b.db"], "give each sink a name: --sink NAME=URL --sink NAME=URL"),
        (["a=sqlite:///a.db", "a=sqlite:///b.db"], "give each sink a different name: --sink NAME=URL --sink NAME=URL"),
        (["A=sqlite:///a.db"], "'A' is not a name; use 1 to 32 of the characters a-z, 0-9, _ and -"),
        (["a="], "give 'a' a URL, as in a=URL"),
        (["a=nonsense://host/"], "nonsense"),
    ],
)
def test_invalid_sinks_are_rejected(tmp_path: Path, sinks: list[str], text: str) -> None:
    """Before any file is created."""
    words = [word for sink in sinks for word in ("--sink", sink)]
    assert text in output_of(tmp_path, "deliver", "-d", "box", *words, "--once", code=2)
    assert not list((tmp_path / "box").glob("sink-*"))


def test_passwords_in_urls_are_in_no_file_and_no_output(box: Path) -> None:
    """Heartbeats, ledgers, logs, states and errors."""
    secret = "hush-hush"  # noqa: S105 - not a real password
    with Server() as server:
        url, down = server.url(user=f"user:{secret}@"), closed_port_url().replace("//", f"//user:{secret}@")
        run("enqueue", "-d", "box", cwd=box.parent, stdin=b"".join(map(event_line, range(5))))
        options = ["--sink", f"live={url}", "--sink", f"down={down}"]
        completed = run("deliver", "-d", "box", *options, "--once", "--timeout", "5", cwd=box.parent)
        assert completed.returncode == 1
        assert len(server.requests) > 0
    texts = [completed.stdout, completed.stderr]
    for words in (["status"], ["status", "--json"], ["sinks", "list"], ["verify", "--json"], ["doctor", *options]):
        completed = run(*words, "-d", "box", cwd=box.parent)
        texts += [completed.stdout, completed.stderr]
    files = [path.read_bytes() for path in box.rglob("*") if path.is_file()]
    assert b"127.0.0.1" in b"".join(files)
    assert not [text for text in texts + files if secret.encode() in text]


def test_read_only_commands_show_all_queues(box: Path) -> None:
    """Status, verify, doctor and inspect, for the directory and for a single queue."""
    folder = box.parent
    fill_queues(box, "live", "warehouse")
    status = json.loads(output_of(folder, "status", "-d", "box", "--json"))
    assert [(sink["name"], sink["backlog_files"]) for sink in status["sinks"]] == [("live", 2), ("warehouse", 2)]
    assert status["pending_files"] == 2
    assert "sink live" in output_of(folder, "status", "-d", "box")
    assert [line.partition(" = ")[0] for line in output_of(folder, "verify", "-d", "box").splitlines()] == [
        "balanced: accepted 20",
        "live: balanced: accepted 20",
        "warehouse: balanced: accepted 20",
    ]
    whole: dict[str, Any] = json.loads(output_of(folder, "verify", "-d", "box", "--json"))
    assert {name: sink["reconciliation"]["total"]["pending"] for name, sink in whole["sinks"].items()} == {
        "live": 20,
        "warehouse": 20,
    }
    for path in ("box/sink-live", str(box / "sink-live")):
        assert output_of(folder, "verify", "-d", path).startswith("balanced: accepted 20 = delivered 0 + pending 20")
        assert "pending       2 files, " in output_of(folder, "status", "-d", path)
        assert output_of(folder, "inspect", "e-000003", "-d", path).startswith("e-000003: pending, in ")
        assert output_of(folder, "export", "-d", path, "-q").count("\n") == 20
    doctor = run("doctor", "-d", "box", "--sink", "live=sqlite:///live.db", cwd=folder).stdout.decode()
    assert "sink-warehouse belongs to no sink of the settings, 2 batches pending" in doctor
    assert "pillarbox sinks remove warehouse" in doctor
    assert "destination: live: " in doctor
    assert "hard link: can be created, and is counted" in doctor


def test_a_single_queue_can_be_delivered(box: Path) -> None:
    """Its pending events arrive in order, and the other queues do not change."""
    fill_queues(box, "live", "warehouse")
    completed = run("deliver", "-d", "box/sink-live", "--sink", "sqlite:///live.db", "--once", cwd=box.parent)
    assert (completed.returncode, completed.stdout[:12]) == (0, b"delivered 20"), completed.stderr
    assert len(delivered_event_ids(box.parent / "live.db")) == 20
    assert (len(batch_files(box / "sink-live")), len(batch_files(box / "sink-warehouse"))) == (0, 2)
    balanced_totals(box)


@pytest.fixture
def with_rejections(box: Path) -> Iterator[tuple[Outbox, Server, Server]]:
    """An outbox that goes on delivering. `live` rejected two events, and both queues have damaged bytes in quarantine."""
    with Server(reject_poison) as live, Server() as warehouse:
        sinks = {"live": live.url(), "warehouse": warehouse.url()}
        with Outbox(str(box), sinks=sinks, flush_interval=0.05) as outbox:
            enqueue_files(outbox, 1, 2, event_key="poison")
            enqueue_files(outbox, 1, 10, first=2)
            assert outbox.flush(60)
            (box / "sealed-1700000000000000-x.ndjson.tmp").write_bytes(b'{"bad\n')
            os.rename(box / "sealed-1700000000000000-x.ndjson.tmp", box / "sealed-1700000000000000-x.ndjson")
            wait_until(lambda: outbox.stats().quarantined == 2)
            wait_until(lambda: not open_directory(box).waiting_batch_ids())  # commands do not change records of pending batches
            assert {queue.disk_usage().corrupt_files for queue in open_directory(box).queues()} == {1}
            yield outbox, live, warehouse


def test_dead_letters_of_all_sinks_are_listed_with_the_queue_to_choose(
    box: Path, with_rejections: tuple[Outbox, Server, Server]
) -> None:
    """By kind, one by one, in full and as JSON. A command that changes them must name the queue."""
    folder = box.parent
    listed = output_of(folder, "dead", "list", "-d", "box")
    assert f"live: {with_rejections[1].url()}" in listed
    assert listed.splitlines()[2:] == ["2 dead letters in 1 file", "to change those of live: -d box/sink-live"]
    each = output_of(folder, "dead", "list", "--each", "-d", "box").splitlines()
    assert (each[0].split()[0], each[1].split()[0]) == ("sink", "live")
    answer = json.loads(output_of(folder, "dead", "list", "--each", "--json", "-d", "box"))
    assert [(item["queue"], item["event_id"]) for item in answer["items"]] == [("live", "e-000000"), ("live", "e-000001")]
    (group,) = json.loads(output_of(folder, "dead", "list", "--json", "-d", "box"))["groups"]
    assert (group["queue"], group["count"]) == ("live", 2)
    assert "rejected by live: http" in output_of(folder, "dead", "show", "-d", "box")
    for words in (["replay"], ["purge"], ["edit", "--set", "event_key=click"], ["edit"]):
        text = output_of(folder, "dead", *words, "--all", "--yes", "-d", "box", code=2)
        assert "choose one sink: -d box/sink-live" in text
    assert "no dead letter matches" in output_of(folder, "dead", "show", "-d", "box/sink-warehouse")


def test_quarantine_of_all_sinks_is_listed_and_purged_for_one(
    box: Path, with_rejections: tuple[Outbox, Server, Server]
) -> None:
    """Each queue has its own copy of the damaged bytes, and deletes it by itself."""
    folder = box.parent
    assert with_rejections[0].stats().quarantined == 2
    head, *rows, total, live, warehouse = output_of(folder, "quarantine", "list", "-d", "box").splitlines()
    assert (head.split()[0], [row.split()[0] for row in rows]) == ("sink", ["live", "warehouse"])
    assert total == "2 damaged byte ranges, 12 bytes in 2 files"
    assert [live, warehouse] == [f"to change those of {sink}: -d box/sink-{sink}" for sink in ("live", "warehouse")]
    answer = json.loads(output_of(folder, "quarantine", "list", "--json", "-d", "box"))
    assert [batch["queue"] for batch in answer["batches"]] == ["live", "warehouse"]
    assert [
        byte_range["queue"] for byte_range in json.loads(output_of(folder, "quarantine", "show", "--json", "-d", "box"))
    ] == [
        "live",
        "warehouse",
    ]
    assert ", in the queue of warehouse" in output_of(folder, "quarantine", "show", "-d", "box")
    assert "-d box/sink-live or -d box/sink-warehouse" in output_of(
        folder, "quarantine", "purge", "--all", "--yes", "-d", "box", code=2
    )
    assert output_of(folder, "quarantine", "repair", "--all", "--yes", "-d", "box/sink-live").splitlines()[-1] == (
        "nothing was changed; 1 range without a recoverable event"
    )
    assert "1 damaged byte range in 1 file deleted" in output_of(
        folder, "quarantine", "purge", "--all", "--yes", "-d", "box/sink-live"
    )
    answer = json.loads(output_of(folder, "quarantine", "list", "--json", "-d", "box"))
    assert [batch["queue"] for batch in answer["batches"]] == ["warehouse"]
    balanced_totals(box)


def test_dead_letters_of_one_sink_are_replayed_to_that_sink_only(
    box: Path, with_rejections: tuple[Outbox, Server, Server]
) -> None:
    """While the worker runs, under the same event ids; the ledgers balance."""
    outbox, live, warehouse = with_rejections
    live.respond, before = always(CannedResponse()), len(warehouse.requests)
    text = output_of(box.parent, "dead", "replay", "--all", "--yes", "-d", "box/sink-live")
    assert text.splitlines()[-1] == "2 events from 1 file replayed"
    wait_until(lambda: outbox.stats().sinks["live"].delivered == 12)
    assert sorted(event["event_id"] for event in live.requests[-1].events) == ["e-000000", "e-000001"]
    assert len(warehouse.requests) == before
    wait_until(lambda: not batch_files(box / "sink-live"))
    rows = balanced_totals(box)
    assert (rows["live"].delivered, rows["warehouse"].delivered) == (12, 12)
    output_of(box.parent, "verify", "-d", "box")


def test_commands_that_change_something_have_json_output(tmp_path: Path, box: Path) -> None:
    """In the documented format of each command."""
    (tmp_path / "events").write_bytes(b"".join(map(event_line, range(3))))
    stored = json.loads(output_of(tmp_path, "enqueue", "events", "-d", "box", "--json", environ=NO_SEAL_BY_AGE))
    assert stored == {"accepted": 3, "dropped": 0}
    sinks = ["--sink", "live=sqlite:///live.db", "--sink", f"away={closed_port_url()}"]
    report = json.loads(run("deliver", "-d", "box", *sinks, "--once", "--timeout", "5", "--json", "-q", cwd=tmp_path).stdout)
    assert report["pending_batches"] == 1
    assert {name: sink["delivered"] for name, sink in report["sinks"].items()} == {"live": 3, "away": 0}
    assert report["total"]["state"]["name"] == "waiting"
    # The heartbeat of the directory has the result, too.
    assert json.loads(output_of(tmp_path, "status", "-d", "box", "--json"))["heartbeat"]["delivered"] == 3
    changes: dict[str, dict[str, object]] = {
        "add new": {"sink": "new", "done": "requested"},
        "remove new": {"sink": "new", "done": "request_cancelled"},
        "rename away gone": {"sink": "away", "done": "renamed", "new": "gone"},
        "remove gone --discard": {"sink": "gone", "done": "removed", "files": 1},
    }
    for words, expected in changes.items():
        answer = json.loads(output_of(tmp_path, "sinks", *words.split(), "-d", "box", "--json"))
        assert answer == {"files": 0, "returned": False, "new": "", **expected}
