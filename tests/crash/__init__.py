"""Tests of what crashes, losses of power, failing disks and other processes leave of the store.

Most harnesses run the real code of the store and of delivery on a simulated disk (`pillarbox.testing.crash`), which keeps a
trace of every operation; `pillarbox.testing.durability_model` says what a loss of power may leave of a trace.

    simulation.py      processes on a simulated disk, and what is owed at each moment
    enumeration.py     every history up to a length, every state that a crash may leave of it
    faults.py          every operation of some histories fails
    interleave.py      every interleaving of several processes, up to so many preemptions and kills
    state_machine.py   random sequences of calls, crashes and recoveries
    fanout*.py         the same for several sinks
    kills.py, lossy_fs.py, block_device.py   real processes and real file systems
    mutants.py         known defects, each of which a harness must find

Two orders of operations. The batch operations (`sync_each`, `create_each`, `rename_each`, `close_each`, `open_locked`,
`append_locked`, `sync_directory`) and the directory scans exist twice: in Python, one operation of the file system after the
other, and in C, with an order of system calls of their own: `sync_each` writes all files back before it syncs the first, a scan
asks for sizes after it has read the names. `compiled_order.py` has the harnesses run over both, with the real C: it compiles
the sources of the extension once more, with `simulated_calls.h` in front of each, where the calls of open, flock, rename,
readdir and the like are macros for functions that ask the simulated disk.

Three other ways were considered. A model of the C in Python would have to be held to the C by a test that records the system
calls of both, on errors too, and a difference between them would be found only where that test looks. A table of function
pointers in the extension would put a hook for tests into what is installed, and an indirect call into each system call.
Preloading a library would replace the system calls of the interpreter too, and of every thread. With macros the sources are the
ones that are installed, to the letter, and the installed extension has no trace of the harness; a C compiler is needed to run
the tests, as it is to install the extension. `mutants.txt` has patches of the C sources as well, which are compiled in the same
way.
"""
