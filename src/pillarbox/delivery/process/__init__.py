"""Delivery in a process of its own: `deliver="process"`.

`supervisor.py` runs in the application's process and `child.py` in the child; `protocol.py` has the messages that they exchange
over a pair of sockets. The child is a new interpreter (a process with threads must not fork). It gets everything
through the socket: settings may hold passwords, which must not be visible in a command line or in the environment.

Only the process that acquires `deliver.lock` starts a child. It holds the lock until its child is ready to acquire it. So of
many workers of one directory one has a child, and the others only check whether the lock is free. A child that finds that
another process was quicker is told to end.

The child ends when it is told to, within the time that it is given, or when its parent ends for any reason: then the socket is
closed, and on Linux the kernel kills the child (`PR_SET_PDEATHSIG`). For delivery that is like the parent's death for a thread.
Signals meant for the parent (Ctrl-C, a service manager that signals all processes) are left to the parent: the child has a
session of its own and ignores them. A child that dies is started again, after a backoff.
"""
