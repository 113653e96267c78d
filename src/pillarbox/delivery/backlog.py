"""Which sealed files wait, oldest first. They are named a part at a time: what a backlog takes of memory is one part's names.

Listed twice at the beginning, with a sync of the names in between: a name that the loss of power takes away comes back as
another batch. And a listing may miss a name that is given while it runs and show one that is given later; one that is made
afterwards shows all that came before the last that the first one shows. No part goes beyond that one: what is sealed later is
for the next look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pillarbox.store.directory import BatchPage

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.store.directory import Directory


class Backlog:
    """Names what waits in a directory, at most so many files at once; `sync_names()` makes their names durable."""

    def __init__(self, directory: Directory, sync_names: Callable[[], None], at_once: int) -> None:
        self._directory = directory
        self._sync_names = sync_names
        self._at_once = at_once
        self._whole = False
        self._after = self._behind = self._until = ""  # this part is behind the one, the next behind the other, both up to that

    @property
    def has_more(self) -> bool:
        """Whether another part is left."""
        return bool(self._behind)

    def begin(self, *, whole: bool) -> list[str]:
        """Look anew: all names in order, or the first part of them. Raises `OSError`."""
        self.forget()
        self._whole = whole
        self._until = self._list(0).last
        return self.next() if self._until else []

    def next(self) -> list[str]:
        """The next part. Raises `OSError`; it is still the next then."""
        self._sync_names()
        found = self._list(self._at_once, self._behind)
        self._after, self._behind = self._behind, found.next_after
        return found.names

    def forget(self) -> None:
        """Have no other part left."""
        self._after = self._behind = self._until = ""

    def is_silent_on(self, name: str) -> bool:
        """Whether a name is beyond the part that was named last, which does not tell then whether the file is there."""
        return name <= self._after or bool(self._behind and name > self._behind)

    def _list(self, most: int, after: str = "") -> BatchPage:
        found = None if self._whole else self._directory.oldest_batches(most, after, self._until)
        if found is None:
            names = [
                name for name in self._directory.batch_names() if name > after and (not self._until or name <= self._until)
            ]
            found = BatchPage(names, "", names[-1] if names else "")
        return found
