#!/usr/bin/env bash
# Checks and times the ops, attention, a layer and a training step on this GPU: one table, in 8 minutes, without network.
# bash scripts/gpu_check.sh [DIRECTORY]            writes table.txt and rows.json there; ./gpu_check if not given
# bash scripts/gpu_check.sh [DIRECTORY] --smoke    tiny sizes on any backend, kernels interpreted: tests the check itself
# PYTHON names the interpreter; it needs JAX, Flax, Optax and NumPy, and PyTorch for the rows of PyTorch.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname -- "${BASH_SOURCE[0]}")/gpu_check" "$@"
