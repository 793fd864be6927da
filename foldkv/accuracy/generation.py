"""Greedy continuations: where a mode's text leaves the base's, how much of it stays, and what becomes of long texts.

Two runs of the same 16-bit cache part too, where two tokens are nearly as likely: that band stands beside the modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .sources import CacheSource, StockSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARKS = (32, 128, 512, 2048)
"""Lengths at which the share of equal texts is told, as far as the texts go."""

NGRAM = 4
SPLIT = 7


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens int64 `[prompts, tokens]`, and of each the base's probability of it, less that of the next best."""

    tokens: Tensor
    margin: Tensor


@torch.inference_mode()
def greedy(
    model: PreTrainedModel,
    source: CacheSource,
    prompts: Tensor,
    num_tokens: int,
    *,
    split: bool = False,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Continuation:
    """Continue prompts `[n, length]` by the most likely token, `num_tokens` times; nothing ends a text early.

    split: append the prompt in two pieces, for the band of the base.
    """
    prompts = prompts.to(model.device)
    cut = max(0, prompts.shape[1] - SPLIT) if split else 0
    with source.open(model) as new_cache:
        cache = new_cache(prompts.shape[0], prompts.shape[1] + num_tokens)
        if cut:
            model(prompts[:, :cut], past_key_values=cache, use_cache=True)
        part, tokens, margins = prompts[:, cut:], [], []
        for _ in range(num_tokens):
            logits = model(part, past_key_values=cache, use_cache=True).logits[:, -1].float()
            best = logits.softmax(-1).topk(2, dim=-1)
            tokens.append(best.indices[:, :1])
            margins.append(best.values[:, :1] - best.values[:, 1:])
            part = tokens[-1]
            advance(prompts.shape[0])
    return Continuation(torch.cat(tokens, dim=1).cpu(), torch.cat(margins, dim=1).double().cpu())


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


def compare_texts(base: Continuation, other: Continuation) -> dict[str, Any]:
    """How a run's texts stand to the base's.

    first: token at which each parts, None where it does not. match_N: share of texts equal in the first N tokens.
    same_N: share of tokens equal, place by place, in the first N. margin: median of how much surer the base was of its
    own token, where they part: near 0, a tie that any rounding decides.
    """
    equal = base.tokens == other.tokens
    length = equal.shape[1]
    first = [None if bool(row.all()) else int(row.int().argmin()) for row in equal]
    parted = [float(base.margin[i, at]) for i, at in enumerate(first) if at is not None]
    figures: dict[str, Any] = {
        "tokens": length,
        "texts": len(first),
        "first": first,
        "first_median": _median([length if at is None else at for at in first]),
        "margin": _median(parted) if parted else None,
        "repeated": repeated(other.tokens),
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

    prompts: int64 `[n, length]`. new_tokens: of each text. advance: called with the tokens generated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: CacheSource,
        prompts: Tensor,
        new_tokens: int,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        self.model, self.base, self.prompts, self.new_tokens, self.advance = model, base, prompts, new_tokens, advance
        self._own: Continuation | None = None

    @property
    def own(self) -> Continuation:
        """The base's continuations."""
        if self._own is None:
            self._own = self._continue(self.base)
        return self._own

    def _continue(self, source: CacheSource, split: bool = False) -> Continuation:
        return greedy(self.model, source, self.prompts, self.new_tokens, split=split, advance=self.advance)

    def _figures(self, text: Continuation) -> dict[str, Any]:
        nll = base_nll(self.model, self.prompts, text.tokens)
        return compare_texts(self.own, text) | {"base_nll": nll if math.isfinite(nll) else None}

    def compare(self, source: CacheSource) -> dict[str, Any]:
        """The figures of `compare_texts`, and base_nll: how likely the base finds the text, nats a token."""
        return self._figures(self._continue(source))

    def base_and_band(self) -> dict[str, Any]:
        """The base, and what 16 bits against 16 bits gives: its prompt in two pieces, and transformers' own cache."""
        own = base_nll(self.model, self.prompts, self.own.tokens)
        return {
            "prompt_len": self.prompts.shape[1],
            "tokens": self.new_tokens,
            "texts": self.prompts.shape[0],
            "base": {"base_nll": own, "repeated": repeated(self.own.tokens)},
            "band": {
                "split": self._figures(self._continue(self.base, split=True)),
                "stock": self._figures(self._continue(StockSource())),
            },
        }


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
