"""Relative paths in the URLs of sinks, which refer to the working directory at the time when the outbox was made."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, unquote

_SQLITE: Final = re.compile(r"(sqlite:///)(?!/|:memory:)(?=[^?#])", re.IGNORECASE)
_FILE_OPTIONS: Final = re.compile(r"(?<=[?&#])((?:token_file|ca_file)=)([^&#]+)")
_WEB: Final = re.compile(r"https?:", re.IGNORECASE)


def absolute_url(url: str, working_directory: str) -> str:
    """The URL of a sink with its relative paths made absolute: of an SQLite file, and of files that options name."""
    if not working_directory:
        return url
    base = quote(working_directory.rstrip("/")) + "/"

    def with_base(match: re.Match[str]) -> str:
        return match[0] if unquote(match[2]).startswith("/") else f"{match[1]}{base}{match[2]}"

    # The part of a web address before the "#" belongs to the destination, and is not changed.
    own_from = len(url.partition("#")[0]) if _WEB.match(url) else 0
    url = url[:own_from] + _FILE_OPTIONS.sub(with_base, url[own_from:])
    return _SQLITE.sub(lambda match: f"{match[1]}{base}", url, count=1) if _SQLITE.match(url) else url
