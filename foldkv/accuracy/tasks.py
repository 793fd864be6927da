"""Tasks of lm-evaluation-harness, scored through the cache.

The harness scores text with one forward pass that has no cache, and so says nothing about one. `CachedLM` is its own model for
transformers with that pass given a cache: by route "prefill" all tokens go through it in one piece; by route "decode" one by
one, through the engine's steps (on a GPU its graphs) where the source is a mode of foldkv. Generated text has a cache too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant.errors import ArgumentError, describe

from .evaluate import feed
from .mode_source import ModeSource
from .sources import CacheSource, NewCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LENGTH = 2048
ROUTES = ("prefill", "decode")


def check_installed() -> None:
    """ArgumentError unless lm_eval, and accelerate that its model needs, can be imported."""
    for package in ("lm_eval", "accelerate"):
        if find_spec(package) is None:
            fix = "pip install lm_eval accelerate"
            raise ArgumentError(describe("tasks", f"{package}, which runs them", "no such package", fix))


def run_tasks(
    model: PreTrainedModel, tokenizer: Any, source: CacheSource, tasks: Sequence[str], **options: Any
) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value for one source, "METRIC_stderr" beside it where the harness gives one.

    options: of `evaluate_tasks`.
    """
    found = evaluate_tasks(model, tokenizer, source, tasks, **options)
    return {task: _figures(found["results"][task]) for task in tasks}


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    source: CacheSource,
    tasks: Sequence[str],
    *,
    route: str = "prefill",
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> dict[str, Any]:
    """The harness's own result for one source, and under "foldkv" what went through its cache.

    tasks: names the harness knows, or of YAML files in `include_path`, which then alone are looked at, without a network.
    route: "prefill" or "decode". limit: examples of a task. max_length: tokens of a text; default 2048, or what the model
    can hold. Errors: ArgumentError for an unknown task or route, or without the harness.
    """
    check_installed()
    if route not in ROUTES:
        raise ArgumentError(describe("route", f"one of {', '.join(ROUTES)}", repr(route)))
    manager = import_module("lm_eval.tasks").TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=include_path is None
    )
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        known = ", ".join(sorted(manager.all_tasks)[:10])
        raise ArgumentError(describe("task", f"one of {known}, ..." if known else "a known one", repr(unknown[0])))
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or MAX_LENGTH
    length = max_length or min(MAX_LENGTH, longest)
    with source.open(model) as new_cache:
        lm = _lm_class()(model, tokenizer, source, new_cache, route=route, batch_size=batch_size, max_length=length)
        try:
            found: dict[str, Any] = import_module("lm_eval").simple_evaluate(
                model=lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
            )
        finally:
            lm.close()
    return {**found, "foldkv": {"cache": source.name, "route": route, "tokens_through_the_cache": lm.num_tokens}}


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a task's result; a filter's name is kept only where it is not "none"."""
    figures = {}
    for key, value in result.items():
        if isinstance(value, (int, float)) and "," in key:
            metric, _, chosen = key.partition(",")
            figures[metric if chosen == "none" else f"{metric},{chosen}"] = value
    return figures


def _lm_class() -> Any:
    """`CachedLM`; made here, as its base class comes with lm_eval."""

    class CachedLM(import_module("lm_eval.models.huggingface").HFLM):  # type: ignore[misc]
        """The harness's model for transformers, over a source that is open.

        num_tokens: that went through caches so far, padding included.
        """

        def __init__(
            self, model: PreTrainedModel, tokenizer: Any, source: CacheSource, new_cache: NewCache, *, route: str,
            batch_size: int, max_length: int,
        ) -> None:  # fmt: skip
            super().__init__(
                pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size, device=str(model.device)
            )  # fmt: skip
            self.source, self.new_cache, self.route, self.num_tokens = source, new_cache, route, 0
            self.engine: Any = None

        @torch.inference_mode()
        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            """Logits `[b, s, vocab]` of right-padded ids `[b, s]`."""
            self.num_tokens += inps.numel()
            if self.route == "prefill":
                return torch.cat([logits for _, logits in feed(self.model, self.new_cache, inps, inps.shape[1])], dim=1)
            if not isinstance(self.source, ModeSource):
                return torch.cat([logits for _, logits in feed(self.model, self.new_cache, inps, 1)], dim=1)
            if self.engine is None:
                from foldkv.engine import Engine

                self.engine = Engine(self.model, max_batch=self.batch_size, max_seq_len=self.max_length + 1)
            # The last token's successor is asked for too; what is fed for it is never seen.
            longer = torch.nn.functional.pad(inps, (0, 1))
            return torch.stack(list(self.engine.score(longer, prefill=1)), dim=1)

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
            self.num_tokens += context.shape[0] * max_length
            options |= {"past_key_values": self.new_cache(context.shape[0], max_length)}
            return super()._model_generate(context, max_length, stop, **options)

        def close(self) -> None:
            """Free the engine of route "decode"."""
            if self.engine is not None:
                self.engine.close()

    return CachedLM
