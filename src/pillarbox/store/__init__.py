"""The store: what is on disk, and what it guarantees. This is the specification; tests in `tests/store` hold its sentences.

GUARANTEES. An event for which `enqueue` returned `Enqueued("process")` was written to a file by a `write` that returned. It
survives the death of the process; a power loss may lose it until its segment is sealed. For `Enqueued("power")` an `fdatasync`
that began after the write has returned as well, and the name of the file is durable. A file whose sync has failed is never
synced again and trusted: it is rewritten, from what can be read and from the lines that are still in memory, or the caller gets
`Dropped("io_error")`. The content of a batch file never changes, but a compressed copy may replace it. Bytes that are not a
well-formed record are never delivered and never thrown away: they are quarantined. A delivered batch file is deleted, or
retained if `keep_delivered` is set.

FILES. The name of a file is its state, and each change of state is one rename; there is no other state. `layout.py` defines the
names, `record.py` the lines; `docs/reference/file-format.md` shows both.

    active-<writer>-<n>.ndjson   a segment: appended to by one writer, which holds its lock; a name is used once
    active.ndjson                a segment of an older version, which takes no lock; it is recovered, and never written
    sealed-<micros>-<uuid>.ndjson  a batch file: complete, immutable, waiting for delivery; sorts by seal time
    sealed-....ndjson.zst        the same, compressed; next to the plain file it is a copy, and is removed first
    delivered-<micros>-<micros>-<uuid>.ndjson  a retained batch file; the first time is that of delivery
    corrupt-<batch>.ndjson       the quarantined byte ranges of a batch, one after another
    corrupt-<batch>.spans.json   where these ranges were in the batch file, and what is wrong with each
    dead-<batch>.ndjson          the dead letters of a batch, one a line
    *.aside                      a temporary file: being written, and worthless once its writer is dead
    doctor-<uuid>.probe          a file that `pillarbox doctor` tries operations on, and removes
    ledger.ndjson                the ledger; appended to under `ledger.lock`, replaced when it is compacted
    seal.request                 written to have all writers seal their segments; overwritten, never removed
    mend.lock                    locked by a command that changes dead letters, quarantine or retained batches; never removed
    evict.lock                   locked by the process that evicts; never removed
    deliver.lock                 locked by the process that delivers, which writes its state into it; never removed
    sink-<name>/                 the queue of one of several sinks: hard links to batch files, and its own files as above
    sink-<name>.adding/          a requested queue that starts with the current backlog, until it is complete
    sink-<name>.removing/        a queue that is being removed

SEVERAL SINKS. A batch file gets a hard link in each queue, and the queues are synced; then its name in the outbox directory is
removed, and from then on the links count. The file is gone with its last name. The limits count it once. In a queue, files are
locked shared, because several sinks deliver the same file; a process locks it exclusively to evict or compress it.

OWNERS. `writer.py` creates segments and appends to them; `segment.py` syncs them. `group_commit.py` answers callers who wait
for a sync. `sealer.py` has segments synced and renamed. `recovery.py` seals what dead writers left. `delivery/` links batch
files into queues and reads them with `reader.py`. Only `directory.py` renames and deletes files. A process takes a file by
opening it, locking it, and checking that the name still refers to it; it releases the file by closing it. The kernel releases
the locks of a process that dies, and the next writer that starts recovers its segments.

ORDER. Events of one writer are delivered in the order in which they were appended; batches of several writers by seal time.
Seal times strictly increase within a process, and start after the latest one in the directory, even where the clock steps back.

LIMITS. Pending bytes and files are those of segments and batch files, and no others. An event that would exceed `max_bytes` is
dropped and no file is created for it; at `max_files` no further segment begins; with less than `min_free_bytes` free on the
volume every event is dropped. With eviction, the oldest batches that no process has locked are evicted instead. Retained files
are deleted before that, and before an event is dropped for lack of space. A segment is retired at `batch_size` events, at
`batch_bytes` bytes, or `flush_interval` seconds after its first event (later while files wait). If the disk is too slow, a
segment may exceed `batch_size`: by as many events again for every eight segments that wait for their sync, and up to
`batch_bytes` without a spare. While 64 segments wait, it may exceed `batch_bytes`, up to 64 MiB; then events are dropped. The
events of one call of `enqueue_many` are in one file. A file of any size is read in windows of 2 MiB.

ASSUMPTIONS. `write` appends everything or reports how much. `rename` is atomic. `fdatasync` makes the data of a file durable,
`fsync` of a directory the names in it. After a crash a file may end in a torn line or NUL bytes: the reader reports them.
"""
