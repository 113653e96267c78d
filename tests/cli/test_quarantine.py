"""`pillarbox quarantine`, as an operator types it: real processes on damage that a real reader found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pillarbox.store import record
from tests.admin.prepared_outboxes import deliver_pending, delivered_rows, event_json, file_lines, seal_batch
from tests.cli.test_commands import CLEAN, run
from tests.cli.test_dead import HALT

WHOLE = record.line(event_json(1))
DAMAGE = {
    "bad_checksum": record.line(event_json(2)).replace(b'"buy"', b'"bay"'),
    "nul_bytes": b"\0" * 40 + record.line(event_json(3))[40:],
    "not_a_record": event_json(4) + b"\n",
    "torn: bad_json": record.line(event_json(5))[:-9],
}
REPAIRABLE = ["w-000002", "w-000004", "w-000005"]


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """Two batches with damage, of which the good lines have arrived."""
    box = tmp_path / "box"
    seal_batch(box, WHOLE, *DAMAGE.values())
    seal_batch(box, b"no json\n", first=10)
    deliver_pending(box, tmp_path / "events.db")
    assert len(list(box.glob("corrupt-*.ndjson"))) == 2
    return box


def came(folder: Path) -> list[str]:
    """What was damaged and has arrived, after what waits is delivered."""
    deliver_pending(folder / "box", folder / "events.db")
    return sorted(one for one, _ in delivered_rows(folder / "events.db") if one.startswith("w-") and one != "w-000001")


def kept_bytes(box: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in box.glob("corrupt-*.ndjson")}


def test_list_and_show_tell_what_is_kept_and_change_nothing(box: Path, tmp_path: Path) -> None:
    """As text, as JSON, and the bytes alone."""
    before = {file.name: file.read_bytes() for file in box.iterdir()}
    listed = json.loads(run("quarantine", "list", "-d", "box", "--json", cwd=tmp_path).stdout)
    assert [batch["ranges"] for batch in listed["batches"]] == [4, 1]
    assert listed["batches"][0]["reasons"] == dict.fromkeys(DAMAGE, 1)
    assert listed["bytes"] == sum(map(len, kept_bytes(box).values()))
    text = run("quarantine", "list", "-d", "box", cwd=tmp_path).stdout.decode()
    assert f"5 damaged byte ranges, {listed['bytes']:,} bytes in 2 files" in text
    shown = run("quarantine", "show", "-d", "box", "--reason", "nul", cwd=tmp_path).stdout.decode()
    assert "\\x00" * 40 in shown
    assert "\0" not in shown
    assert "range 2\n  nul_bytes; " in shown
    raw = run("quarantine", "show", "-d", "box", "--reason", "bad_checksum", "--raw", cwd=tmp_path).stdout
    assert raw == DAMAGE["bad_checksum"]
    assert {file.name: file.read_bytes() for file in box.iterdir()} == before


def test_repair_says_what_is_in_each_span_and_how_sure_that_is(box: Path, tmp_path: Path) -> None:
    """And does nothing without --yes."""
    before = {file.name: file.read_bytes() for file in box.iterdir()}
    done = run("quarantine", "repair", "-d", "box", "--all", cwd=tmp_path)
    said = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    assert "bad_checksum\n  event: its checksum does not match: the event may have been altered\n    {" in said
    assert "torn: bad_json\n  event: its checksum is cut off; the 2 digits that are left match\n" in said
    assert "nul_bytes\n  no event: it is not a JSON object" in said
    assert "3 events from 1 file would be replayed; add --yes to do it; 2 ranges without a recoverable event" in said
    assert {file.name: file.read_bytes() for file in box.iterdir()} == before


def test_repaired_once_it_is_marked_and_the_bytes_are_kept(box: Path, tmp_path: Path) -> None:
    """A second time does nothing."""
    before = kept_bytes(box)
    done = run("quarantine", "repair", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "3 events from 1 file replayed; 2 ranges without a recoverable event" in done.stdout.decode()
    assert kept_bytes(box) == before
    assert came(tmp_path) == REPAIRABLE
    again = json.loads(run("quarantine", "repair", "-d", "box", "--all", "--yes", "--json", cwd=tmp_path).stdout)
    assert (again["events"], [item["reason"] for item in again["items"]]) == (0, ["nul_bytes", "bad_json"])
    listed = json.loads(run("quarantine", "list", "-d", "box", "--json", cwd=tmp_path).stdout)
    assert [(batch["ranges"], batch["repaired"]) for batch in listed["batches"]] == [(4, 3), (1, 0)]
    assert b", repaired 2" in run("quarantine", "show", "-d", "box", cwd=tmp_path).stdout
    assert [b'"events":3' in line for line in file_lines(box, "ledger.ndjson") if b'"entry":"repaired"' in line] == [True]


def test_only_what_a_checksum_vouches_for_where_that_is_asked(tmp_path: Path) -> None:
    """A whole record before NUL bytes is; the rest stays as it is."""
    box = tmp_path / "box"
    seal_batch(box, *DAMAGE.values(), b"\n", record.line(event_json(6))[:-1] + b"\0" * 9)
    deliver_pending(box, tmp_path / "events.db")
    done = run("quarantine", "repair", "-d", "box", "--all", "--checked", "--yes", cwd=tmp_path)
    assert b"skipped: its checksum does not match" in done.stdout
    assert came(tmp_path) == ["w-000006"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pillarbox.outbox", "Outbox.enqueue_json"),
        ("pillarbox.store.ledger", "LedgerWriter.write"),
        ("pillarbox.admin.quarantine", "QuarantineRepairer._mark_repaired"),
        ("pillarbox.store.directory", "Directory._write_and_rename"),
    ],
)
def test_killed_anywhere_in_a_repair_everything_is_there_once_in_the_end(
    box: Path, tmp_path: Path, module: str, name: str
) -> None:
    """Kill -9, then the same command again; the bytes are there all the while."""
    before = kept_bytes(box)
    arguments = ["quarantine", "repair", "-d", "box", "--all", "--yes", "--quiet"]
    program = HALT.format(module=module, name=name, arguments=arguments)
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, env=CLEAN) as process:
        assert process.stdout is not None
        while process.stdout.readline() != b"there\n":
            assert process.poll() is None
        process.kill()
    assert kept_bytes(box) == before
    assert run(*arguments, cwd=tmp_path).returncode == 0
    assert came(tmp_path) == REPAIRABLE
    assert kept_bytes(box) == before


def test_purge_takes_whole_batches_and_tells_the_ledger(box: Path, tmp_path: Path) -> None:
    """Dry run first; what is repaired is no loss and not counted again."""
    run("quarantine", "repair", "-d", "box", "--all", "--yes", cwd=tmp_path)
    batch = min(box.glob("corrupt-*.ndjson")).name
    dry = run("quarantine", "purge", "-d", "box", "--batch", batch, cwd=tmp_path)
    assert b"4 damaged byte ranges in 1 file would be deleted; add --yes to do it" in dry.stdout
    assert run("quarantine", "purge", "-d", "box", "--repaired", "--yes", cwd=tmp_path).stdout == b"nothing was changed\n"
    assert len(list(box.glob("corrupt-*"))) == 4
    assert run("quarantine", "purge", "-d", "box", "--batch", batch, "--yes", cwd=tmp_path).returncode == 0
    assert len(list(box.glob("corrupt-*"))) == 2
    (entry,) = [line for line in file_lines(box, "ledger.ndjson") if b"purged" in line]
    assert b'"quarantine"' in entry
    assert b'"events":1' in entry
    assert run("quarantine", "purge", "-d", "box", cwd=tmp_path).returncode == 2


def test_where_every_span_is_repaired_the_batch_can_go(tmp_path: Path) -> None:
    """With --repaired alone."""
    box = tmp_path / "box"
    seal_batch(box, DAMAGE["bad_checksum"])
    deliver_pending(box, tmp_path / "events.db")
    run("quarantine", "repair", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert run("quarantine", "purge", "-d", "box", "--repaired", "--yes", cwd=tmp_path).returncode == 0
    assert not list(box.glob("corrupt-*"))
    assert came(tmp_path) == ["w-000002"]


def ruin(box: Path, how: str) -> None:
    spans, data = min(box.glob("corrupt-*.spans.json")), min(box.glob("corrupt-*.ndjson"))
    if how == "no spans":
        spans.unlink()
    elif how == "no bytes":
        data.unlink()
    elif how == "spans that are no JSON":
        spans.write_bytes(b"[{\xff")
    elif how == "too few bytes":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        data.rename(box / "elsewhere")
        data.symlink_to(box / "elsewhere")


HOWS = ["no spans", "no bytes", "spans that are no JSON", "too few bytes", "a link"]


@pytest.mark.parametrize("how", HOWS)
def test_files_that_do_not_fit_together_are_named_and_kept(box: Path, tmp_path: Path, how: str) -> None:
    """Nothing is repaired from them, and all else goes on."""
    ruin(box, how)
    before = {file.name: file.read_bytes() for file in box.glob("corrupt-*")}
    for command in (["list"], ["show"], ["repair", "--all", "--yes"]):
        done = run("quarantine", *command, "-d", "box", cwd=tmp_path)
        assert done.returncode == 1
        assert b"corrupt-" in done.stderr
        assert b"Traceback" not in done.stderr
    assert {file.name: file.read_bytes() for file in box.glob("corrupt-*")} == before
    assert came(tmp_path) == []


@pytest.mark.parametrize("how", HOWS)
def test_what_does_not_fit_together_can_be_purged_unless_it_is_not_ours(box: Path, tmp_path: Path, how: str) -> None:
    """A link stays."""
    ruin(box, how)
    done = run("quarantine", "purge", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert done.returncode == (1 if how == "a link" else 0), done.stderr
    assert len(list(box.glob("corrupt-*"))) == (2 if how == "a link" else 0)


def test_a_batch_that_the_deliverer_is_not_done_with_is_left_alone(box: Path, tmp_path: Path) -> None:
    """It would write the same bytes again, as not yet repaired."""
    waiting = seal_batch(box, good=1)
    old = min(box.glob("corrupt-*.ndjson")).stem.removeprefix("corrupt-")
    for suffix in (".ndjson", ".spans.json"):
        (box / f"corrupt-{old}{suffix}").rename(box / f"corrupt-{waiting.stem}{suffix}")
    before = {file.name: file.read_bytes() for file in box.glob("corrupt-*")}
    for command in (["repair", "--all"], ["purge", "--reason", "checksum"]):
        done = run("quarantine", *command, "-d", "box", "--yes", cwd=tmp_path)
        assert done.returncode == 1
        assert f"corrupt-{waiting.name}: left as is: the batch is still pending".encode() in done.stderr
    assert {file.name: file.read_bytes() for file in box.glob("corrupt-*")} == before
