"""Threads, locks, clocks, sockets and processes of the operating system, whatever has been replaced in the standard library.

gevent and eventlet replace functions of the standard library, so that what looks like a thread is a greenlet of one thread.
Delivery must not run so: it has an event loop of its own, and waits for the disk. All other modules take from here what such a
library replaces. It makes no difference whether that happens before or after Pillarbox is imported. `originals.py` finds what
was replaced, `threads.py` has threads and what they wait with, `sockets.py` sockets, `processes.py` child processes.

The application's own greenlets call Pillarbox too. What may take long (`flush`, `close`, `when_full="block"`) lets other
greenlets run meanwhile. A single write or sync of the disk does not.
"""
