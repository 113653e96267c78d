"""Tests of the store after crashes, power losses, disk failures, and with several processes.

Most harnesses run the real code of the store and of delivery on a simulated disk (`pillarbox.testing.crash`), which records a
trace of every operation. `pillarbox.testing.durability_model` computes the states that a power loss may leave of a trace.

    simulation.py      processes on a simulated disk, and the events that must not be lost
    enumeration.py     every history up to a length, with every state after a crash
    faults.py          every operation of some histories fails
    interleave.py      every interleaving of several processes, up to a number of preemptions and kills
    state_machine.py   random sequences of calls, crashes and recoveries
    fanout*.py         the same for several sinks
    kills.py, lossy_fs.py, block_device.py   real processes and real file systems
    mutants.py         known defects, each of which a harness must find

There are two orders of operations. The batch operations (`sync_each`, `create_each`, `rename_each`, `close_each`,
`open_locked`, `append_locked`, `sync_directory`) and the directory scans exist twice: in Python, as one file-system operation
after another, and in C, with their own order of system calls: `sync_each` writes all files back before it syncs the first, and
a scan reads sizes after the names. `compiled_order.py` lets the harnesses run with both, using the real C code: it compiles the
sources of the extension again with `simulated_calls.h` included before each, in which open, flock, rename, readdir and others
are macros for functions of the simulated disk.

Three alternatives were considered. A model of the C code in Python needs a test that compares the system calls of both, on
errors too, and differences are found only where that test covers them. A table of function pointers in the extension would put
a hook for tests into the installed code, and an indirect call into each system call. Preloading a library would replace the
system calls of the interpreter and of every thread as well. With macros, the tested sources are exactly the installed ones, and
the installed extension contains nothing of the harness. The tests need a C compiler, as the installation of the extension does.
`mutants.txt` also has patches of the C sources, which are compiled in the same way.
"""
