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


class BatchLister:
    """Names what waits in a directory, at most so many files at once; `sync_names()` makes their names durable."""

    def __init__(self, directory: Directory, sync_names: Callable[[], None], page_files: int) -> None:
        self._directory = directory
        self._sync_names = sync_names
        self._page_files = page_files
        self._lists_all = False
        self._page_start = self._next_start = self._end = (
            ""  # this part is behind the one, the next behind the other, both up to that
        )

    @property
    def has_more(self) -> bool:
        """Whether another part is left."""
        return bool(self._next_start)

    def list_first_page(self, *, everything: bool) -> list[str]:
        """Look anew: all names in order, or the first part of them. Raises `OSError`."""
        self.reset()
        self._lists_all = everything
        self._end = self._list_names(0).last
        return self.list_next_page() if self._end else []

    def list_next_page(self) -> list[str]:
        """The next part. Raises `OSError`; it is still the next then."""
        self._sync_names()
        page = self._list_names(self._page_files, self._next_start)
        self._page_start, self._next_start = self._next_start, page.next_after
        return page.names

    def reset(self) -> None:
        """Have no other part left."""
        self._page_start = self._next_start = self._end = ""

    def is_outside_page(self, name: str) -> bool:
        """Whether a name is beyond the part that was named last, which does not tell then whether the file is there."""
        return name <= self._page_start or bool(self._next_start and name > self._next_start)

    def _list_names(self, limit: int, after: str = "") -> BatchPage:
        page = None if self._lists_all else self._directory.oldest_batches(limit, after, self._end)
        if page is None:
            names = [name for name in self._directory.batch_names() if name > after and (not self._end or name <= self._end)]
            page = BatchPage(names, "", names[-1] if names else "")
        return page
