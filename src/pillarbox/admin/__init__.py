"""What operators do with an outbox from outside: read it, and act on dead letters, quarantine and retained batches.

**Reading** (`scan`, `locate`, `tail`, `export`, `status`) takes no lock, and creates, changes and deletes no file. Meanwhile
files may be renamed, moved between queues, compressed or deleted. Two facts make reading reliable. An open file stays readable
after its name is changed or deleted, so active segments are held open and read to their end after they are sealed. A batch
keeps its id from the seal on: as a sealed file, in the queues of several sinks, compressed, and as a retained file. An event
is identified by its file and its position in it.

A directory listing may miss a file that is renamed at that moment; the next listing shows it. A batch that appears and is
deleted between two listings is never seen; the ledger has its number of events, and `tail` reports it as a gap.

**Acting** (`changes`, `replay`, `quarantine`, `redelivery`) holds `mend.lock`, so that one command acts at a time. A replay or
a repair changes several files at a time, in this order: enqueue the events under their own ids; once they are durable, write
the ledger; then rewrite or delete the files that held them. If the process is killed in between, the next attempt enqueues
these events again under the same ids. They may be delivered twice, which a deduplicating destination does not show, but they
are never lost.

Files of a batch that is still pending are left alone: its delivery worker is not done with it, and would write the dead letters
or the quarantine again. Once the sealed file is gone, only these commands write these files, because batch ids are unique.

A redelivery renames a retained file to a pending one, with a new batch id; there the ledger is written last.

Files and lines that cannot be read are reported and left as they are.
"""
