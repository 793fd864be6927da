# To be sourced in the root of a checkout: chooses python and makes sure that quant._C is built from exactly these sources.
# One that is (it may have been carried here) is used as it is. For machines with a GPU, PyTorch and no virtual environment.
#   PYTHON=python3 names the interpreter; NAME is what asks, for its messages
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

"$python" -c "import sys, torch; torch.cuda.is_available() or sys.exit('${NAME:-foldkv}: expected a CUDA device, got none')"

built_from() {
  "$python" -c 'import torch, json, quant._C as c; print(json.loads(c.build_info())["sources"])' 2>/dev/null || true
}

if [[ $(built_from) == "$("$python" tools/source_hash.py)" ]]; then
  echo "extension: as it is, built from these sources"
else
  echo "extension: absent or built from other sources, building"
  FOLDKV_CUDA=1 "$python" setup.py --quiet build_ext --inplace
fi
echo "commit ${FOLDKV_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}, $(date -u +%Y-%m-%dT%H:%MZ)"
