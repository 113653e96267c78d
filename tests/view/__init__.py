"""Looking at an outbox from outside, step by step."""
