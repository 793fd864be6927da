#!/usr/bin/env bash
# GPU tests on a bare machine: its own python3 with PyTorch and pytest, no virtual environment, no network.
#   tests/gpu/run.sh [pytest arguments]        PYTHON=python3 names the interpreter
#   FOLDKV_GPU_SANITIZE=1 runs tests/gpu/sanitize.sh too; FOLDKV_GPU_RECORD=FILE writes the outcome as JSON
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=test-gpu
source tools/use_extension.sh
"$python" -m foldkv doctor
mkdir -p build
junit=build/gpu-tests.xml status=0
"$python" -m pytest -m gpu -p no:cacheprovider --junitxml="$junit" tests/gpu "$@" || status=$?
if [[ ${FOLDKV_GPU_SANITIZE:-0} == 1 ]]; then
  PYTHON=$python bash tests/gpu/sanitize.sh || status=1
fi
if [[ -n ${FOLDKV_GPU_RECORD:-} ]]; then
  "$python" tests/gpu/record.py "$junit" "$FOLDKV_GPU_RECORD"
fi
exit $status
