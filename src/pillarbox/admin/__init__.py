"""What was set aside, and how it comes back: dead letters and quarantine, read, chosen, mended, sent again, purged.

Reading takes no lock and creates nothing. What acts holds `mend.lock`, so that one command at a time does, and keeps this
order, for some files at a time: the events go in through the front door under the ids they have; once they are durable, the
ledger says so; then the file that kept them is written anew without them, or removed. Killed in between, what had gone in
already goes in once more with the next try, under the same ids: twice, which a destination that deduplicates does not show,
never not at all.

A batch whose sealed file is still there is left alone: the deliverer is not done with it, and would write what was taken out of
its dead letters or its quarantine a second time. Once the sealed file is gone nobody but these commands writes to them, for the
batch's name never comes again.

What was delivered and is kept comes back by one rename, as a batch of its own: there the ledger comes last.

What cannot be read is named and left as it is, byte for byte.

What only looks (`scan`, `locate`, `tail`, `export`):

Nothing here takes a lock, creates, adopts or changes a file; what is looked at may be renamed, moved between queues, compressed
or removed at any moment. Two things hold it together all the same. A file that is open stays readable under whatever name, and
under none at all: so active files are held open, and followed over the renaming. And a batch keeps its id from the sealing on:
under `sealed-`, in the queues of several sinks, compressed, and under `delivered-`. An event is told from all others by its
file and its place in it.

What a listing misses, because a file was renamed while it was listed, the next one shows. What came and went between two of
them is in no file any more: the ledger tells how much that was, and so does `tail`.
"""
