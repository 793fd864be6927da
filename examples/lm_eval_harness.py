"""lm-evaluation-harness on a swapped model, so that every score really passes through the quantised cache.

    pip install lm_eval accelerate
    python examples/lm_eval_harness.py MODEL --kv c16,c8,c4 --tasks lambada_openai [--route decode] [--limit 100]

The harness scores text with one forward pass that uses no cache, and so would a swapped model. `SwappedLM` gives that pass a
cache: with route "prefill" all tokens go through it in one piece; with route "decode" they go in one by one, through the
steps (on a GPU the graphs) that serve. Generation tasks run on the cache by themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from torch import Tensor

import foldkv

MAX_BATCH = 16


class SwappedLM(HFLM):
    """A harness model over `model`, which `foldkv.swap_kv_cache` has swapped already. route: "prefill" or "decode"."""

    def __init__(
        self, model: Any, tokenizer: Any, *, route: str = "prefill", max_length: int = 2048, **options: Any
    ) -> None:
        device = str(model.device)
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, device=device, **options)
        self.swap = model.__dict__["_foldkv_swap"]
        self.route = route
        self.num_tokens = 0  # that went through the cache
        self._engine: foldkv.Engine | None = None

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits `[b, s, vocab]` of right-padded ids `[b, s]`, with K and V read back from the quantised cache."""
        self.num_tokens += inps.numel()
        with torch.no_grad():
            if self.route == "decode":
                return torch.cat([self._decoded(part) for part in inps.split(MAX_BATCH)])
            cache = self.swap.new_cache(*inps.shape)
            logits: Tensor = self.model(inps, past_key_values=cache, use_cache=True).logits
            return logits

    def _decoded(self, inps: Tensor) -> Tensor:
        if self._engine is None:
            self._engine = foldkv.Engine(self.model, max_batch=MAX_BATCH, max_seq_len=self.max_length + 1)
        # The last token's successor is asked for too; what is fed for it is never seen.
        longer = torch.nn.functional.pad(inps, (0, 1))
        return torch.stack(list(self._engine.score(longer, prefill=1)), dim=1)

    def close(self) -> None:
        """Free the engine of route "decode"."""
        if self._engine is not None:
            self._engine.close()


def evaluate(
    model: Any, tokenizer: Any, tasks: list[str], kv: str, scales: foldkv.KVScales | None = None, *,
    route: str = "prefill", include_path: str | None = None, limit: int | None = None, batch_size: int = 8,
    max_length: int = 2048,
) -> dict[str, Any]:  # fmt: skip
    """The harness's result for `model` swapped to `kv`; the swap is undone afterwards."""
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    with foldkv.swap_kv_cache(model, kv, scales):
        adapter = SwappedLM(model, tokenizer, route=route, batch_size=batch_size, max_length=max_length)
        try:
            result = simple_evaluate(
                model=adapter, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
            )
        finally:
            adapter.close()
    assert result is not None
    return {**result, "foldkv": {"kv": kv, "route": route, "tokens_through_the_cache": adapter.num_tokens}}


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
