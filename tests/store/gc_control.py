"""The garbage collector, where a test must know what it may run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_foreign_garbage() -> Iterator[None]:
    """What is collected was made within, and nobody is told of it.

    Where the collector runs a finalizer of what other tests have left, or hypothesis's function that times collections, the
    exception of a signal handler that comes within it is lost: there is nobody to whom it could be raised.
    """
    before = gc.callbacks[:]
    gc.collect()
    gc.freeze()
    gc.callbacks.clear()
    try:
        yield
    finally:
        gc.callbacks[:] = before
        gc.unfreeze()


@contextmanager
def collection_at_next_allocation() -> Iterator[None]:
    """Disabled, with nothing to look through but what comes; once enabled, it collects at the next allocation."""
    before = gc.get_threshold()
    with no_foreign_garbage():
        gc.disable()
        gc.set_threshold(1, 10**6, 10**6)
        try:
            yield
        finally:
            gc.set_threshold(*before)
            gc.enable()
