"""Controls the garbage collector in tests that must know what it can run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_foreign_garbage() -> Iterator[None]:
    """Collect only objects that were created within the block, and call no callbacks of the collector.

    If the collector runs a finalizer of an object of another test, or the function by which hypothesis times collections, an
    exception that a signal handler raises there is lost, because the interpreter cannot pass it on.
    """
    callbacks = gc.callbacks[:]
    gc.collect()
    gc.freeze()
    gc.callbacks.clear()
    try:
        yield
    finally:
        gc.callbacks[:] = callbacks
        gc.unfreeze()


@contextmanager
def collection_at_next_allocation() -> Iterator[None]:
    """Disable the collector; once it is enabled, it collects at the next allocation, and only new objects."""
    thresholds = gc.get_threshold()
    with no_foreign_garbage():
        gc.disable()
        gc.set_threshold(1, 10**6, 10**6)
        try:
            yield
        finally:
            gc.set_threshold(*thresholds)
            gc.enable()
