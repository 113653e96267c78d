"""Crashes, faults and interleavings of the real code, on simulated and real file systems."""
