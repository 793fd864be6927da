#!/usr/bin/env bash
# The CUDA benchmark on a bare machine: its own python3 with PyTorch, typer and safetensors, no virtual environment.
#   bench/run.sh [foldkv bench arguments]        without any: every suite, into build/bench/cuda.json
# FlashInfer is timed beside ours where the interpreter finds it (PYTHONPATH).
set -euo pipefail
cd "$(dirname "$0")/.."
NAME=bench
source tools/use_extension.sh
[[ $# -gt 0 ]] || set -- --suite all --out build/bench/cuda.json
exec "$python" -m foldkv bench --device cuda "$@"
