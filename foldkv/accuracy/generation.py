"""Greedy continuations: where a mode's text leaves the base's, how much of it stays, and what becomes of long texts.

Two runs of the same 16-bit cache part too, where two tokens are nearly as likely: that band stands beside the modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .mode_source import PIECE, ModeSource
from .sources import CacheSource, StockSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARKS = (32, 128, 512, 2048)
"""Lengths at which the share of equal texts is told, as far as the texts go."""

NGRAM = 4


@torch.inference_mode()
def greedy(
    model: PreTrainedModel,
    source: CacheSource,
    prompts: Tensor,
    num_tokens: int,
    *,
    engine: bool,
    split: bool = False,
    advance: Callable[[int], object] = lambda tokens: None,
) -> tuple[Tensor, bool]:
    """Tokens int64 `[n, num_tokens]` after prompts `[n, length]`, each the most likely one; nothing ends a text early.

    engine: modes of ours go through `foldkv.Engine`, all prompts in a batch, else through the model's forward pass. split:
    append prompts in pieces, and with the engine half the batch at a time: for the band. Gives also whether every step was
    the replay of a CUDA graph.
    """
    prompts = prompts.to(model.device)
    with source.open(model) as new_cache:
        if engine and isinstance(source, ModeSource):
            return source.generate(model, prompts, num_tokens, pieces=split, advance=advance)
        cache = new_cache(prompts.shape[0], prompts.shape[1] + num_tokens)
        cut = max(0, prompts.shape[1] - PIECE) if split else 0
        if cut:
            model(prompts[:, :cut], past_key_values=cache, use_cache=True)
        part, tokens = prompts[:, cut:], []
        for _ in range(num_tokens):
            part = model(part, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            tokens.append(part)
            advance(prompts.shape[0])
    return torch.cat(tokens, dim=1).cpu(), False


@torch.inference_mode()
def margins(model: PreTrainedModel, source: CacheSource, prompts: Tensor, tokens: Tensor) -> Tensor:
    """fp64 `[n, t]`: how much likelier a source finds its most likely token than the next, where it wrote `tokens`."""
    ids = torch.cat((prompts.cpu(), tokens), dim=1).to(model.device)
    found = []
    with source.open(model) as new_cache:
        for row in ids:
            cache: Any = new_cache(1, len(row) - 1)
            logits = model(row[None, :-1], past_key_values=cache, use_cache=True).logits[0, prompts.shape[1] - 1 :]
            best = logits.float().softmax(-1).topk(2, dim=-1).values
            found.append((best[:, 0] - best[:, 1]).double().cpu())
    return torch.stack(found)


@torch.inference_mode()
def base_nll(model: PreTrainedModel, prompts: Tensor, tokens: Tensor) -> float:
    """Mean negative log-likelihood, nats, of continuations under the model with its own 16-bit-or-wider cache."""
    total = 0.0
    with StockSource().open(model):
        for prompt, text in zip(prompts, tokens, strict=True):
            ids = torch.cat((prompt, text))[None].to(model.device)
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
            total += float(-logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).mean())
    return total / len(prompts)


def repeated(tokens: Tensor) -> float:
    """Share of a text's 4-grams that it has had before: a text that loops tends to 1."""
    shares = []
    for row in tokens.tolist():
        grams = [tuple(row[i : i + NGRAM]) for i in range(len(row) - NGRAM + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def compare_texts(base: Tensor, margin: Tensor, other: Tensor) -> dict[str, Any]:
    """How a run's texts stand to the base's: tokens `[n, t]` each, and the margins of the base's.

    first: token at which each parts, None where it does not. match_N: share of texts equal in the first N tokens.
    same_N: share of tokens equal, place by place, in the first N. margin: median of how much surer the base was of its
    own token, where they part: near 0, a tie that any rounding decides.
    """
    equal = base == other
    length = equal.shape[1]
    first = [None if bool(row.all()) else int(row.int().argmin()) for row in equal]
    parted = [float(margin[i, at]) for i, at in enumerate(first) if at is not None]
    figures: dict[str, Any] = {
        "tokens": length,
        "texts": len(first),
        "first": first,
        "first_median": _median([length if at is None else at for at in first]),
        "margin": _median(parted) if parted else None,
        "repeated": repeated(other),
    }
    for mark in marks(length):
        figures[f"match_{mark}"] = sum(at is None or at >= mark for at in first) / len(first)
        figures[f"same_{mark}"] = float(equal[:, :mark].double().mean())
    return figures


def marks(length: int) -> list[int]:
    """The lengths of `MARKS` that texts of `length` reach; the whole length where they reach none."""
    return [mark for mark in MARKS if mark <= length] or [length]


class Texts:
    """The continuations of the base, made once, and how those of other sources stand to them.

    prompts: int64 `[n, length]`. new_tokens: of each. engine: whether sources with kernels go through `foldkv.Engine`.
    advance: called with the tokens generated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: CacheSource,
        prompts: Tensor,
        new_tokens: int,
        engine: bool,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        self.model, self.base, self.prompts, self.new_tokens = model, base, prompts, new_tokens
        self.engine, self.advance = engine, advance
        self.graphs: dict[str, bool] = {}  # by source

    @cached_property
    def own(self) -> Tensor:
        """The base's continuations."""
        return self._continue(self.base)

    @cached_property
    def margin(self) -> Tensor:
        """How much likelier the base found each of its tokens than the next best."""
        return margins(self.model, self.base, self.prompts, self.own)

    def _continue(self, source: CacheSource, split: bool = False) -> Tensor:
        tokens, self.graphs[source.name] = greedy(
            self.model, source, self.prompts, self.new_tokens, engine=self.engine, split=split, advance=self.advance
        )
        return tokens

    def _figures(self, text: Tensor) -> dict[str, Any]:
        nll = base_nll(self.model, self.prompts, text)
        return compare_texts(self.own, self.margin, text) | {"base_nll": nll if math.isfinite(nll) else None}

    def compare(self, source: CacheSource) -> dict[str, Any]:
        """The figures of `compare_texts`, and base_nll: how likely the base finds the text, nats a token."""
        return self._figures(self._continue(source))

    def base_and_band(self) -> dict[str, Any]:
        """The base, and what 16 bits against 16 bits gives: prompts in pieces, and transformers' own cache.

        engine: whether the base and the modes wrote through `foldkv.Engine`, graphs: and by replay of CUDA graphs;
        transformers' cache never does.
        """
        return {
            "prompt_len": self.prompts.shape[1],
            "tokens": self.new_tokens,
            "texts": self.prompts.shape[0],
            "engine": self.engine,
            "base": {"base_nll": base_nll(self.model, self.prompts, self.own), "repeated": repeated(self.own)},
            "graphs": self.graphs[self.base.name],
            "band": {
                "split": self._figures(self._continue(self.base, split=True)),
                "stock": self._figures(self._continue(StockSource())),
            },
        }


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
