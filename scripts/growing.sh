#!/usr/bin/env bash
# Whether growing pays: at equal training FLOPs, a run with SMALL experts, one with LARGE, and one that grows half-way.
#
# Usage: bash scripts/growing.sh [DIRECTORY] [FLAG ...]
#   DIRECTORY: gets the runs, runs/growing if not given. The same command goes on where it was stopped.
#   FLAG: for each `peer-jax train`, such as --set AdamW.b2=0.99; a macro, such as TABLE_RATE, can't be set here.
# FLOPS, SMALL, LARGE, LAYER, SEEDS and EVERY, the steps between two checkpoints, are set in the environment.
# Cost: for each seed, 3 runs of 3e11 FLOPs at d_model 32.
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
out=${1:-runs/growing}
every=${EVERY:-50} large=${LARGE:-262144}
common=(--quiet --no-table --set "Run.training_flops=${FLOPS:-3e11}" --set Run.keep_checkpoints=1000
  --set "Run.checkpoint_every=$every" --set AdamW.learning_rate=0.007 "${@:2}")
files=(--config configs/base.gin --config "configs/layers/${LAYER:-peer}.gin" --config configs/sizes/tiny.gin
  --config configs/data/python_stdlib.gin)

for seed in ${SEEDS:-0}; do
  small=$out/small-seed$seed
  peer-jax train "${files[@]}" "${common[@]}" --set "NUM_EXPERTS=${SMALL:-16384}" --set "Run.seed=$seed" \
    --workdir "$small"
  peer-jax train "${files[@]}" "${common[@]}" --set "NUM_EXPERTS=$large" --set "Run.seed=$seed" \
    --workdir "$out/large-seed$seed"
  last=$(find "$small/checkpoints" -mindepth 1 -maxdepth 1 -name '[0-9]*' -printf '%f\n' | sort -n | tail -n 1)
  saves=$(((last + every) / (2 * every)))
  half=$((saves * every))
  peer-jax train --grow "$large" --from "$small" --checkpoint "$half" "${common[@]}" --workdir "$out/grown-seed$seed"
done
peer-jax report "$out"
