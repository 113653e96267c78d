"""Surroundings in which Python is not as CPython makes it: greenlets, servers that embed it, forks made in C."""
