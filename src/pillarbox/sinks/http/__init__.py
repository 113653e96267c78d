"""The HTTP sink, for `https://host/path`: one POST request for each batch. Its users read `docs/how-to/http.md`.

url.py        parses the sink URL, and reads the secrets that it names from the environment
encoding.py   encodes a batch as a request body
responses.py  maps a response to a delivery result
sink.py       the sink: sends requests, classifies responses, checks the destination

Each request carries the batch id as `Idempotency-Key`, the same at every attempt. A destination that remembers the keys
therefore stores no event twice. A status has the meaning that HTTP gives it; a response body that says more is believed.
"""

from pillarbox.sinks.http.sink import HttpSink

__all__ = ["HttpSink"]
