"""Threads, locks, clocks, sockets and processes of the operating system, even if the standard library is patched.

gevent and eventlet patch functions of the standard library, so that `threading.Thread` starts a greenlet. Delivery cannot run
in a greenlet: it has its own event loop, and waits for the disk. So all other modules import from here what such a library
patches. It makes no difference whether it patches before or after Pillarbox is imported. `originals.py` has the unpatched
modules, `threads.py` threads, locks and events, `sockets.py` sockets, `event_loop.py` the event loop of asyncio, and
`processes.py` child processes.

The application's greenlets call Pillarbox too. Calls that may take long (`flush`, `close`, `when_full="block"`) let other
greenlets run meanwhile. A single write or sync of the disk does not.
"""
