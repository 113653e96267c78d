# Shared by tools/check, tools/test and tools/proof: how a step is announced, and how many tests run at once. Sourced, not run.
# shellcheck shell=bash

step() { # COMMAND...: print it, run it, print how long it took
    local began=$SECONDS
    printf '== %s\n' "$*"
    "$@"
    printf '   %d s\n' "$((SECONDS - began))"
}

# The tests start some thousand commands, and each would compile the package again.
unset PYTHONDONTWRITEBYTECODE

workers=${PILLARBOX_TEST_WORKERS:-$(getconf _NPROCESSORS_ONLN)}
# These tests log text that is not UTF-8, which a pytest worker cannot report, so they run in the main process.
alone=(tests/delivery/test_hostile_sinks.py)

lint() {
    step .venv/bin/ruff check
    step .venv/bin/ruff format --check
    step .venv/bin/mypy
}

# Finds the programs and servers that the tests need besides Python packages. Tests of missing ones are left out, and
# `say_unchecked` names them at the end. Sets: ignored (pytest options), unchecked (sentences); exports the paths of the servers.
ignored=()
unchecked=()

find_filesystems() {
    printf '== file systems for the crash tests\n'
    tools/filesystems
}

find_servers() {
    printf '== promtool and prometheus, for deploy/prometheus\n'
    if ! tools/prometheus >/dev/null; then
        ignored+=(--ignore=tests/deploy/test_prometheus_files.py)
        unchecked+=("the alert rules and queries: promtool is missing")
    fi
    if ! command -v systemd-analyze >/dev/null; then
        ignored+=(--ignore=tests/deploy/test_systemd_unit.py)
        unchecked+=("the systemd unit: systemd-analyze is missing")
    fi
    printf '== the SpacetimeDB server that the tests talk to (built once: 10 to 20 minutes on two cores)\n'
    if PILLARBOX_TEST_SPACETIMEDB=$(tools/spacetimedb-server); then
        export PILLARBOX_TEST_SPACETIMEDB
        printf '== the SpacetimeDB module, from source (2 minutes the first time)\n'
        PILLARBOX_TEST_MODULES=$(mktemp -d)
        export PILLARBOX_TEST_MODULES
        trap 'rm -rf "$PILLARBOX_TEST_MODULES"' EXIT
        modules/spacetimedb/build "$PILLARBOX_TEST_MODULES"
    else
        ignored+=(--ignore=tests/sinks/spacetimedb)
        unchecked+=("everything about SpacetimeDB: its server is missing, see above")
    fi
}

say_unchecked() {
    local what
    for what in ${unchecked[@]+"${unchecked[@]}"}; do
        printf 'Not checked: %s\n' "$what" >&2
    done
}
