"""The SpacetimeDB sink, for `spacetimedb://host:port/database`. Its users read `docs/how-to/spacetimedb.md`.

url.py        parses the sink URL and finds the token
schema.py     parses the schema that the database returns
encoding.py   encodes events as arguments of the module's function
responses.py  maps a response to a delivery result
http1.py      speaks HTTP/1.1 over one connection
pool.py       the connections to one server
sink.py       the sink: binds to the module, sends calls, classifies responses, confirms
publish.py    publishes the module that ships in `wasm/`
scaffold.py   generates the Rust module for an event type of your own

A 200 response is not durable: a server that is killed right after it may lose what it accepted last. A batch is therefore
confirmed only by a later response of the same server process: to a query that waits for durability (2.x), or to a ping after
one second (1.x). That it is the same process follows from its being the same connection.
"""

from pillarbox.sinks.spacetimedb.sink import SpacetimeDbSink

__all__ = ["SpacetimeDbSink"]
