"""Environments that change how Python runs: greenlets, servers that embed Python, forks in C."""
