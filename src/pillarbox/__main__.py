"""Runs the command line: `python -m pillarbox`."""

from pillarbox.cli import start

start()
