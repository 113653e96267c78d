"""Real file systems on loop devices: mounted, cut from their power after the k-th operation, mounted again, and read.

The shutdown ioctl with "no log flush" leaves on the device what a loss of power would leave, within milliseconds; mounting
again replays the journal. `need` is how a test says what it wants of the machine.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def need(*, root: bool = True, devices: tuple[str, ...] = (), commands: tuple[str, ...] = ()) -> None:
    """Skip where the machine lacks something, and fail in CI, where nothing may be lacking."""
    lacking = [device for device in devices if not os.access(device, os.R_OK | os.W_OK)]
    lacking += [
        command for command in commands if subprocess.run(["which", command], capture_output=True, check=False).returncode
    ]
    if root and os.geteuid() != 0:
        lacking.append("root")
    if lacking and os.environ.get("CI"):
        pytest.fail(f"CI must have {', '.join(lacking)}")
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}")


@contextlib.contextmanager
def mounted(place: Path, *arguments: str | Path) -> Iterator[Path]:
    """Something mounted at `place`, with the arguments that `mount` wants before it."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *arguments, place], check=True)
    try:
        yield place
    finally:
        if subprocess.run(["umount", place], check=False).returncode:  # a test that failed holds files open there
            subprocess.run(["umount", "--lazy", place], check=True)
