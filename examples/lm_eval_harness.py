"""lm-evaluation-harness on a swapped model, so that every score really passes through the quantised cache.

    pip install lm_eval accelerate
    python examples/lm_eval_harness.py MODEL --kv c16,c8,c4 --tasks lambada_openai [--route decode] [--limit 100]

The harness scores text with one forward pass that uses no cache, and so would a swapped model. `foldkv.accuracy.evaluate_tasks`
gives that pass a cache: with route "prefill" all tokens go through it in one piece; with route "decode" they go in one by one,
through the steps (on a GPU the graphs) that serve. What a task generates goes through the cache too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lm_eval.utils import make_table

import foldkv
from foldkv.accuracy import evaluate_tasks, make_source


def evaluate(
    model: Any, tokenizer: Any, tasks: list[str], kv: str, scales: foldkv.KVScales | None = None, **options: Any
) -> dict[str, Any]:
    """The harness's result for `model` on a cache of mode `kv`; the model is as it was afterwards."""
    return evaluate_tasks(model, tokenizer, make_source(kv, model, scales), tasks, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kv", default="c16,c8,c4")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--route", choices=("prefill", "decode"), default="prefill")
    parser.add_argument("--include-path")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model, tokenizer = foldkv.load_model(options.model, device=options.device)
    folder = Path(options.model) / "kv_cache"
    scales = foldkv.KVScales.load(folder, model.config) if folder.is_dir() else None
    for kv in options.kv.split(","):
        result = evaluate(
            model, tokenizer, options.tasks.split(","), kv, scales, route=options.route,
            include_path=options.include_path, limit=options.limit,
        )  # fmt: skip
        print(f"\n{kv}, route {options.route}, {result['foldkv']['tokens_through_the_cache']} tokens through the cache")
        print(make_table(result))


if __name__ == "__main__":
    main()
