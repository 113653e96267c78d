"""The benchmark that `make bench` runs: Pillarbox and its alternatives, measured alternately in one run.

`definitions` has the classes, and `sections` lists the modules with the sections. `run` runs every contestant once per round
in a process of its own (`round_process`) and writes `results`, from which `page` makes docs/dev/benchmarks.md. `recovery` is
a simulation and runs separately.
"""
