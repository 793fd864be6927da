#!/usr/bin/env bash
# Every kernel under compute-sanitizer: one line a tool, also in build/gpu-sanitize.txt; ends with an error if one complains.
#   tests/gpu/sanitize.sh [tools]      default: memcheck racecheck initcheck synccheck; PYTHON=python3 names the interpreter
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=sanitize
source tools/use_extension.sh
export PYTHONPATH=$PWD/tests:$PYTHONPATH
# PyTorch's allocator hands out parts of large blocks, in which an overrun stays unseen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1 || true)
[[ -n $sanitizer ]] || { echo "sanitize: expected compute-sanitizer of the CUDA toolkit, got none" >&2; exit 1; }
# Our kernels alone; but initcheck must see what PyTorch's kernels write.
[[ $("$sanitizer" --help 2>&1) == *--kernel-name* ]] && ours=(--kernel-name kns=foldkv) || ours=(--kernel-regex kns=foldkv)

mkdir -p build
lines=build/gpu-sanitize.txt
echo "sources $("$python" tools/source_hash.py)" >"$lines"
[[ $# -gt 0 ]] || set -- memcheck racecheck initcheck synccheck
status=0
for tool; do
  log=build/gpu-sanitize-$tool.txt began=$SECONDS code=0
  options=(--tool "$tool" --error-exitcode 9)
  [[ $tool == initcheck ]] || options+=("${ours[@]}")
  [[ $tool != memcheck ]] || options+=(--report-api-errors no) # PyTorch asks the driver for what it may not have
  "$sanitizer" "${options[@]}" "$python" -m gpu.sanitize_suite >"$log" 2>&1 || code=$?
  [[ $code != 0 ]] || grep -q "all kernels ran" "$log" || code=1
  summary=$(grep -oE '(ERROR|RACECHECK) SUMMARY: .*' "$log" | tail -1 || true)
  echo "$tool: ${summary:-no summary}, exit $code, $((SECONDS - began)) s" | tee -a "$lines"
  if [[ $code != 0 ]]; then
    status=1
    tail -n 30 "$log" >&2
  fi
done
exit $status
