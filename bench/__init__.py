"""The benchmark that `make bench` runs: Pillarbox and its alternatives, measured alternately in one run.

`plan` has the classes; each section is in a module (`sections` lists them); `run` runs every contestant once per round in a
process of its own (`child`) and writes `results`, from which `page` makes docs/dev/benchmarks.md. `recovery` is a simulation
and runs separately.
"""
