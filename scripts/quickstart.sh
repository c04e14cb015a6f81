#!/usr/bin/env bash
# From a clone to isoFLOP curves: makes .venv, trains dense, MoE, PKM and PEER models of four sizes at the same training
# FLOPs on the standard library's source, and draws the report. About 5 minutes on 2 cores.
#
# Usage: bash scripts/quickstart.sh [DIR [ARGUMENT ...]]
#   DIR: where the runs go, runs/quick by default; arguments go to `peer-jax sweep`, such as --set 'Sweep.seeds=(0,1)'
# A run that is finished is not repeated; one that was interrupted goes on.
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

runs=${1:-runs/quick}
peer-jax sweep --config configs/sweeps/isoflop_quick.gin --workdir "$runs" "${@:2}"
peer-jax report "$runs"
echo "Next: open it, and: peer-jax generate --workdir $runs/peer-d16-2e11-seed0 --prompt 'def '"
