"""Delivery in a process of its own: `deliver="process"`.

`supervisor.py` is in the application's process, `entry.py` in the child, `messages.py` is what they say to each other, over one
pair of sockets. The child is a new interpreter (`subprocess`, no fork of a process with threads), and gets everything through
the sockets: settings may hold passwords, which must not be seen in a command line or an environment.

Who starts a child: only the process that gets `deliver.lock`. It holds the lock until its child is ready to take it, so of
many workers of one directory one has a child, and the others only look whether the lock is free. A child that finds that
another process was quicker after all is told to end.

How it ends: told to, with the time that it may take; or with its parent, whatever becomes of that: the end of the sockets says
so, and on Linux the kernel kills it (`PR_SET_PDEATHSIG`). To what is delivered that is what the parent's death is to a thread.
Signals that are meant for the parent (Ctrl-C, a service manager that tells all processes to end) are left to the parent: the
child has a session of its own and ignores them. One that dies is started again, later each time.
"""
