"""attention_output: the factor of V's range that changes the attention's output least."""

from __future__ import annotations

import torch
from torch import Tensor

from .target import Estimator, Target, least


def find_range(target: Target) -> tuple[Tensor, Tensor]:
    """Least squared error of the attention's output behind o_proj, under the text's own attention weights.

    The error of a channel counts by the squared norm of its column of o_proj (`TensorStats.weight`); per channel where
    the scale is, as channels of V do not meet before o_proj. The objective of AdaRound and BRECQ's layer-wise
    reconstruction (Nagel et al. 2020, Li et al. 2021), for V.
    """
    sequences = target.whole()
    weight = target.stats.weight.double()

    def loss(factor: float) -> Tensor:
        total = torch.zeros_like(weight)
        for q, k, v in zip(sequences.q, sequences.k, sequences.v, strict=True):
            weights = sequences.log_weights(q, k).exp()
            error = torch.einsum("hgqk,khd->hgqd", weights, target.stored(v, factor) - v)
            total += error.double().square().mean((1, 2))
        total *= weight
        return total.mean(-1, keepdim=True) if target.fmt.scaling == "head" else total

    return least(target, loss)


ESTIMATOR = Estimator("attention_output", find_range, tensors="v", searches=True, needs="sequences")
