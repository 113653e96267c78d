"""Whether compiled pieces are used where there are any: not with `PILLARBOX_PURE_PYTHON=1` in the environment."""

from __future__ import annotations

from os import environ
from typing import Final

WANTED: Final = not environ.get("PILLARBOX_PURE_PYTHON")
