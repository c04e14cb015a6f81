#!/usr/bin/env bash
# From a clone to isoFLOP curves: makes .venv, trains dense, MoE, PKM and PEER models of four sizes at the same training
# FLOPs on the source of Python's standard library, and draws the report. Takes about 5 minutes on 2 cores.
#
# Usage: bash scripts/quickstart.sh [DIR [ARGUMENT ...]]
#   DIR: the folder for the runs, runs/quick by default
#   ARGUMENT: passed to `peer-jax sweep`, such as --set 'Sweep.seeds=(0,1)'
# Given again, it skips the runs that are finished and continues those that were interrupted.
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

runs=${1:-runs/quick}
peer-jax sweep --config configs/sweeps/isoflop_quick.gin --workdir "$runs" "${@:2}"
peer-jax report "$runs"
echo "Next: open the report, or continue a text: peer-jax generate --workdir $runs/peer-d16-2e11-seed0 --prompt 'def '"
