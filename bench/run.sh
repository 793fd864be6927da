#!/usr/bin/env bash
# The CUDA benchmark on a bare machine: its own python3 with PyTorch, typer and safetensors, no virtual environment.
#   bench/run.sh [foldkv bench arguments]        without any: every suite, into build/bench/cuda.json
#   bench/run.sh --model llama3-8b-shape --kv c16,c8,c4 --cases 56x8k,64x8k --no-ttft --out build/bench/model.json
#                                                whole models on the engine, about 2 minutes (with --compile about 1 more a row)
# FlashInfer is timed beside ours where the interpreter finds it (PYTHONPATH).
set -euo pipefail
cd "$(dirname "$0")/.."
NAME=bench
source tools/use_extension.sh
[[ $# -gt 0 ]] || set -- --suite all --out build/bench/cuda.json
exec "$python" -m foldkv bench --device cuda "$@"
