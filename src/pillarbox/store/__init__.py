"""THE spec of what is on disk. Every sentence here has a test in `tests/store/`.

GUARANTEES. An event whose `enqueue` answered `Enqueued("process")` is in a file, by a `write` that returned: the death of the
process does not lose it; the loss of power may, until its file is sealed. `Enqueued("power")`: an `fdatasync` that began after
the write has returned too, and the file's name is durable. A file whose sync has failed is never synced again and trusted: it
is written anew, from what can be read and from what is still in memory, or the caller is told. A sealed file never changes, but
that a compressed copy may take its place. Bytes that are not a record are never delivered and never thrown away. What was
delivered is gone, or kept where that is wanted.

FILES. A file's name is its state, and a change of state is one rename; there is no other state. `layout.py` knows the names,
`record.py` the lines; `docs/reference/file-format.md` shows both.

    active-<writer>-<n>.ndjson   appended to by one writer, which holds its lock; a name is used once
    active.ndjson                left by an older writer that takes no lock; adopted, never written
    sealed-<micros>-<uuid>.ndjson  complete, immutable, waiting; one sealed file is one batch; sorts by seal time
    sealed-....ndjson.zst        the same, compressed by the deliverer; beside a plain one it is a copy, and goes first
    delivered-<micros>-<micros>-<uuid>.ndjson  delivered, at the first of these times, and kept; sent again by one rename
    corrupt-<batch>.ndjson       damaged bytes as they stood, one span after another
    corrupt-<batch>.spans.json   where each of them stood, and why it is there
    dead-<batch>.ndjson          dead letters, one line each
    *.aside                      being written; worthless once its writer is gone
    doctor-<uuid>.probe          what `pillarbox doctor` tries things on; removed at its end, and nothing to anybody else
    seal.request                 somebody asks all writers to seal what they hold; written over, never removed
    evict.lock                   held by the process that evicts; never removed
    deliver.lock                 held by the process that delivers, which writes its state into it; never removed
    sink-<name>/                 the queue of one of several sinks: second names of sealed files, and files as above, its own
    sink-<name>.adding/          a queue that is being made, and begins with what waits
    sink-<name>.removing/        a queue that is being removed

SEVERAL SINKS. A sealed file gets a second name in each queue; these are synced, then its first name goes, and from then on the
second ones count. The file is gone with its last name; limits count it once. In a queue files are locked shared, for several
sinks hold the same file; who gives one up, or compresses it, locks it alone.

WHO MAY TOUCH WHAT. `writer.py` creates active files and appends to them, `syncing.py` syncs them; `commit.py` answers who waits
for a sync;
`sealer.py` has files synced and renamed; `fanout.py` hands them over to queues; `reader.py` reads
sealed files; only `directory.py` renames and deletes. A file or lock is taken by opening, locking and looking whether the
name still means it; released by closing. A writer that dies leaves its lock to the kernel; the next that starts adopts its
file.

ORDER. Within a writer, first in, first out. Across writers, by seal time. Seal times strictly increase within a process, and
start after the newest one found, so that they increase also where the clock steps back.

LIMITS. Pending bytes are active and sealed files, no others; above `max_bytes` an event is refused and no file is created, at
`max_files` of them no further file begins, and with less than `min_free_bytes` free on the volume nothing is accepted. With
eviction, the oldest sealed files that nobody holds go first. Delivered files go before that, and before an event is refused
for want of room. An active file is retired at `batch_size` events, at `batch_bytes`, or `flush_interval` after its first event
(later while files wait); where the disk does not keep up it grows: by `batch_size` events for every eight files that wait for
their sync, and without a spare file to `batch_bytes` first. A call of `enqueue_many` is never cut in two.

MEDIA. `write` appends whole or reports how much; `rename` is atomic; `fdatasync` makes a file's data durable, `fsync` of the
directory its names. A file may end in a torn line or in NUL bytes after a crash: the reader sets those aside.
"""
