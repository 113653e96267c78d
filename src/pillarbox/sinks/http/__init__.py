"""HTTP: `https://host/path`, one POST for each batch. `docs/how-to/http.md` is for its users.

target.py    what the URL says, and what the environment adds
bodies.py    how events become a body
answers.py   what an answer means
sink.py      the sink: post, classify, check

The batch's id goes along as `Idempotency-Key`, the same at every attempt: a destination that keeps the keys it has seen shows
no event twice. What a status means is HTTP's, not one server's; where a body says more, it is believed.
"""

from pillarbox.sinks.http.sink import HttpSink

__all__ = ["HttpSink"]
