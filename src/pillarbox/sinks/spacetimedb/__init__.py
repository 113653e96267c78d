"""SpacetimeDB: `spacetimedb://host:port/database`, over the server's HTTP interface. Its manual: `docs/how-to/spacetimedb.md`.

target.py    what the URL says
schema.py    what the database says of itself
fitting.py   how events become the function's arguments
answers.py   what an answer means
lanes.py     connections
sink.py      the sink: fit, call, classify, confirm
module.py    the module in `wasm/`, and putting it on a server
scaffold.py  the Rust for an event type of your own

A 200 is not durable: killed right after it, a server may have lost the newest of what it answered. So a batch is settled
only after something that the same server process says later: a query that waits for durability (2.x), or a ping after a
second (1.x); and that it is the same process shows in its being the same connection.
"""

from pillarbox.sinks.spacetimedb.sink import SpacetimeDbSink

__all__ = ["SpacetimeDbSink"]
