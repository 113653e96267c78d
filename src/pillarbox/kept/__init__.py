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
"""
