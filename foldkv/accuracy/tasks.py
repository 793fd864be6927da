"""Tasks of lm-evaluation-harness, scored through the cache.

The harness scores text with one forward pass that has no cache, and so says nothing about one. `CachedLM` gives each request
a cache of its own: K and V are written and read back before attention sees them.
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

from .sources import CacheSource, NewCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LENGTH = 2048
MAX_NEW = 256


def check_installed() -> None:
    """ArgumentError unless lm_eval can be imported."""
    if find_spec("lm_eval") is None:
        raise ArgumentError(describe("tasks", "lm_eval, which runs them", "no such package", "pip install lm_eval"))


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    source: CacheSource,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value for one source, "METRIC_stderr" beside it where the harness gives one.

    tasks: names the harness knows, or of YAML files in `include_path`, which then alone are looked at, without a network.
    limit: examples of a task. Errors: ArgumentError for an unknown task.
    """
    check_installed()
    manager = import_module("lm_eval.tasks").TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=include_path is None
    )
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        known = ", ".join(sorted(manager.all_tasks)[:10])
        raise ArgumentError(describe("task", f"one of {known}, ..." if known else "a known one", repr(unknown[0])))
    with source.open(model) as new_cache:
        found = import_module("lm_eval").simple_evaluate(
            model=_lm_class()(model, tokenizer, new_cache), tasks=list(tasks), task_manager=manager, limit=limit,
            bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    return {task: _figures(found["results"][task]) for task in tasks}


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
    rolling = import_module("lm_eval.utils")

    class CachedLM(import_module("lm_eval.api.model").TemplateLM):  # type: ignore[misc]
        """A harness model whose every request goes through a fresh cache, its tokens appended in one piece."""

        def __init__(self, model: PreTrainedModel, tokenizer: Any, new_cache: NewCache) -> None:
            super().__init__()
            self.model, self.tokenizer, self.new_cache = model, tokenizer, new_cache
            config = model.config.get_text_config(decoder=True)
            self.max_length = min(MAX_LENGTH, getattr(config, "max_position_embeddings", None) or MAX_LENGTH)

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            return self.tokenizer.encode(string, add_special_tokens=False)

        @torch.inference_mode()
        def _logits(self, ids: Sequence[int]) -> Tensor:
            """fp32 log-probabilities `[tokens, vocab]`."""
            tokens = torch.tensor([ids], device=self.model.device)
            cache: Any = self.new_cache(1, len(ids))
            return self.model(tokens, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> list[Any]:
            results = []
            for _, context, continuation in requests:
                ids = ([*context, *continuation])[-(self.max_length + 1) :]
                log_p = self._logits(ids[:-1])[-len(continuation) :]
                target = torch.tensor(continuation, device=log_p.device)[: len(log_p), None]
                score = float(log_p.gather(-1, target).sum())
                results.append((score, bool((log_p.argmax(-1) == target[:, 0]).all())))
            return results

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            results = []
            for request in requests:
                windows = rolling.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]), prefix_token=self.eot_token_id,
                    max_seq_len=self.max_length, context_len=1,
                )  # fmt: skip
                pairs = [(("", ""), *pair) for pair in map(rolling.make_disjoint_window, windows)]
                results.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
            return results

        @torch.inference_mode()
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self._continue(*request.args) for request in requests]

        def _continue(self, context: str, options: dict[str, Any]) -> str:
            stops: list[str] = options.get("until") or []
            count = options.get("max_gen_toks", MAX_NEW)
            ids = self.tok_encode(context)[-(self.max_length - count) :]
            part = torch.tensor([ids], device=self.model.device)
            cache: Any = self.new_cache(1, len(ids) + count)
            made: list[int] = []
            for _ in range(count):
                part = self.model(part, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                made.append(int(part))
                text = self.tokenizer.decode(made)
                if made[-1] == self.eot_token_id or any(stop in text for stop in stops):
                    break
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            for stop in stops:
                text = text.split(stop)[0]
            return text

    return CachedLM
