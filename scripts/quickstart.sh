#!/usr/bin/env bash
# From a clone to a comparison: makes .venv, trains four small language models (dense, MoE, PKM and PEER layers) at the
# same training FLOPs on the standard library's source, and prints the table. About 4 minutes on 2 cores.
#
# Usage: bash scripts/quickstart.sh [DIR]      DIR: where the runs go, runs/quickstart by default
# A run that is finished is not repeated; one that was interrupted goes on.
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

runs=${1:-runs/quickstart}
flops=3e11
started=$SECONDS

for layer in dense moe pkm peer; do
  echo "== $layer layers, $flops training FLOPs"
  peer-jax train --config configs/base.gin --config "configs/layers/$layer.gin" --config configs/sizes/tiny.gin \
    --config configs/data/python_stdlib.gin --set "Run.training_flops=$flops" --workdir "$runs/$layer" --no-table
done

peer-jax report "$runs"
echo "Runs are in $runs/{dense,moe,pkm,peer}: config.gin, metrics.jsonl, tensorboard/, checkpoints/, result.json."
echo "Training took $((SECONDS - started)) s. Next: peer-jax generate --workdir $runs/peer --prompt 'def '"
