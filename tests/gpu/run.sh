#!/usr/bin/env bash
# GPU tests on a bare machine: its own python3 with PyTorch and pytest, no virtual environment, no network.
# An extension built from exactly these sources is used as it is (it may have been carried here); else it is built.
#   tests/gpu/run.sh [pytest arguments]        PYTHON=python3 names the interpreter
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

"$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("test-gpu: expected a CUDA device, got none")'

built_from() {
  "$python" -c 'import torch, json, quant._C as c; print(json.loads(c.build_info())["sources"])' 2>/dev/null || true
}

if [[ $(built_from) == "$("$python" tools/source_hash.py)" ]]; then
  echo "extension: as it is, built from these sources"
else
  echo "extension: absent or built from other sources, building"
  FOLDKV_CUDA=1 "$python" setup.py --quiet build_ext --inplace
fi
commit=$(git rev-parse --short HEAD 2>/dev/null || echo "${FOLDKV_COMMIT:-unknown}")
echo "commit $commit, $(date -u +%Y-%m-%dT%H:%MZ)"
"$python" -m foldkv doctor
"$python" -m pytest -m gpu -p no:cacheprovider tests "$@"
