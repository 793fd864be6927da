"""softmax_kl: the factor of K's range that changes attention weights least."""

from __future__ import annotations

import torch
from torch import Tensor

from .target import Estimator, Target, least


def find_range(target: Target) -> tuple[Tensor, Tensor]:
    """Least KL divergence of the attention weights from the exact ones, under the text's own queries, per K head.

    The queries of all heads of the group count. One factor a head, for all its channels: channels share the softmax.
    Attention-aware clipping as in SKVQ (Duanmu et al. 2024) and OSCAR.
    """
    sequences = target.whole()

    def loss(factor: float) -> Tensor:
        total = torch.zeros(target.stats.h_kv, dtype=torch.float64)
        for q, k in zip(sequences.q, sequences.k, strict=True):
            exact = sequences.log_weights(q, k)
            stored = sequences.log_weights(q, target.stored(k, factor))
            divergence = torch.where(exact > -torch.inf, exact.exp() * (exact - stored), 0.0)
            total += divergence.sum(-1).double().mean((1, 2))
        return total[:, None]

    return least(target, loss)


ESTIMATOR = Estimator("softmax_kl", find_range, tensors="k", searches=True, needs="sequences")
