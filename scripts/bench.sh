#!/usr/bin/env bash
# Benchmarks the ops, the layers and the training step, and says which share of their floor they reach; see
# docs/performance.md. Makes .venv if needed.
#
# Usage: bash scripts/bench.sh op|layer|step [ARGUMENT ...]
#   ARGUMENT: passed to `peer-jax bench`, such as --quick, --tokens 2048 or --out DIR; --help lists all.
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

peer-jax bench "$@"
