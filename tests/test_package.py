"""The names and types that `import pillarbox` offers."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pillarbox

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_package() -> None:
    """That in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pillarbox.__version__ == project["version"]


def test_all_names_exist_and_include_the_errors() -> None:
    """All errors can be imported from the top of the package."""
    assert all(hasattr(pillarbox, name) for name in pillarbox.__all__)
    errors = {
        name
        for name, value in vars(pillarbox.errors).items()
        if isinstance(value, type) and issubclass(value, pillarbox.PillarboxError)
    }
    assert errors <= set(pillarbox.__all__)


PROGRAM = """
from pathlib import Path
from typing import assert_type
from pillarbox import Dropped, Enqueued, Outbox, Sink, TrackingEvent

outbox = Outbox(Path("var/outbox"), sink="sqlite:///events.db", flush_interval=0.5)
outcome = outbox.enqueue(TrackingEvent(event_key="login", scope_kind="User", scope_id="u-1"), durability="power")
if outcome:
    assert_type(outcome, Enqueued)
    print(outcome.durability)
else:
    assert_type(outcome, Dropped)
    print(outcome.reason)

def deliver_to(sink: Sink) -> Outbox:
    return Outbox("var/outbox", sink)
"""


def test_a_type_checker_knows_which_outcome_is_falsy(tmp_path: Path) -> None:
    """In strict mode, it also accepts a path object and the examples of the README."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    for number, program in enumerate([PROGRAM, *(block.split("```")[0] for block in blocks)]):
        (tmp_path / f"program{number}.py").write_text(program)
    completed = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "", *sorted(map(str, tmp_path.glob("*.py")))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stdout
