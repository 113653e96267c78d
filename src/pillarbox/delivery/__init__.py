"""Delivery: how a batch gets from a directory to a destination.

The life of one batch, in order:

1. `runner.ThreadRunner` runs `worker.Worker.run` on an event loop in a thread. For several sinks, `fanout.FanOut.distribute`
   first links the batch into each sink's queue, and each queue has a worker of its own. With `deliver="process"`,
   `process.supervisor.Supervisor` has a child process do all of this; with `deliver="external"`, `pillarbox deliver` does.
   `build.build_runner` chooses.
2. The worker acquires the lease (`lease.Lease.acquire`), so that one process delivers at a time. In `Worker._run_once` it
   recovers the segments of writers that have ended and has the batches listed: `fetcher.Fetcher.schedule_first_page` lists a
   page (`BatchLister`), leaves out what must wait, and fills the `Scheduler`.
3. `Worker._drain` takes one request after the other. `Fetcher.next_request` locks and reads the next batch file
   (`BatchFile`), or several small ones if the sink combines files, and makes a `SendRequest` of it. The next one is
   prefetched meanwhile.
4. `Worker._deliver_request` calls `sender.Sender.send`. The sender waits until the pace (`pacing.Pacer`) and the destination
   allow a call, calls `Sink.deliver`, and asks `retry.decide` what the answer means: the part is done, split it, send the
   rest, wait, stop, defer the batch, or give it up for its age. It returns a `SendResult` once each record is accepted or
   rejected.
5. `retry.judge_rejections` decides whether rejections are final. A batch that was rejected as a whole is deferred
   (`Worker._defer_request`) until the destination has accepted another one, because only that proves the batch bad;
   `retry.PoisonTracker` remembers it.
6. `SendResult.to_sent_batch` gives each file its share of the result. If the sink needs confirmations, the `SentBatch` waits
   in `confirms.Confirmer` until the destination has confirmed it.
7. `settlement.Settler.settle_batch` writes dead letters and damaged bytes, then the ledger entry, and then deletes the file,
   or retains it. Each step is durable before the next.

Each part gets what it needs from above and returns what it found; none calls back into the worker. All waiting goes through
`housekeeping.Housekeeping`, which meanwhile settles what is due, writes the heartbeat, compresses waiting batches
(`compactor.Compactor`) and prefetches. Decisions (`retry`, `pacing`, `fetcher.Scheduler`) are pure: they get the time as an
argument and touch no file. `status.StatusReporter` shows the current state in `stats()`, in the log and in the heartbeat.
"""
