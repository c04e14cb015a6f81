#!/usr/bin/env bash
# Benchmarks of the ops, the layers and the training step, with the share of their floor that they reach; see
# docs/performance.md. Makes .venv if needed.
#
# Usage: bash scripts/bench.sh op|layer|step [ARGUMENT ...]
#   Arguments go to `peer-jax bench`: --quick, --tokens 2048, --out DIR ...; bash scripts/bench.sh --help lists them.
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

peer-jax bench "$@"
