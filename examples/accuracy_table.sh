#!/usr/bin/env bash
# The table of docs/accuracy.md: a trained Llama checkpoint and three made hard of it, each calibrated twice and measured, all
# four at the same time.
#
#   examples/accuracy_table.sh MODEL CALIBRATION_TEXT TEST_TEXT WORK [DEVICE] [WINDOWS]
#
# DEVICE: cuda (default) or cpu. WINDOWS: 64 of 1024 tokens. WORK: a folder for checkpoints, scales, logs and NAME.json; what is
# there already is used again. PYTHON: the interpreter, python3 by default. CALIBRATE, TABLE: further options of `foldkv calibrate` and of
# accuracy_table.py. Prints the joined table and writes WORK/record.json; exits with 1 if a checkpoint failed, naming its log.
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
model=$1 text=$2 test=$3 work=$4 device=${5:-cuda} windows=${6:-64}
examples=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$examples/..${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$work"

# checkpoint NAME [options of harden_checkpoint.py]
checkpoint() {
  local name=$1 from=$model
  shift
  if [ $# -gt 0 ]; then
    from=$work/$name
    [ -f "$from/config.json" ] || "$python" "$examples/harden_checkpoint.py" "$model" "$from" "$@"
  fi
  local calibrate=("$python" -m foldkv calibrate "$from" --data "$text" --dtype float32 --device "$device" --no-progress)
  # shellcheck disable=SC2206
  calibrate+=(${CALIBRATE:-})
  [ -d "$work/$name.kv" ] || "${calibrate[@]}" --mode auto --budget-bits 4.5 --out "$work/$name.kv"
  [ -d "$work/$name.kv4" ] || "${calibrate[@]}" --mode c4 --out "$work/$name.kv4"
  # shellcheck disable=SC2086
  "$python" "$examples/accuracy_table.py" "$from" --scales "$work/$name.kv" --c4-scales "$work/$name.kv4" --data "$test" \
    --device "$device" --windows "$windows" --only tables --json "$work/$name.json" ${TABLE:-}
}

declare -A running
start() { checkpoint "$@" > "$work/$1.log" 2>&1 & running[$1]=$!; }
start llama
start llama_hard --spread 1.5
start qwen2 --qwen2 --bias 6
start qwen2_hard --qwen2 --bias 50 --spread 1.5 --seed 1
failed=0
for name in "${!running[@]}"; do
  wait "${running[$name]}" || { failed=1; echo "$name failed:" >&2; tail -n 20 "$work/$name.log" >&2; }
done
[ $failed = 0 ] || exit 1
"$python" "$examples/accuracy_table.py" --join "$work"/{llama,llama_hard,qwen2,qwen2_hard}.json --device "$device" --json "$work/record.json"
