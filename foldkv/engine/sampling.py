"""How the next token is chosen, on the device, without the host: greedy, temperature, top-k, top-p, a seed for each row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import ArgumentError, describe

MAX_STOP_IDS = 8
# Rows whose top-k is at most this need no sort of the vocabulary.
TOPK_CANDIDATES = 64
# The kinds of a step, cheapest first: a step is captured once for each kind that was wanted.
GREEDY, PLAIN, TOPK, SORTED = "greedy", "plain", "topk", "sorted"
KINDS = (GREEDY, PLAIN, TOPK, SORTED)


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence goes on, and when it ends.

    max_new_tokens: tokens at most. temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. Filters apply in the order
    temperature, top-k, top-p. seed: of this sequence; the same seed and prompt give the same tokens, whatever the batch
    (None: drawn from PyTorch's generator at submission). stop_token_ids: the token after which it ends, which is kept;
    None takes the model's eos tokens, () none.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
            ("temperature", "a finite number >= 0", math.isfinite(self.temperature) and self.temperature >= 0),
            ("top_k", "0 or more", self.top_k >= 0),
            ("top_p", "a fraction in (0, 1]", 0 < self.top_p <= 1),
            ("stop_token_ids", f"at most {MAX_STOP_IDS}", len(self.stop_token_ids or ()) <= MAX_STOP_IDS),
        )
        for name, wanted, holds in checks:
            if not holds:
                raise ArgumentError(describe(f"SamplingParams.{name}", wanted, repr(getattr(self, name))))

    @property
    def kind(self) -> str:
        """The cheapest kind of step that serves it."""
        if self.temperature == 0:
            return GREEDY
        if 0 < self.top_k <= TOPK_CANDIDATES:
            return TOPK
        return PLAIN if not self.top_k and self.top_p == 1 else SORTED


def common_kind(kinds: set[str]) -> str:
    """The kind that serves rows of all `kinds` in one step."""
    if len(kinds - {GREEDY}) > 1:
        return SORTED
    return max(kinds, key=KINDS.index)


def sample(
    logits: Tensor, kind: str, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """The next token of each row: int64 `[b]`.

    logits `[b, vocab]`; temperature, top_p fp32, top_k int32, seed int64 `[b]`; position int64 `[b]`, of the new token: it
    and the seed alone decide the draw. Rows with temperature 0 are greedy in every kind.
    """
    greedy = logits.argmax(-1)
    if kind == GREEDY:
        return greedy
    scaled = logits.float() / temperature.clamp_min(1e-6)[:, None]
    if kind != PLAIN:
        scaled = scaled.masked_fill(scaled < _cutoff(scaled, kind, top_k, top_p)[:, None], -torch.inf)
    # Drawn in the order of the vocabulary, whatever the kind, so that a row's token does not depend on its company.
    weights = scaled.softmax(-1)
    sums = weights.cumsum(-1)
    drawn = (sums <= (uniform(seed, position) * sums[:, -1])[:, None]).sum(-1)
    # Rounding may push the draw past the last token that has weight.
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.where(temperature > 0, torch.minimum(drawn, last), greedy)


def _cutoff(scaled: Tensor, kind: str, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least logit `[b]` that top-k and then top-p leave; tokens that equal it stay too."""
    count = min(TOPK_CANDIDATES, scaled.shape[-1])
    values = (scaled.topk(count) if kind == TOPK else scaled.sort(stable=True, dim=-1, descending=True)).values
    rank = torch.arange(values.shape[1], device=scaled.device)
    among = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    weights = values.masked_fill(~among, -torch.inf).softmax(-1)
    kept = among & ((weights.cumsum(-1) - weights < top_p[:, None]) | (top_p[:, None] >= 1))
    return torch.where(kept, values, torch.inf).amin(-1)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, position), int64 `[b]` both: fp32 `[b]`, by two rounds of splitmix64."""
    x = _mix(_mix(seed) + position)
    return ((x >> 40) & 0xFFFFFF).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014); int64 wraps."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, count: int) -> Tensor:
    return (x >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
