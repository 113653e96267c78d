"""What is in an outbox, looked at from outside while writers and a deliverer go on: `tail`, `inspect`, `export`, `import`.

Nothing here takes a lock, creates, adopts or changes a file; what is looked at may be renamed, moved between queues, compressed
or removed at any moment. Two things hold it together all the same. A file that is open stays readable under whatever name, and
under none at all: so active files are held open, and followed over the renaming. And a batch keeps its id from the sealing on:
under `sealed-`, in the queues of several sinks, compressed, and under `delivered-`. An event is told from all others by its
file and its place in it.

What a listing misses, because a file was renamed while it was listed, the next one shows. What came and went between two of
them is in no file any more: the ledger tells how much that was, and so does `tail`.
"""
