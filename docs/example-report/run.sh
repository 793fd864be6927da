#!/usr/bin/env bash
# The example report of this folder: calibrate, report and ops on one GPU, in about two minutes.
#   docs/example-report/run.sh MODEL TEXT [OUT]        PYTHON=python3 names the interpreter
#   DEVICE=cpu SMALL=1 tries the commands without a GPU, at a size that says nothing
set -euo pipefail
model=$1 text=$2 out=${3:-docs/example-report}
cd "$(dirname "$0")/../.."
device=${DEVICE:-cuda}
if [[ $device == cpu ]]; then
  python=${PYTHON:-python3}
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
else
  NAME=example-report
  source tools/use_extension.sh
fi
mkdir -p build "$out"
calibrate=(--num-samples 64 --max-seq-len 2048)
report=(--windows 32 --window-len 2048 --decode-windows 32 --decode-len 1024 --new-tokens 256)
ops=(--level standard)
if [[ ${SMALL:-0} == 1 ]]; then
  calibrate=(--num-samples 4 --max-seq-len 128)
  report=(--level quick --windows 2 --window-len 128 --decode-windows 2 --decode-len 16)
  ops=(--level quick)
fi
dtype=float16
[[ $device == cpu ]] && dtype=float32
modes=c8,c8d,k8v4,c4,c4r
"$python" -m foldkv calibrate "$model" --out build/example_kv_cache --overwrite --device "$device" --dtype "$dtype" "${calibrate[@]}"
"$python" -m foldkv report "$model" --kv "$modes" --scales build/example_kv_cache --data "$text" \
  --device "$device" --dtype "$dtype" "${report[@]}" --out "$out"
"$python" -m foldkv report "$model" --ops --kv "$modes" --scales build/example_kv_cache --data "$text" \
  --device "$device" --dtype "$dtype" "${ops[@]}" --out "$out"
