"""What a cache did to a model's predictions, position by position, in float64.

Logits of a whole vocabulary are compared a block at a time and never kept for more than one batch of
windows; what stays is a handful of numbers a position (`TokenScores`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

_BLOCK = 1 << 18
"""Logits compared at once on a CPU: 2 MB in float64, which a cache holds; 3 times faster than 2 ** 22."""

_GPU_BLOCK = 1 << 24
"""The same on a GPU, where each step has to fill the chip."""


@dataclass(frozen=True)
class TokenScores:
    """Figures of every scored position; float64 `[windows, positions]` on the CPU.

    kld:       Kullback-Leibler divergence of the mode's next-token distribution from the base's, KLD(base || mode), nats.
    same_top:  1 where base and mode rank the same token first, else 0.
    base_nll, nll: negative log-likelihood of the token that follows, under the base and under the mode, nats.
    delta_p:   probability of the token that follows, mode minus base.
    base_logsumexp, logsumexp: log of the summed exponentials of the logits: equal to the last bit only where two runs
               gave the same logits, so it serves as a fingerprint.
    """

    kld: Tensor
    same_top: Tensor
    base_nll: Tensor
    nll: Tensor
    delta_p: Tensor
    base_logsumexp: Tensor
    logsumexp: Tensor

    @property
    def num_windows(self) -> int:
        return self.kld.shape[0]

    @property
    def num_positions(self) -> int:
        """Scored positions of one window."""
        return self.kld.shape[1]

    def crop(self, windows: int, positions: int) -> TokenScores:
        """The first `positions` positions of the first `windows` windows."""
        return TokenScores(*(getattr(self, field.name)[:windows, :positions] for field in fields(self)))

    def span(self, begin: int, end: int) -> TokenScores:
        """Positions begin .. end - 1 of every window."""
        return TokenScores(*(getattr(self, field.name)[:, begin:end] for field in fields(self)))

    @staticmethod
    def cat(parts: Sequence[TokenScores], dim: int) -> TokenScores:
        """Join along the windows (`dim` 0) or the positions (`dim` 1)."""
        return TokenScores(*(torch.cat([getattr(p, field.name) for p in parts], dim) for field in fields(TokenScores)))


def compare(base: Tensor, logits: Tensor, next_tokens: Tensor) -> TokenScores:
    """Score a mode's `logits` beside the base's: both `[windows, positions, vocab]`, next_tokens int64 `[windows, positions]`.

    A token that both give logit -inf adds nothing; non-finite logits of the mode make the figures of their position
    non-finite.
    """
    windows, positions, vocab = logits.shape
    rows = max(1, (_BLOCK if logits.device.type == "cpu" else _GPU_BLOCK) // vocab)
    parts = [
        _compare_rows(b, m, t)
        for b, m, t in zip(
            base.reshape(-1, vocab).split(rows),
            logits.reshape(-1, vocab).split(rows),
            next_tokens.reshape(-1).split(rows),
            strict=True,
        )
    ]
    return TokenScores(*(torch.cat(column).view(windows, positions).cpu() for column in zip(*parts, strict=True)))


def _compare_rows(base: Tensor, logits: Tensor, next_tokens: Tensor) -> tuple[Tensor, ...]:
    target = next_tokens.to(logits.device)[:, None]
    base_max, logits_max = (x.max(-1, keepdim=True) for x in (base, logits))
    same_top = (base_max.indices == logits_max.indices).double().squeeze(-1)
    base, logits = base.double(), logits.double()
    base_next, next_ = base.gather(-1, target), logits.gather(-1, target)
    base_top, top = base_max.values.double(), logits_max.values.double()
    # KLD = sum p (base - logits) + logsumexp - base_logsumexp, with p = exp(base - base_top) / their sum
    weights = (base - base_top).exp_()
    base_sum = weights.sum(-1, keepdim=True)
    terms = base.sub_(logits).mul_(weights)
    kld = terms.sum(-1, keepdim=True)
    if kld.isnan().any():  # 0 * log(0 / 0) is 0
        kld = terms.masked_fill_(weights == 0, 0.0).sum(-1, keepdim=True)
    logsumexp = logits.sub_(top).exp_().sum(-1, keepdim=True).log_() + top
    base_logsumexp = base_sum.log() + base_top
    kld = (kld / base_sum + (logsumexp - base_logsumexp)).clamp_min(0.0)  # rounding may leave -1e-16
    base_next, next_ = base_next - base_logsumexp, next_ - logsumexp
    delta_p = next_.exp() - base_next.exp()
    columns = (kld, -base_next, -next_, delta_p, base_logsumexp, logsumexp)
    kld, *rest = (column.squeeze(-1) for column in columns)
    return kld, same_top, *rest
