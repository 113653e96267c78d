"""`pillarbox quarantine`, run as an operator runs it: real processes on damage that a real reader detected."""

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
    """Two batches with damage, whose good records are delivered."""
    box = tmp_path / "box"
    seal_batch(box, WHOLE, *DAMAGE.values())
    seal_batch(box, b"no json\n", first=10)
    deliver_pending(box, tmp_path / "events.db")
    assert len(list(box.glob("corrupt-*.ndjson"))) == 2
    return box


def delivered_after_repair(folder: Path) -> list[str]:
    """Deliver the pending batches, and return the ids of the repaired events that the destination now has."""
    deliver_pending(folder / "box", folder / "events.db")
    delivered = (event_id for event_id, _ in delivered_rows(folder / "events.db"))
    return sorted(event_id for event_id in delivered if event_id.startswith("w-") and event_id != "w-000001")


def quarantined_bytes(box: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in box.glob("corrupt-*.ndjson")}


def test_list_and_show_print_the_quarantine_and_change_nothing(box: Path, tmp_path: Path) -> None:
    """As text, as JSON, and as raw bytes."""
    before = {file.name: file.read_bytes() for file in box.iterdir()}
    listed = json.loads(run("quarantine", "list", "-d", "box", "--json", cwd=tmp_path).stdout)
    assert [batch["ranges"] for batch in listed["batches"]] == [4, 1]
    assert listed["batches"][0]["reasons"] == dict.fromkeys(DAMAGE, 1)
    assert listed["bytes"] == sum(map(len, quarantined_bytes(box).values()))
    text = run("quarantine", "list", "-d", "box", cwd=tmp_path).stdout.decode()
    assert f"5 damaged byte ranges, {listed['bytes']:,} bytes in 2 files" in text
    shown = run("quarantine", "show", "-d", "box", "--reason", "nul", cwd=tmp_path).stdout.decode()
    assert "\\x00" * 40 in shown
    assert "\0" not in shown
    assert "range 2\n  nul_bytes; " in shown
    raw = run("quarantine", "show", "-d", "box", "--reason", "bad_checksum", "--raw", cwd=tmp_path).stdout
    assert raw == DAMAGE["bad_checksum"]
    assert {file.name: file.read_bytes() for file in box.iterdir()} == before


def test_repair_shows_the_event_in_each_range_and_why_it_may_be_wrong(box: Path, tmp_path: Path) -> None:
    """Without --yes, it changes nothing."""
    before = {file.name: file.read_bytes() for file in box.iterdir()}
    completed = run("quarantine", "repair", "-d", "box", "--all", cwd=tmp_path)
    output = completed.stdout.decode()
    assert (completed.returncode, completed.stderr) == (0, b"")
    assert "bad_checksum\n  event: its checksum does not match: the event may have been altered\n    {" in output
    assert "torn: bad_json\n  event: its checksum is cut off; the 2 digits that are left match\n" in output
    assert "nul_bytes\n  no event: it is not a JSON object" in output
    assert "3 events from 1 file would be replayed; add --yes to do it; 2 ranges without a recoverable event" in output
    assert {file.name: file.read_bytes() for file in box.iterdir()} == before


def test_a_repaired_range_is_marked_and_its_bytes_are_kept(box: Path, tmp_path: Path) -> None:
    """A second repair replays nothing."""
    before = quarantined_bytes(box)
    completed = run("quarantine", "repair", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert (completed.returncode, completed.stderr) == (0, b"")
    assert "3 events from 1 file replayed; 2 ranges without a recoverable event" in completed.stdout.decode()
    assert quarantined_bytes(box) == before
    assert delivered_after_repair(tmp_path) == REPAIRABLE
    second = json.loads(run("quarantine", "repair", "-d", "box", "--all", "--yes", "--json", cwd=tmp_path).stdout)
    assert (second["events"], [item["reason"] for item in second["items"]]) == (0, ["nul_bytes", "bad_json"])
    listed = json.loads(run("quarantine", "list", "-d", "box", "--json", cwd=tmp_path).stdout)
    assert [(batch["ranges"], batch["repaired"]) for batch in listed["batches"]] == [(4, 3), (1, 0)]
    assert b", repaired 2" in run("quarantine", "show", "-d", "box", cwd=tmp_path).stdout
    assert [b'"events":3' in line for line in file_lines(box, "ledger.ndjson") if b'"entry":"repaired"' in line] == [True]


def test_repair_can_be_limited_to_events_with_a_valid_checksum(tmp_path: Path) -> None:
    """Here, a whole record before NUL bytes."""
    box = tmp_path / "box"
    seal_batch(box, *DAMAGE.values(), b"\n", record.line(event_json(6))[:-1] + b"\0" * 9)
    deliver_pending(box, tmp_path / "events.db")
    completed = run("quarantine", "repair", "-d", "box", "--all", "--checked", "--yes", cwd=tmp_path)
    assert b"skipped: its checksum does not match" in completed.stdout
    assert delivered_after_repair(tmp_path) == ["w-000006"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pillarbox.outbox", "Outbox.enqueue_json"),
        ("pillarbox.store.ledger", "LedgerWriter.write"),
        ("pillarbox.admin.quarantine", "QuarantineRepairer._mark_repaired"),
        ("pillarbox.store.directory", "Directory._write_and_rename"),
    ],
)
def test_a_repair_that_was_killed_can_be_repeated_without_loss_or_duplicates(
    box: Path, tmp_path: Path, module: str, name: str
) -> None:
    """SIGKILL at each step, then the same command again. The damaged bytes stay all the time."""
    before = quarantined_bytes(box)
    arguments = ["quarantine", "repair", "-d", "box", "--all", "--yes", "--quiet"]
    program = HALT.format(module=module, name=name, arguments=arguments)
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, env=CLEAN) as process:
        assert process.stdout is not None
        while process.stdout.readline() != b"halted\n":
            assert process.poll() is None
        process.kill()
    assert quarantined_bytes(box) == before
    assert run(*arguments, cwd=tmp_path).returncode == 0
    assert delivered_after_repair(tmp_path) == REPAIRABLE
    assert quarantined_bytes(box) == before


def test_purge_deletes_whole_batches_and_writes_a_ledger_entry(box: Path, tmp_path: Path) -> None:
    """Without --yes, it changes nothing. Repaired events are not counted as lost."""
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


def test_a_batch_whose_ranges_are_all_repaired_can_be_purged(tmp_path: Path) -> None:
    """With --repaired alone."""
    box = tmp_path / "box"
    seal_batch(box, DAMAGE["bad_checksum"])
    deliver_pending(box, tmp_path / "events.db")
    run("quarantine", "repair", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert run("quarantine", "purge", "-d", "box", "--repaired", "--yes", cwd=tmp_path).returncode == 0
    assert not list(box.glob("corrupt-*"))
    assert delivered_after_repair(tmp_path) == ["w-000002"]


def damage_files(box: Path, defect: str) -> None:
    ranges_file, data_file = min(box.glob("corrupt-*.spans.json")), min(box.glob("corrupt-*.ndjson"))
    if defect == "no ranges file":
        ranges_file.unlink()
    elif defect == "no data file":
        data_file.unlink()
    elif defect == "invalid JSON":
        ranges_file.write_bytes(b"[{\xff")
    elif defect == "too few bytes":
        data_file.write_bytes(data_file.read_bytes()[:-1])
    else:
        data_file.rename(box / "elsewhere")
        data_file.symlink_to(box / "elsewhere")


DEFECTS = ["no ranges file", "no data file", "invalid JSON", "too few bytes", "a link"]


@pytest.mark.parametrize("defect", DEFECTS)
def test_inconsistent_quarantine_files_are_reported_and_kept(box: Path, tmp_path: Path, defect: str) -> None:
    """Nothing is repaired from them, and the command continues."""
    damage_files(box, defect)
    before = {file.name: file.read_bytes() for file in box.glob("corrupt-*")}
    for command in (["list"], ["show"], ["repair", "--all", "--yes"]):
        completed = run("quarantine", *command, "-d", "box", cwd=tmp_path)
        assert completed.returncode == 1
        assert b"corrupt-" in completed.stderr
        assert b"Traceback" not in completed.stderr
    assert {file.name: file.read_bytes() for file in box.glob("corrupt-*")} == before
    assert delivered_after_repair(tmp_path) == []


@pytest.mark.parametrize("defect", DEFECTS)
def test_inconsistent_quarantine_files_can_be_purged(box: Path, tmp_path: Path, defect: str) -> None:
    """Only a symbolic link is left."""
    damage_files(box, defect)
    completed = run("quarantine", "purge", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert completed.returncode == (1 if defect == "a link" else 0), completed.stderr
    assert len(list(box.glob("corrupt-*"))) == (2 if defect == "a link" else 0)


def test_the_quarantine_of_a_pending_batch_is_not_changed(box: Path, tmp_path: Path) -> None:
    """The delivery worker would write the same bytes again, and they would not be marked as repaired."""
    pending = seal_batch(box, good=1)
    old = min(box.glob("corrupt-*.ndjson")).stem.removeprefix("corrupt-")
    for suffix in (".ndjson", ".spans.json"):
        (box / f"corrupt-{old}{suffix}").rename(box / f"corrupt-{pending.stem}{suffix}")
    before = {file.name: file.read_bytes() for file in box.glob("corrupt-*")}
    for command in (["repair", "--all"], ["purge", "--reason", "checksum"]):
        completed = run("quarantine", *command, "-d", "box", "--yes", cwd=tmp_path)
        assert completed.returncode == 1
        assert f"corrupt-{pending.name}: left as is: the batch is still pending".encode() in completed.stderr
    assert {file.name: file.read_bytes() for file in box.glob("corrupt-*")} == before
