#!/usr/bin/env bash
# Makes .venv if needed, checks lint and format, and runs the tests.
#
# Usage: bash scripts/test.sh [--all | ARGUMENT ...]
#   --all: also the tests marked as slow, such as those of whole programs, killed processes and many devices; it takes
#     three to four times as long
#   ARGUMENT: passed to pytest, which then runs without ruff and in one process, such as -k product_key -x
# PEER_JAX_NEWEST=1 tests with the newest packages that requirements.txt allows, see environment.sh.
set -euo pipefail
start=$SECONDS
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

which="not slow"
if [ "${1:-}" = --all ]; then
  which="" && shift
fi
lint=0
if [ $# = 0 ]; then
  ruff check . || lint=1
  ruff format --check . || lint=1
  # Processes take whole files, because the tests of a file share what they prepare, in the order of tests/conftest.py.
  set -- -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "$which"
fi
status=0
python -m pytest "$@" || status=$?

outcome="pytest exited with $status"
if [ $lint != 0 ]; then
  outcome="$outcome; ruff found faults, printed above the tests (.venv/bin/ruff check --fix && .venv/bin/ruff format mends most)"
  [ $status != 0 ] || status=1
fi
printf '%s; %s s in all.\n' "$outcome" "$((SECONDS - start))"
exit $status
