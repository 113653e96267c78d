"""What `make bench` measures, each beside what it is compared with, in the same run.

`plan` has the words; a module for each section or several says what is compared (`sections` lists them); `run` gives everybody
a turn in each round, as a process (`child`), and makes `results` of it, which `page` turns into docs/dev/benchmarks.md.
`recovery` is a simulation, and runs by itself.
"""
