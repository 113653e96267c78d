# make run      take sample data through an outbox into SQLite, and show what arrived
# make check    linters, types and unit tests: no server, nothing to build
# make test     everything that must hold, the real servers included
# make proof    the exhaustive checks: crash states, interleavings, torture, mutants, sanitizers, packages
# make docs     the documentation as a site, in var/site
# make bench    measure the figures of docs/dev/benchmarks.md on this machine; prints them and writes var/bench/results.json
# make torture MINUTES=10   crash states, faults, kills, power cuts, interleavings and random responses for 10 minutes, then every mutant
# make pythons  the unit tests on every Python from 3.11 on that is installed here
# Each sets up what it needs in .venv. `pip install .` is enough to use the library.

.PHONY: run check test proof docs bench torture pythons requirements clean

run:
	@tools/environment run
	@.venv/bin/python examples/first_steps.py

check:
	@tools/environment test
	@tools/check

test:
	@tools/environment test
	@tools/test

proof:
	@tools/environment test
	@tools/proof

bench:
	@tools/environment bench
	@.venv/bin/python -m bench

docs:
	@tools/environment docs
	@tools/site

MINUTES = 10
torture:
	@tools/environment test
	@.venv/bin/python -m tests.crash --minutes $(MINUTES)

pythons:
	@tools/pythons

# Updates the pinned versions from the .in files and pyproject.toml. Needs uv.
PIN = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade
requirements:
	$(PIN) --extra cli --extra spacetimedb requirements/run.in pyproject.toml --output-file requirements/run.txt
	$(PIN) --all-extras requirements/test.in pyproject.toml --output-file requirements/test.txt
	$(PIN) --all-extras --constraints requirements/test.txt requirements/bench.in pyproject.toml --output-file requirements/bench.txt
	$(PIN) --extra cli --extra spacetimedb --constraints requirements/test.txt requirements/docs.in pyproject.toml --output-file requirements/docs.txt

clean:
	rm -rf .venv build dist var .mypy_cache .ruff_cache .pytest_cache
