"""systemd's own tool checks the unit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.deploy.deploy_files import DEPLOY

UNIT = DEPLOY / "systemd" / "pillarbox-deliver.service"
COMMAND = "/opt/pillarbox/bin/pillarbox"
EXPOSURE_MAX = 15  # in tenths of systemd's exposure level: 0 is best, 100 is worst


def analyze(unit: Path, *arguments: str) -> str:
    completed = subprocess.run(["systemd-analyze", *arguments, unit], capture_output=True, text=True, timeout=60, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stderr


def test_systemd_accepts_every_line_of_the_unit(tmp_path: Path) -> None:
    """With an existing command; a misspelled setting is reported."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(COMMAND, sys.executable))
    assert analyze(unit, "verify") == ""
    unit.write_text(unit.read_text().replace("ProtectHome=", "ProtectHouse="))
    assert "ProtectHouse" in analyze(unit, "verify")


def test_the_units_exposure_is_low() -> None:
    """By systemd's measure."""
    analyze(UNIT, "security", "--offline=true", f"--threshold={EXPOSURE_MAX}")


def test_the_command_in_the_unit_is_valid(tmp_path: Path) -> None:
    """It fails because of the missing file, not because of an option."""
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    command = line.removeprefix(f"ExecStart={COMMAND} ").replace("/etc/pillarbox", str(tmp_path)).split()
    completed = subprocess.run(
        [sys.executable, "-m", "pillarbox", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert completed.returncode == 2
    assert "pillarbox.toml" in completed.stderr
