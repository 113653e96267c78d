"""The systemd unit, checked by systemd's own tool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.deploy.deploy_files import DEPLOY

UNIT = DEPLOY / "systemd" / "pillarbox-deliver.service"
COMMAND = "/opt/pillarbox/bin/pillarbox"
EXPOSURE_MAX = 15  # tenths of systemd's measure, in which 0 is best and 100 worst


def analyzed(unit: Path, *arguments: str) -> str:
    done = subprocess.run(["systemd-analyze", *arguments, unit], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def test_systemd_knows_every_line_of_the_unit(tmp_path: Path) -> None:
    """With a command that there is; another word is complained of."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(COMMAND, sys.executable))
    assert analyzed(unit, "verify") == ""
    unit.write_text(unit.read_text().replace("ProtectHome=", "ProtectHouse="))
    assert "ProtectHouse" in analyzed(unit, "verify")


def test_the_unit_is_exposed_little() -> None:
    """As systemd counts."""
    analyzed(UNIT, "security", "--offline=true", f"--threshold={EXPOSURE_MAX}")


def test_the_command_of_the_unit_is_one(tmp_path: Path) -> None:
    """With the options that it has there: it ends at the missing file, not at an option."""
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    command = line.removeprefix(f"ExecStart={COMMAND} ").replace("/etc/pillarbox", str(tmp_path)).split()
    done = subprocess.run(
        [sys.executable, "-m", "pillarbox", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "pillarbox.toml" in done.stderr
