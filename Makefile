# make run    take sample data through an outbox into SQLite, and show what arrived
# make test   everything that must hold: linters, types, tests
# make bench  what docs/dev/benchmarks.md has, measured on this machine: printed, and in var/bench/results.json
# make docs   builds the documents as a site in var/site, and checks that nothing in it comes from the network
# make torture MINUTES=10  crash states, faults, kills, cuts, interleavings, answers at random for so long, then every mutant
# Each sets up what it needs in .venv. `pip install .` is enough to use the library.

.PHONY: run test bench docs torture requirements clean

run:
	@tools/environment run
	@.venv/bin/python examples/first_steps.py

test:
	@tools/environment test
	@tools/check

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

# Pins anew what the .in files and pyproject.toml ask for. Wants uv.
PIN = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade
requirements:
	$(PIN) --extra cli --extra spacetimedb requirements/run.in pyproject.toml --output-file requirements/run.txt
	$(PIN) --all-extras requirements/test.in pyproject.toml --output-file requirements/test.txt
	$(PIN) --all-extras --constraints requirements/test.txt requirements/bench.in pyproject.toml --output-file requirements/bench.txt
	$(PIN) --extra cli --extra spacetimedb --constraints requirements/test.txt requirements/docs.in pyproject.toml --output-file requirements/docs.txt

clean:
	rm -rf .venv build dist var .mypy_cache .ruff_cache .pytest_cache
