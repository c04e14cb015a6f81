#!/usr/bin/env bash
# Checks and times the ops, attention, a layer and a training step on this GPU: one table, in 8 minutes, without network.
# Each part has seconds of its own, and what earlier parts left over.
# bash scripts/gpu_check.sh [DIRECTORY]            writes table.txt and rows.json there; ./gpu_check if not given
# bash scripts/gpu_check.sh [DIRECTORY] --smoke    tiny sizes on any backend, kernels interpreted: tests the check itself
# PYTHON names the interpreter; it needs JAX, Flax, Optax and NumPy, and for the rows of PyTorch also PyTorch and
# PEER-pytorch, which may lie in a folder that PYTHONPATH names.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname -- "${BASH_SOURCE[0]}")/gpu_check" "$@"
